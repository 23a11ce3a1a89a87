"""What a training step minimises.

The objective decides what to compute: a reconstruction here; logits of another tokenizer's codes or a flow's velocity
in others. It sees the tokenizer and a batch, and returns one scalar and the terms it is made of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.text import OpenCLIPText
from ..losses.adversarial import AdversarialLoss
from ..losses.perceptual_term import PerceptualTerm
from ..losses.pixel import PixelLoss
from ..losses.semantic import SemanticAlignment
from ..tokenizers.base import Tokenizer, TokenizerOutput
from .quantizer_losses import quantizer_loss
from .schedules import Ramp


@dataclass
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: the scalar to minimise.
        output: what the tokenizer returned.
        target: ``(B, 3, H, W)`` in [0, 1], the images that a reconstruction should equal.
        terms: detached, unweighted values of every term, by name.
        reconstruction: ``(B, 3, H, W)`` nominally in [0, 1], or ``None`` where the step has none.
    """

    loss: Tensor
    output: TokenizerOutput
    target: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: Tensor | None = None


class Objective(nn.Module):
    """Base class of objectives."""

    @property
    def discriminator(self) -> nn.Module | None:
        """The part that is trained against the tokenizer, if there is one."""
        return None

    @property
    def discriminator_start(self) -> int:
        """Optimizer step at which the discriminator begins to train."""
        return 0

    @property
    def needs_fixed_images(self) -> bool:
        """Whether a training image must look the same in every epoch, because something is cached by its index."""
        return False

    def before_optimizer_step(self, step: int) -> None:
        """Called once per optimizer step, when all gradients are there."""

    def attach(self, tokenizer: Tokenizer) -> None:
        """Called once for every tokenizer that will be passed to ``forward``, before training starts."""

    @abstractmethod
    def forward(
        self, tokenizer: Tokenizer, images: Tensor, step: int, batch: Mapping[str, Any] | None = None
    ) -> ObjectiveOutput:
        """Loss at an optimizer step (terms may start late).

        Args:
            tokenizer: in train or eval mode.
            images: ``(B, 3, H, W)`` in [0, 1].
            step: optimizer steps done before this one.
            batch: everything else that the loader gave: ``index``, ``target``, ``text`` where the source has them.
        """


class ReconstructionObjective(Objective):
    """Pixel, perceptual, adversarial, semantic and quantizer losses of a reconstruction.

    A batch may bring the image to reconstruct (``target``, see :class:`~vistok.data.paired.PairedFolder`); otherwise it
    is the image that went in. It may bring a caption (``text``) for tokenizers whose decoder reads one.

    Args:
        l1: weight of the mean absolute pixel error.
        l2: weight of the mean squared pixel error.
        logit_laplace: weight of the logit-Laplace likelihood, see :class:`~vistok.losses.pixel.PixelLoss`.
        perceptual: perceptual term, or several.
        adversarial: discriminator and its losses. It is trained by the same optimizer and in the same step.
        semantic: alignment of a layer with a frozen teacher.
        quantizer_weights: weight of each loss that the quantizer returns, over its published defaults: a number (0
            turns the loss off), or a :class:`~vistok.training.schedules.Ramp` over the optimizer steps.
        text_encoder: turns the captions of a batch into the decoder's context.
    """

    def __init__(
        self,
        l1: float = 0.0,
        l2: float = 1.0,
        perceptual: PerceptualTerm | list[PerceptualTerm] | None = None,
        quantizer_weights: dict[str, float | Ramp] | None = None,
        adversarial: AdversarialLoss | None = None,
        semantic: SemanticAlignment | None = None,
        logit_laplace: float = 0.0,
        text_encoder: OpenCLIPText | None = None,
    ) -> None:
        super().__init__()
        self.pixel = PixelLoss(l1, l2, logit_laplace)
        terms = [] if perceptual is None else perceptual if isinstance(perceptual, list) else [perceptual]
        self.perceptual = nn.ModuleList(terms)
        self.adversarial = adversarial
        self.semantic = semantic
        self.quantizer_weights = dict(quantizer_weights or {})
        self.text_encoder = text_encoder

    @property
    def discriminator(self) -> nn.Module | None:
        return None if self.adversarial is None else self.adversarial.discriminator

    @property
    def discriminator_start(self) -> int:
        return 0 if self.adversarial is None else self.adversarial.start_step

    @property
    def needs_fixed_images(self) -> bool:
        return self.semantic is not None and self.semantic.cache is not None

    def before_optimizer_step(self, step: int) -> None:
        for term in (self.semantic, self.adversarial):
            if term is not None:
                term.drop_held_gradients(step)

    def attach(self, tokenizer: Tokenizer) -> None:
        if self.semantic is not None:
            self.semantic.attach(tokenizer)

    def forward(
        self, tokenizer: Tokenizer, images: Tensor, step: int, batch: Mapping[str, Any] | None = None
    ) -> ObjectiveOutput:
        batch = {} if batch is None else batch
        target = as_pixels(batch["target"]) if "target" in batch else images
        output = tokenizer(images, **self._context(batch))
        loss = self.pixel(output.decoded, target)
        terms = {"pixel": loss.detach()}
        for term in self.perceptual:
            if term.active(step):
                value = term(output.decoded, target)
                terms[term.name] = value.detach()
                loss = loss + term.weight * value
        total = loss + quantizer_loss(output.losses, tokenizer.default_loss_weights, self.quantizer_weights, step)
        terms |= {name: value.detach() for name, value in output.losses.items()}
        if self.semantic is not None:
            total = total + self._semantic_loss(target, batch.get("index"), step, terms)
        if self.adversarial is not None and torch.is_grad_enabled():
            total = total + self._adversarial_loss(tokenizer, output.decoded, target, loss, step, terms)
        return ObjectiveOutput(total, output, target, terms, output.decoded)

    def _context(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.text_encoder is None:
            return {}
        if "text" not in batch:
            raise ValueError("text_encoder needs captions: give data.train (and data.val) a source with text")
        return {"context": self.text_encoder(batch["text"])}

    def _semantic_loss(self, target: Tensor, index: Tensor | None, step: int, terms: dict[str, Tensor]) -> Tensor:
        """Weighted alignment, whose value joins ``terms``; 0, but in the graph, before the start."""
        if not self.semantic.active(step):
            return self.semantic.hold()
        value = self.semantic(target, index)
        terms[self.semantic.name] = value.detach()
        return self.semantic.weight * value

    def _adversarial_loss(
        self,
        tokenizer: Tokenizer,
        reconstruction: Tensor,
        target: Tensor,
        reference: Tensor,
        step: int,
        terms: dict[str, Tensor],
    ) -> Tensor:
        """Loss of generator and discriminator, whose values join ``terms``; 0, but in the graph, before the start."""
        if not self.adversarial.active(step):
            return self.adversarial.hold()
        last_layer = getattr(getattr(tokenizer, "decoder", None), "last_layer", None)
        result = self.adversarial(reconstruction, target, step, reference=reference, last_layer=last_layer)
        terms |= result.terms
        return result.loss


def as_pixels(images: Tensor) -> Tensor:
    """uint8 images, already on the device, to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)
