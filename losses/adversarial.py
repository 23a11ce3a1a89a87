"""The adversarial loss of a tokenizer, both sides in one scalar (VQGAN, arXiv:2012.09841; TiTok, arXiv:2406.07550).

Both gradients are taken at the same parameters and the same reconstructions, so one backward pass of the sum and one
optimizer step over both networks are the two steps of the usual alternating loop, bit for bit. For that the generator's
term sees the discriminator with frozen parameters, and the discriminator's term sees detached reconstructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .adaptive_weight import adaptive_weight
from .diff_augment import DiffAugment
from .discriminator import Discriminator
from .gan import GANLoss, check_loss, discriminator_loss, generator_loss
from .lecam import LeCam
from .term import LossTerm


@dataclass
class AdversarialOutput:
    """What the adversarial loss returns.

    Attributes:
        loss: scalar to add to the objective, all weights applied.
        terms: detached, unweighted scalars: ``generator``, ``discriminator``, the means ``logits_real`` and
            ``logits_fake``, and ``lecam``, ``r1``, ``adaptive_weight`` where they were computed.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class AdversarialLoss(LossTerm):
    """A discriminator, its loss, and the generator's.

    ``weight * adaptive weight * generator + discriminator_weight * discriminator + lecam_weight * LeCam
    + r1_weight / 2 * R1``. Before ``start_step`` the loss is 0 and no image is looked at.

    Args:
        discriminator: images to logits.
        weight: factor of the generator's loss.
        start_step: optimizer step from which both sides count.
        precision: what the discriminator computes in; losses are float32.
        loss: GAN loss, see :mod:`~vistok.losses.gan`.
        discriminator_weight: factor of the discriminator's loss.
        adaptive: multiply ``weight`` by VQGAN's ratio of gradients at the decoder's last layer.
        adaptive_max: upper limit of that ratio.
        lecam_weight: factor of the LeCam regularisation; 0 for none.
        lecam_decay: of LeCam's moving averages.
        r1_weight: gamma of the R1 penalty (arXiv:1801.04406), the squared gradient of an image's mean logit at real
            images; 0 for none.
        r1_every: optimizer steps from one R1 penalty to the next; it then counts that many times.
        augment: augmentation of all that the discriminator sees.

    Raises:
        ValueError: for an unknown loss, a negative weight, or ``r1_every`` below 1.
    """

    name = "adversarial"

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.1,
        start_step: int = 0,
        precision: str = "float32",
        loss: GANLoss = "hinge",
        discriminator_weight: float = 1.0,
        adaptive: bool = False,
        adaptive_max: float = 1e4,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        r1_weight: float = 0.0,
        r1_every: int = 16,
        augment: DiffAugment | None = None,
    ) -> None:
        super().__init__(weight, start_step, precision)
        check_loss(loss)
        factors = {
            "discriminator_weight": discriminator_weight,
            "adaptive_max": adaptive_max,
            "lecam_weight": lecam_weight,
            "r1_weight": r1_weight,
        }
        for name, value in factors.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        if r1_every < 1:
            raise ValueError(f"r1_every must be at least 1; got {r1_every}")
        self.discriminator = discriminator
        self.loss = loss
        self.discriminator_weight = discriminator_weight
        self.adaptive = adaptive
        self.adaptive_max = adaptive_max
        self.lecam_weight = lecam_weight
        self.lecam = LeCam(lecam_decay) if lecam_weight else None
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.augment = augment

    def forward(
        self,
        reconstructions: Tensor,
        images: Tensor,
        step: int,
        *,
        reference: Tensor | None = None,
        last_layer: nn.Parameter | None = None,
    ) -> AdversarialOutput:
        """Loss of both sides at an optimizer step.

        Without gradients (validation) nothing is updated, R1 is left out and the adaptive weight is 1.

        Args:
            reconstructions: ``(B, 3, H, W)`` nominally in [0, 1].
            images: ``(B, 3, H, W)`` in [0, 1].
            step: optimizer steps done before this one.
            reference: weighted sum of the reconstruction losses, for the adaptive weight.
            last_layer: weight of the decoder's last layer, for the adaptive weight.

        Raises:
            ValueError: if the shapes differ, or an adaptive weight lacks ``reference`` or a trainable ``last_layer``.
        """
        if reconstructions.shape != images.shape:
            shapes = f"{tuple(reconstructions.shape)} and {tuple(images.shape)}"
            raise ValueError(f"reconstructions and images must have the same shape; got {shapes}")
        if not self.active(step):
            return AdversarialOutput(self.hold())
        fake, real = reconstructions.float(), images.detach().float()
        # Running statistics see fake, real, fake, as in the alternating loop. Where there are none the discriminator's
        # side comes first: its graph is gone before the generator's is built.
        if self.discriminator.batch_statistics:
            side, terms = self._generator_side(fake, reference, last_layer)
            loss, others = self._discriminator_side(real, fake.detach(), step)
        else:
            loss, others = self._discriminator_side(real, fake.detach(), step)
            side, terms = self._generator_side(fake, reference, last_layer)
        terms = {name: value.detach() for name, value in (terms | others).items()}
        return AdversarialOutput(side + loss, terms)

    def _generator_side(
        self, fake: Tensor, reference: Tensor | None, last_layer: nn.Parameter | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of the generator, and its terms."""
        with frozen_parameters(self.discriminator):
            generator = generator_loss(self._logits(fake), self.loss)
        terms, side = {"generator": generator}, self.weight * generator
        if self.adaptive and torch.is_grad_enabled():
            terms["adaptive_weight"] = self._adaptive_weight(reference, generator, last_layer)
            side = terms["adaptive_weight"] * side
        return side, terms

    def _discriminator_side(self, real: Tensor, fake: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of the discriminator, and its terms.

        Its gradient is computed here and now, and what is returned has the loss's value and that gradient, but not its
        graph: the activations of both batches are not kept while the tokenizer's backward pass runs.
        """
        logits_real, logits_fake = self._logits_of_both(real, fake)
        discriminator = discriminator_loss(logits_real, logits_fake, self.loss)
        terms = {
            "discriminator": discriminator,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }
        loss = self.discriminator_weight * discriminator
        if self.lecam is not None:
            terms["lecam"] = self.lecam(logits_real, logits_fake, step)
            loss = loss + self.lecam_weight * terms["lecam"]
        if not torch.is_grad_enabled():
            return loss, terms
        if self.r1_weight and step % self.r1_every == 0:
            terms["r1"] = self._gradient_penalty(real)
            loss = loss + 0.5 * self.r1_weight * self.r1_every * terms["r1"]
        parameters = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        return _GivenGradient.apply(loss.detach(), torch.autograd.grad(loss, parameters), *parameters), terms

    def _logits(self, images: Tensor) -> Tensor:
        if self.augment is not None:
            images = self.augment(images)
        with self.autocast(images.device.type):
            return self.discriminator(images).float()

    def _logits_of_both(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if self.discriminator.batch_statistics:
            return self._logits(real), self._logits(fake)
        logits = self._logits(torch.cat([real, fake]))
        return logits[: len(real)], logits[len(real) :]

    def _adaptive_weight(self, reference: Tensor | None, generator: Tensor, last_layer: Tensor | None) -> Tensor:
        if reference is None:
            raise ValueError("adaptive=True needs reference, the weighted sum of the reconstruction losses; got None")
        if last_layer is None or not last_layer.requires_grad:
            got = "None" if last_layer is None else "a frozen one"
            raise ValueError(f"adaptive=True needs last_layer, a trainable weight of the decoder; got {got}")
        return adaptive_weight(reference, generator, last_layer, self.adaptive_max)

    def _gradient_penalty(self, images: Tensor) -> Tensor:
        """Mean over images of the squared gradient of their mean logit, in float32."""
        images = images.clone().requires_grad_()
        augmented = images if self.augment is None else self.augment(images)
        # Fused attention and compiled graphs have no second derivative: `forward` goes past `module.compile()`.
        with torch.autocast(images.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            logits = self.discriminator.forward(augmented).flatten(1)  # (B, L)
            (gradient,) = torch.autograd.grad(logits.mean(1).sum(), images, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()


class _GivenGradient(torch.autograd.Function):
    """A value whose gradient with respect to some parameters is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.gradients, factor)


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Within the context, what a module computes has no gradient at its parameters, but still at its inputs."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
