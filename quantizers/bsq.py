"""Binary spherical quantization (arXiv:2406.07548): signs on the unit sphere.

Latents are brought to unit length, codes are the corners ``{-1, 1}^D / sqrt(D)`` of a cube inside the sphere, so the
quantization error is bounded. It is lookup-free quantization with another scale, temperature and bit order.

Where we differ from the published code: the quantizer normalises the latents itself (there the encoder does it); a
packed index is computed in integers (there in floats, wrong beyond 24 bits); the gradient passes unscaled
(``scaled_gradient`` restores the published factor ``1 / sqrt(D)``, which stems from scaling the codes behind the
straight-through step); the commitment loss is a mean over elements (there a sum over channels: D times as large, which
the default weight makes up for). The two published ways of computing the sample entropy, analytic and by groups, are
the same number; "analytic" also sets ``entropy_group=1`` for the batch entropy.

The published objective is ``zeta * (gamma0 * sample - gamma * batch) * temperature + beta * commitment``, times 0.1,
with gamma0, gamma and zeta 1, and beta 0.25 in effect, whatever the configuration says. ``batch_entropy_weight`` is
``gamma / gamma0``.
"""

from __future__ import annotations

import math

from torch import Tensor

from .base import Quantized
from .estimators import straight_through
from .lfq import LookupFreeQuantizer


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """Sign quantizer on the unit sphere; channel 0 is the most significant bit.

    Losses and statistics are those of :class:`LookupFreeQuantizer`.

    Args:
        dim: D, channels and bits.
        l2_normalize: bring the latents to unit length first; ``False`` where the encoder has done so. The codes have
            unit length either way.
        temperature: of the softmax over codes (the published ``inv_temperature`` is its inverse).
        batch_entropy_weight: share of the batch entropy in the entropy loss.
        entropy_group: bits per group of the batch entropy, a divisor of D of at most 24; published 9 and 1. All D
            jointly if ``None``.
        entropy_eps: added inside the logarithm of the batch entropy (published: 1e-8).
        scaled_gradient: multiply the straight-through gradient by ``1 / sqrt(D)`` as the published code does.
        subcode_bits: bits of one index, a divisor of D of at most 62; all D if ``None``.
        bit_order: which digit of an index its first channel is.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, D / subcode_bits)``.
    """

    def __init__(
        self,
        dim: int,
        l2_normalize: bool = True,
        temperature: float = 1.0,
        batch_entropy_weight: float = 1.0,
        entropy_group: int | None = None,
        entropy_eps: float = 0.0,
        scaled_gradient: bool = False,
        subcode_bits: int | None = None,
        bit_order: str = "most_significant_first",
    ) -> None:
        super().__init__(
            dim=dim,
            scale=1.0,
            l2_normalize=l2_normalize,
            temperature=temperature,
            batch_entropy_weight=batch_entropy_weight,
            entropy_group=entropy_group,
            entropy_eps=entropy_eps,
            subcode_bits=subcode_bits,
            bit_order=bit_order,
        )
        self.high = 1 / math.sqrt(dim)
        self.low = -self.high
        self.scaled_gradient = scaled_gradient
        self.default_loss_weights = {"entropy": 0.1 * temperature, "commitment": 0.1 * 0.25 * dim}

    def estimate(self, assigned: Quantized) -> Tensor:
        """Straight through, times ``1 / sqrt(D)`` with ``scaled_gradient``."""
        latents = assigned.latents * self.high if self.scaled_gradient else assigned.latents
        return straight_through(latents, assigned.quantized)
