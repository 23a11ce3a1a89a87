"""Binary latents drawn from Bernoulli distributions (Instella-T2I, arXiv:2506.21022).

Latents are logits. In training bit d is one with probability ``sigmoid(y_d / temperature)``, in evaluation where
``y_d > 0``. A loss on the variance of the bits, ``mean p (1 - p)`` with ``p = sigmoid(y)``, makes them certain. Any
number of bits works: by default every bit is an index of its own, since 64 bits do not fit one.

The published code samples with a temperature and takes gradient and loss without one. ``tempered_gradient`` gives the
gradient of the distribution that is sampled from: ``p (1 - p) / temperature`` with ``p = sigmoid(y / temperature)``.
The published projections around the bits belong to ``Factorized``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Quantized, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .binary import BinaryQuantizer
from .binary_entropy import bit_entropy
from .draws import draw_uniform


class BernoulliQuantizer(BinaryQuantizer):
    """Bits sampled in training, thresholded in evaluation, with the gradient of their probability.

    Losses: ``variance`` is ``p (1 - p)`` and ``kl`` the Kullback-Leibler divergence from the fair coin, ``ln 2`` minus
    the entropy, in nats; both with ``p = sigmoid(latents)``, mean over all elements. The published system uses the
    first; its weight is not known. Ours is small: with weight 1 a small model freezes its bits before they say
    anything.

    Args:
        num_bits: D, channels and bits.
        temperature: of the distribution that training samples from (published model: 0.1).
        final_temperature: what the temperature goes to, linearly, over ``anneal_steps`` optimizer steps; constant if
            ``None``.
        anneal_steps: optimizer steps until ``final_temperature``.
        tempered_gradient: pass the gradient of ``sigmoid(y / temperature)`` instead of ``sigmoid(y)``.
        symmetric: codes are -1 and 1 instead of 0 and 1, and the gradient is twice as large.
        subcode_bits: bits of one index, a divisor of D of at most 62; 1 makes every bit an index.
        bit_order: which digit of an index its first channel is.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, D / subcode_bits)``.
    """

    default_loss_weights = {"variance": 0.01, "kl": 0.0}

    def __init__(
        self,
        num_bits: int,
        temperature: float = 0.1,
        final_temperature: float | None = None,
        anneal_steps: int | None = None,
        tempered_gradient: bool = False,
        symmetric: bool = False,
        subcode_bits: int = 1,
        bit_order: str = "least_significant_first",
    ) -> None:
        super().__init__(num_bits, subcode_bits, bit_order)
        if temperature <= 0 or (final_temperature is not None and final_temperature <= 0):
            raise ValueError(f"temperatures must be positive; got {temperature} and {final_temperature}")
        if (final_temperature is None) != (anneal_steps is None):
            raise ValueError(
                f"final_temperature and anneal_steps go together; got {final_temperature} and {anneal_steps}"
            )
        if anneal_steps is not None and anneal_steps < 1:
            raise ValueError(f"anneal_steps must be at least 1; got {anneal_steps}")
        self.low, self.high = (-1.0, 1.0) if symmetric else (0.0, 1.0)
        self.start_temperature, self.final_temperature = temperature, final_temperature
        self.anneal_steps, self.tempered_gradient = anneal_steps, tempered_gradient
        if anneal_steps is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> float | Tensor:
        """The present temperature; a scalar tensor on the module's device while it anneals."""
        if self.anneal_steps is None:
            return self.start_temperature
        progress = (self.steps.to(torch.float32) / self.anneal_steps).clamp(max=1)
        return self.start_temperature + (self.final_temperature - self.start_temperature) * progress

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        logits = token_rows(z)  # (n, D)
        keep = None if mask is None else mask.reshape(-1)
        tempered = logits / self.temperature if self.training or self.tempered_gradient else logits
        bits = self.draw(logits, generator) < torch.sigmoid(tempered) if self.training else logits > 0
        codes = self._codes(bits, logits.dtype)
        probability = torch.sigmoid(logits)
        expected = torch.sigmoid(tempered) if self.tempered_gradient else probability
        losses = {
            # The added zero is NaN for an infinite logit, which would pass as a certain bit otherwise.
            "variance": mean_over_kept(probability * torch.sigmoid(-logits) + 0 * logits, keep),
            "kl": mean_over_kept(math.log(2) - bit_entropy(logits), keep),
        }
        indices = drop_indices(self._pack(bits).view(*z.shape[:-1], -1), mask)
        statistics = count_codes(indices, self.codebook_sizes, logits.isfinite().all(1))
        latents = drop((self.low + (self.high - self.low) * expected).view(z.shape), mask)
        return Quantized(drop(codes.view(z.shape), mask), indices, losses, statistics, latents)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform numbers in [0, 1) in the shape of ``logits`` ``(n, D)``, on their device."""
        return draw_uniform(logits.shape, logits.device, generator)

    @torch.no_grad()
    def commit_update(self) -> None:
        if self.anneal_steps is not None and self.training:
            self.steps += 1
