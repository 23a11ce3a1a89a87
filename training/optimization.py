"""Optimizer, parameter groups by role and by kind, and learning-rate schedules.

Tokenizer and discriminator share one AdamW. Both gradients of a GAN step are taken at the same parameters, so one
backward pass of both losses and one optimizer step are the same update as two optimizers in turn; learning rates,
betas and schedules differ by parameter group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

_MATRICES = (nn.Linear, nn.modules.conv._ConvNd)
TOKENIZER, DISCRIMINATOR = "tokenizer", "discriminator"


@dataclass
class DiscriminatorOptimization:
    """What differs for the discriminator; everything left ``None`` is as for the tokenizer.

    Args:
        lr: peak learning rate.
        betas: AdamW's decay rates of the moments.
        weight_decay: decay of the weight matrices.
        warmup_steps: optimizer steps from 0 to ``lr``.
        min_lr: learning rate at the end of the cosine.
        from_start_step: whether its schedule begins when the discriminator does (TiTok) or with the run (GigaTok).
    """

    lr: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    min_lr: float | None = None
    from_start_step: bool = True


@dataclass
class Optimization:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: peak learning rate.
        betas: AdamW's decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: decay of the weight matrices; biases, norms, positions, learned tokens and codebooks have none.
        warmup_steps: optimizer steps from 0 (or ``warmup_lr``) to ``lr``.
        min_lr: learning rate at the end of the cosine.
        schedule: ``cosine`` down to ``min_lr`` over the whole run, or ``constant`` after the warm-up.
        warmup_lr: learning rate of step 0 where there is a warm-up.
        discriminator: what differs for the discriminator, if the objective has one.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    min_lr: float = 0.0
    schedule: str = "cosine"
    warmup_lr: float = 0.0
    discriminator: DiscriminatorOptimization | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant'; got {self.schedule!r}")
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr or not 0 <= self.warmup_lr <= self.lr:
            raise ValueError(
                f"needs lr > 0 and min_lr and warmup_lr between 0 and lr; got lr={self.lr}, min_lr={self.min_lr}, "
                f"warmup_lr={self.warmup_lr}"
            )

    def factor(self, step: int, total_steps: float) -> float:
        """Learning rate of a step as a multiple of ``lr``."""
        if step < self.warmup_steps:
            floor = self.warmup_lr / self.lr
            return floor + (1 - floor) * step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        floor = self.min_lr / self.lr
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def for_discriminator(self) -> Optimization:
        """The settings of the discriminator, every field filled in."""
        if self.discriminator is None:
            return replace(self, discriminator=None)
        names = ("lr", "betas", "weight_decay", "warmup_steps", "min_lr")
        given = {name: getattr(self.discriminator, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        lr = given.get("lr", self.lr)
        inherited = {"min_lr": min(self.min_lr, lr), "warmup_lr": min(self.warmup_lr, lr)}
        return replace(self, discriminator=None, **{**inherited, **given})

    def build(
        self,
        module: nn.Module,
        total_steps: float,
        fused: bool,
        discriminator: nn.Module | None = None,
        discriminator_start: int = 0,
    ) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Optimizer over the trainable parameters of a module, and its schedule, stepped once per optimizer step.

        Args:
            module: everything that is trained.
            total_steps: optimizer steps of the run.
            fused: use the fused implementation.
            discriminator: the part of ``module`` that is trained against the rest.
            discriminator_start: optimizer step at which it begins to train.

        Raises:
            ValueError: for a cosine over a run without end.
        """
        if self.schedule == "cosine" and not math.isfinite(total_steps):
            raise ValueError(
                "a cosine schedule needs an end: set trainer.max_steps or max_epochs, or schedule constant"
            )
        adversary = set() if discriminator is None else {id(p) for p in discriminator.parameters()}
        groups, schedules = [], []
        for group in parameter_groups(module, self.weight_decay, exclude=adversary):
            groups.append(group | {"role": TOKENIZER})
            schedules.append(_schedule(self, total_steps, 0))
        if discriminator is not None:
            own = self.for_discriminator()
            late = self.discriminator is None or self.discriminator.from_start_step
            for group in parameter_groups(discriminator, own.weight_decay):
                groups.append(group | {"role": DISCRIMINATOR, "lr": own.lr, "betas": own.betas})
                schedules.append(_schedule(own, total_steps, discriminator_start if late else 0))
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
        return optimizer, LambdaLR(optimizer, schedules)


def _schedule(settings: Optimization, total_steps: float, start: int) -> Callable[[int], float]:
    return lambda step: settings.factor(max(0, step - start), total_steps - start)


def parameter_groups(
    module: nn.Module, weight_decay: float, exclude: set[int] | frozenset[int] = frozenset()
) -> list[dict[str, object]]:
    """Two groups of the trainable parameters: weights of linear and convolution layers decay, all else does not.

    Args:
        module: whose parameters.
        weight_decay: of the weight matrices.
        exclude: ``id`` of parameters that belong to another role.
    """
    matrices = {id(part.weight) for part in module.modules() if isinstance(part, _MATRICES)}
    for part in module.modules():  # the weight of a parametrised layer (spectral norm) is computed from this one
        if isinstance(part, _MATRICES) and nn.utils.parametrize.is_parametrized(part, "weight"):
            matrices |= {id(p) for p in part.parametrizations["weight"].parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad and id(p) not in exclude]
    groups = [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
