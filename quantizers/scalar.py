"""Post-training scalar quantization of continuous latents, channel by channel (TokenBridge, arXiv:2503.16430).

A trained VAE becomes a discrete tokenizer without further training: each channel of its latents is cut into ``2^bits``
bins that a standard normal fills evenly, and a number becomes the mean of its bin. A token has one index per channel.

Two details follow the published code. The outermost bins end at ``std_range`` standard deviations, where the normal
does not, and a number is assigned to the nearest bin *mean*, which is not always the bin that it lies in. Assignment is
a binary search among the midpoints of the means, equal to comparing with every mean but without a tensor of all
differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Quantized, Quantizer, count_codes, drop, drop_indices
from .neighbours import check_k, product_neighbours, table_neighbours
from .search import search_dtype

MAX_BITS = 16


class ScalarQuantizer(Quantizer):
    """Assigns every channel of a latent to the nearest of ``2^bits`` fixed values; nothing is trained.

    A gradient passes straight through, also outside the range, so that an encoder or an adapter in front of it can be
    fine-tuned.

    Args:
        dim: number of channels.
        bits: of one channel, 1 to 16; the published setting is 6.
        low: latent that lies ``std_range`` standard deviations below the mean; one number, or one per channel.
        high: the same above the mean.
        std_range: where the outermost bins end, in standard deviations.

    Shape:
        latents ``(B, *S, dim)``, indices ``(B, *S, dim)`` in ascending order of the values. Computes in float32
        (float64 latents: float64); codes are float32, or float64 after ``.double()``. NaN gets a valid index.

    Raises:
        ValueError: for an empty range, or more bits than ``std_range`` has room for: a bin beyond it would be empty.
    """

    float32_buffers = ("means", "low", "high")

    def __init__(
        self,
        dim: int,
        bits: int = 6,
        low: float | Sequence[float] = -5.0,
        high: float | Sequence[float] = 5.0,
        std_range: float = 3.0,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive; got {dim}")
        lows, highs = _per_channel("low", low, dim), _per_channel("high", high, dim)
        if not all(bottom < top for bottom, top in zip(lows, highs, strict=True)):
            raise ValueError(f"low must lie below high in every channel; got {low} and {high}")
        self.dim = dim
        self.codebook_sizes = (1 << bits,) * dim
        self.std_range = std_range
        _, means = normal_bins(bits, std_range)
        # Not in the state dict: the constructor's arguments say it all.
        self.register_buffer("means", means.to(torch.float32), persistent=False)
        self.register_buffer("low", torch.tensor(lows, dtype=torch.float32), persistent=False)
        self.register_buffer("high", torch.tensor(highs, dtype=torch.float32), persistent=False)

    @classmethod
    @torch.no_grad()
    def fit(cls, latents: Tensor, bits: int = 6, std_range: float = 3.0) -> ScalarQuantizer:
        """A quantizer whose ranges are mean -/+ ``std_range`` standard deviations of each channel of some latents.

        Args:
            latents: ``(..., dim)``; rows that are not finite are left out.
            bits: of one channel.
            std_range: where the outermost bins end, in standard deviations.

        Raises:
            ValueError: for fewer than two finite rows, or a channel that never changes.
        """
        rows = latents.reshape(-1, latents.shape[-1]).double()
        rows = rows[rows.isfinite().all(1)]
        if len(rows) < 2:
            raise ValueError(f"fit needs at least two finite latents; got {len(rows)}")
        deviation, mean = torch.std_mean(rows, 0, correction=0)
        low, high = mean - std_range * deviation, mean + std_range * deviation
        return cls(rows.shape[1], bits, low.tolist(), high.tolist(), std_range)

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents = z.to(search_dtype(z))
        found = self._nearest(latents)
        indices = drop_indices(found, mask)
        statistics = count_codes(indices, self.codebook_sizes)
        return Quantized(drop(self._values(found), mask), indices, {}, statistics, drop(latents, mask))

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            return drop_indices(self._nearest(z.to(search_dtype(z))), mask)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        return self._values(indices.clamp(min=0)).masked_fill(indices < 0, 0)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        check_k(k, math.prod(self.codebook_sizes))
        means = self.means.double().unsqueeze(1)  # (K, 1)
        widths = ((self.high - self.low).double() / (2 * self.std_range)).square()
        parts = []
        for column, width in zip(indices.reshape(-1, self.dim).unbind(1), widths, strict=True):
            found, distances = table_neighbours(means, column, min(k, len(means)))
            parts.append((found.unsqueeze(2), distances * width))
        found, distances = product_neighbours(parts, k)  # (n, k, D), (n, k)
        shape = (*indices.shape[:-1], k)
        return found.view(*shape, self.dim), distances.to(self.means.dtype).view(shape)

    @torch.no_grad()
    def _nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest value in every channel, ``(B, *S, D)``; the lower one at equal distance."""
        low, high, means = (part.to(latents.dtype) for part in (self.low, self.high, self.means))
        deviations = (latents - low) / (high - low) * (2 * self.std_range) - self.std_range
        return torch.bucketize(deviations.contiguous(), (means[1:] + means[:-1]) / 2)

    def _values(self, indices: Tensor) -> Tensor:
        """Latents of valid indices."""
        return (self.means[indices] + self.std_range) / (2 * self.std_range) * (self.high - self.low) + self.low


def normal_bins(bits: int, std_range: float = 3.0) -> tuple[Tensor, Tensor]:
    """Bins that a standard normal fills evenly, cut off at ``std_range``.

    Args:
        bits: 1 to 16.
        std_range: where the outermost bins end.

    Returns:
        Boundaries ``(2^bits + 1,)`` and the mean ``(2^bits,)`` of the normal in each bin, both float64 and ascending.

    Raises:
        ValueError: if a bin would be empty.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must lie between 1 and {MAX_BITS}; got {bits}")
    number = 1 << bits
    # On the CPU also where a model is built on the meta device: the check below needs the numbers.
    below = torch.special.ndtri(torch.arange(number // 2, dtype=torch.float64, device="cpu") / number)  # -inf first
    least = -float(below[1]) if number > 2 else 0.0
    if not least < std_range < math.inf:
        raise ValueError(
            f"std_range must be finite and above {least:.3f}, where the outermost of 2^{bits} bins begins; "
            f"got {std_range}"
        )
    below = below.clamp(min=-std_range)
    # One half mirrored: exactly symmetric, which keeps the values symmetric too.
    boundaries = torch.cat([below, torch.zeros(1, dtype=torch.float64, device="cpu"), -below.flip(0)])
    density = torch.exp(-boundaries.square() / 2) / math.sqrt(2 * math.pi)
    lower, upper = boundaries[: number // 2], boundaries[1 : number // 2 + 1]
    share = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    means = (density[: number // 2] - density[1 : number // 2 + 1]) / share
    return boundaries, torch.cat([means, -means.flip(0)])


def _per_channel(name: str, value: float | Sequence[float], dim: int) -> list[float]:
    values = [float(one) for one in value] if isinstance(value, Sequence) else [float(value)] * dim
    if len(values) != dim or not all(math.isfinite(one) for one in values):
        raise ValueError(f"{name} must be a finite number, or one per channel ({dim}); got {value}")
    return values
