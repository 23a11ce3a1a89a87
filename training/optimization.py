"""Optimizer, weight-decay groups and learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

_MATRICES = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass
class Optimization:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: peak learning rate.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: decay of the weight matrices; biases, norms, positions, learned tokens and codebooks have none.
        warmup_steps: optimizer steps from 0 to ``lr``.
        min_lr: learning rate at the end of the cosine.
        schedule: ``cosine`` down to ``min_lr`` over the whole run, or ``constant`` after the warm-up.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    min_lr: float = 0.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant'; got {self.schedule!r}")
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"needs lr > 0 and 0 <= min_lr <= lr; got lr={self.lr}, min_lr={self.min_lr}")

    def factor(self, step: int, total_steps: float) -> float:
        """Learning rate of a step as a multiple of ``lr``: 0 at step 0 with a warm-up, ``min_lr / lr`` at the end."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        floor = self.min_lr / self.lr
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def build(self, module: nn.Module, total_steps: float, fused: bool) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Optimizer over the trainable parameters of a module, and its schedule, stepped once per optimizer step.

        Raises:
            ValueError: for a cosine over a run without end.
        """
        if self.schedule == "cosine" and not math.isfinite(total_steps):
            raise ValueError(
                "a cosine schedule needs an end: set trainer.max_steps or max_epochs, or schedule constant"
            )
        optimizer = torch.optim.AdamW(
            parameter_groups(module, self.weight_decay), lr=self.lr, betas=self.betas, eps=self.eps, fused=fused
        )
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups of the trainable parameters: weights of linear and convolution layers decay, all else does not."""
    matrices = {id(part.weight) for part in module.modules() if isinstance(part, _MATRICES)}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
