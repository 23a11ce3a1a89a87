"""What a training step minimises.

The objective decides what to compute: a reconstruction here; logits of another tokenizer's codes or a flow's velocity
in others. It sees the tokenizer and a batch, and returns one scalar and the terms it is made of.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..losses.perceptual import LPIPSLoss
from ..losses.pixel import PixelLoss
from ..tokenizers.base import Tokenizer, TokenizerOutput
from .schedules import Ramp


@dataclass
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: the scalar to minimise.
        output: what the tokenizer returned.
        terms: detached, unweighted values of every term, by name.
        reconstruction: ``(B, 3, H, W)`` nominally in [0, 1], or ``None`` where the step has none.
    """

    loss: Tensor
    output: TokenizerOutput
    terms: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: Tensor | None = None


class Objective(nn.Module):
    """Base class of objectives."""

    @abstractmethod
    def forward(self, tokenizer: Tokenizer, images: Tensor, step: int) -> ObjectiveOutput:
        """Loss of images ``(B, 3, H, W)`` in [0, 1] at an optimizer step (terms may start late)."""


class ReconstructionObjective(Objective):
    """Pixel, perceptual and quantizer losses of a reconstruction.

    Args:
        l1: weight of the mean absolute pixel error.
        l2: weight of the mean squared pixel error.
        perceptual: LPIPS term, off if ``None``.
        quantizer_weights: weight of each loss that the quantizer returns, over its published defaults: a number (0
            turns the loss off), or a :class:`~vistok.training.schedules.Ramp` over the optimizer steps.
    """

    def __init__(
        self,
        l1: float = 0.0,
        l2: float = 1.0,
        perceptual: LPIPSLoss | None = None,
        quantizer_weights: dict[str, float | Ramp] | None = None,
    ) -> None:
        super().__init__()
        self.pixel = PixelLoss(l1, l2)
        self.perceptual = perceptual
        self.quantizer_weights = dict(quantizer_weights or {})

    def forward(self, tokenizer: Tokenizer, images: Tensor, step: int) -> ObjectiveOutput:
        output = tokenizer(images)
        loss = self.pixel(output.decoded, images)
        terms = {"pixel": loss.detach()}
        if self.perceptual is not None and step >= self.perceptual.start_step:
            perceptual = self.perceptual(output.decoded, images)
            terms["lpips"] = perceptual.detach()
            loss = loss + self.perceptual.weight * perceptual
        weights = self._weights(tokenizer, output.losses, step)
        for name, value in output.losses.items():
            terms[name] = value.detach()
            if weights[name]:
                loss = loss + weights[name] * value
        return ObjectiveOutput(loss, output, terms, output.decoded)

    def _weights(self, tokenizer: Tokenizer, losses: dict[str, Tensor], step: int) -> dict[str, float]:
        weights = {**tokenizer.default_loss_weights, **self.quantizer_weights}
        weights = {name: value.at(step) if isinstance(value, Ramp) else value for name, value in weights.items()}
        unknown = sorted(set(self.quantizer_weights) - set(losses))
        if unknown:
            raise ValueError(f"quantizer_weights names {unknown}; this tokenizer's losses are {sorted(losses)}")
        missing = sorted(set(losses) - set(weights))
        if missing:
            raise ValueError(f"quantizer_weights needs a weight for {missing} (0 turns a loss off)")
        return weights
