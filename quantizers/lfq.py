"""Lookup-free quantization (MAGVIT-v2, arXiv:2310.05737): a channel becomes its sign.

The codebook is ``{-scale, scale}^D``, no parameter and no search. An entropy loss keeps it in use: every token should
be certain of its code, and the tokens together should use all codes. The entropies are exact and factorised (see
``binary_entropy``), and taken over all ranks; published code lists all codes, and no public version averages over
ranks correctly.

Published settings: Open-MAGVIT2 (arXiv:2409.04410) is the default, with ``entropy_eps=1e-5``. lucidrains'
``inv_temperature=100`` is ``temperature=0.01`` with the other bit order, its ``diversity_gamma`` is
``batch_entropy_weight``, its ``spherical`` is ``l2_normalize``. ImageFolder's scales are ``temperature=1.0,
entropy_group=1, entropy_eps=1e-8`` with ``scale = 0.9**level / sqrt(D)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Quantized, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .binary import BinaryQuantizer
from .binary_entropy import binary_entropies, check_entropy_group


class LookupFreeQuantizer(BinaryQuantizer):
    """Sign quantizer with straight-through gradient, commitment and entropy loss; 0 becomes ``-scale``.

    Losses: ``commitment`` is the squared distance to the code, mean over all elements; ``entropy`` is the sample
    entropy minus ``batch_entropy_weight`` times the batch entropy, in nats. Both entropies are among the statistics.

    Args:
        dim: D, channels and bits.
        scale: size of a code's channels; with ``l2_normalize`` the length of a code.
        l2_normalize: bring the latents to length ``scale`` first; codes have channels ``scale / sqrt(D)``.
        temperature: of the softmax over codes with logits ``2 z.c / temperature`` that the entropies are taken of.
        batch_entropy_weight: share of the batch entropy in the entropy loss.
        entropy_group: bits per group of the batch entropy, a divisor of D of at most 24; all D jointly if ``None``.
        entropy_eps: added inside the logarithm of the batch entropy (Open-MAGVIT2: 1e-5).
        subcode_bits: bits of one index, a divisor of D of at most 62; all D if ``None``.
        bit_order: which digit of an index its first channel is: ``least_significant_first`` (Open-MAGVIT2, WeTok,
            ImageFolder) or ``most_significant_first`` (BSQ, lucidrains, Cosmos).

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, D / subcode_bits)``. Computes in float32 (float64 latents: float64).
    """

    default_loss_weights = {"entropy": 0.1, "commitment": 0.25}

    def __init__(
        self,
        dim: int,
        scale: float = 1.0,
        l2_normalize: bool = False,
        temperature: float = 0.01,
        batch_entropy_weight: float = 1.0,
        entropy_group: int | None = None,
        entropy_eps: float = 0.0,
        subcode_bits: int | None = None,
        bit_order: str = "least_significant_first",
    ) -> None:
        super().__init__(dim, subcode_bits, bit_order)
        if scale <= 0 or temperature <= 0:
            raise ValueError(f"scale and temperature must be positive; got {scale} and {temperature}")
        if batch_entropy_weight < 0 or entropy_eps < 0:
            raise ValueError(
                f"batch_entropy_weight and entropy_eps must not be negative; "
                f"got {batch_entropy_weight} and {entropy_eps}"
            )
        check_entropy_group(dim, entropy_group)
        self.scale, self.l2_normalize, self.temperature = scale, l2_normalize, temperature
        self.batch_entropy_weight, self.entropy_group = batch_entropy_weight, entropy_group
        self.entropy_eps = entropy_eps
        self.high = scale / math.sqrt(dim) if l2_normalize else scale
        self.low = -self.high

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        rows = token_rows(z)  # (n, D)
        latents = F.normalize(rows, dim=1) * self.scale if self.l2_normalize else rows
        keep = None if mask is None else mask.reshape(-1)
        bits = rows > 0
        codes = self._codes(bits, rows.dtype)  # (n, D)
        sample, batch = binary_entropies(
            latents * (4 * self.high / self.temperature),
            keep,
            group=self.entropy_group,
            eps=self.entropy_eps,
            reduce=self.training and torch.is_grad_enabled(),
        )
        losses = {
            "commitment": mean_over_kept((latents - codes).square(), keep),
            "entropy": sample - self.batch_entropy_weight * batch,
        }
        indices = drop_indices(self._pack(bits).view(*z.shape[:-1], -1), mask)
        statistics = count_codes(indices, self.codebook_sizes, rows.isfinite().all(1))
        statistics |= {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
        return Quantized(drop(codes.view(z.shape), mask), indices, losses, statistics, latents.view(z.shape))
