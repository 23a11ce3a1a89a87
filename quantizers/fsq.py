"""Finite scalar quantization (FSQ, arXiv:2309.15505): every channel rounds to a few evenly spaced levels.

A latent has one channel per entry of ``levels``. Each is bounded with a tanh and rounded; the codebook is the product
of the channels' levels, never stored, and used evenly without any loss. The published sets are ``[8, 6, 5]`` (240
codes, about 2^8), ``[8, 5, 5, 5]`` (2^10), ``[7, 5, 5, 5, 5]`` (2^12), ``[8, 8, 8, 6, 5]`` (2^14) and
``[8, 8, 8, 5, 5, 5]`` (2^16, also FlexTok and Cosmos-DI).

An index is the mixed-radix number of the level numbers, first channel least significant, as in lucidrains' code,
FlexTok and Cosmos. The gradient passes straight through the rounding only, so the tanh keeps its own.

Two published ways to make a decoder robust are options: ``bypass`` leaves a share of the samples un-rounded, and
``corrupt`` replaces tokens by random codes, both as in FlexTok (arXiv:2502.13967).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .base import Quantized, Quantizer, count_codes, drop, drop_indices
from .draws import draw_integers, draw_uniform
from .neighbours import product_neighbours, table_neighbours
from .radix import PACKED_BITS, pack_digits, unpack_digits
from .search import search_dtype

MAX_LEVELS = 1 << 16  # float32 latents do not resolve many more


class FiniteScalarQuantizer(Quantizer):
    """Rounds every channel to one of its levels.

    The default form centres the levels on zero: ``round(tanh(z + shift) * reach - offset) / (L // 2)`` with
    ``reach = (L - 1) * (1 + margin) / 2``, ``offset`` 1/2 for even L, and a shift that maps ``z = 0`` to 0. Its values
    are -1, ..., 1 for odd L and -1, ..., 1 - 2 / L for even L. The symmetric form (arXiv:2411.19842), ``tanh(z)``
    rounded to L evenly spaced values from -1 to 1, has no value 0 for even L; two levels exist in this form only.

    Args:
        levels: number of levels of each channel, 2 to 65 536.
        symmetric: the symmetric form.
        bound: what bounds a latent in the symmetric form: ``"tanh"``, or ``"clamp"`` to [-1, 1], the choice of residual
            FSQ, whose stages see latents that are bounded already.
        scale: length of the unit of each channel, or of all: latents are divided by it, codes multiplied.
        margin: how far the bounded latent passes the outermost levels, relative to their distance, so that they can be
            reached; ``-1e-3`` is the form in the paper's own code.
        bypass: in training, share of the samples that stay un-rounded (FlexTok ``drop_quant_p``). Their indices are
            those of the rounded latents.
        corrupt: in training, probability per forward call that tokens are replaced by random codes. A replaced token's
            index is that of the random code, and no gradient passes through it.
        corrupt_share: smallest and largest share of the tokens that such a call replaces, uniformly drawn.

    Shape:
        latents ``(B, *S, len(levels))``, indices ``(B, *S, 1)``. Computes in float32 (float64 latents: float64); codes
        are float32, or float64 after ``.double()``. An infinite latent takes an outermost level; NaN takes a valid
        level too, and the gradient that reaches it is NaN.

    Raises:
        ValueError: for more than 2^62 codes, or levels that the form cannot express.
    """

    float32_buffers = ("half_width", "unit")

    def __init__(
        self,
        levels: Sequence[int],
        symmetric: bool = False,
        bound: Literal["tanh", "clamp"] = "tanh",
        scale: float | Sequence[float] = 1.0,
        margin: float = 1e-3,
        bypass: float = 0.0,
        corrupt: float = 0.0,
        corrupt_share: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        levels = tuple(int(number) for number in levels)
        scales = tuple(scale) if isinstance(scale, Sequence) else (scale,) * len(levels)
        _check_levels(levels, symmetric, bound, margin)
        if len(scales) != len(levels) or not all(0 < unit < math.inf for unit in scales):
            raise ValueError(f"scale must be one positive number, or one per channel ({len(levels)}); got {scale}")
        low, high = corrupt_share
        for name, value in (("bypass", bypass), ("corrupt", corrupt), ("corrupt_share", low), ("corrupt_share", high)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value}")
        if low > high:
            raise ValueError(f"corrupt_share must be (smallest, largest); got {corrupt_share}")
        self.dim = len(levels)
        self.codebook_sizes = (math.prod(levels),)
        self.levels = levels
        self.symmetric = symmetric
        self.bound = bound
        self.scales = scales
        self.margin = margin
        self.bypass = bypass
        self.corrupt = corrupt
        self.corrupt_share = (low, high)
        # Distance of neighbouring levels is 1 / half_width. Not in the state dict: published checkpoints have no entry.
        half_width = [(number - 1) / 2 if symmetric else number // 2 for number in levels]
        self.register_buffer("level_counts", torch.tensor(levels), persistent=False)
        self.register_buffer("half_width", torch.tensor(half_width, dtype=torch.float32), persistent=False)
        self.register_buffer("unit", torch.tensor(scales, dtype=torch.float32), persistent=False)

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents, positions = self._bounded(z)  # (B, *S, D) each
        digits, codes = self._round(positions)
        indices = pack_digits(digits, self.levels).unsqueeze(-1)  # (B, *S, 1)
        if self.training and self.bypass:
            samples = draw_uniform(z.shape[:1], z.device, generator) < self.bypass
            samples = samples.view(-1, *(1,) * (z.ndim - 1))
            codes = torch.where(samples, latents.detach().to(codes.dtype), codes)
        if self.training and self.corrupt:
            replaced, random_indices = self._corruption(indices, generator)
            random_codes = self.decode(random_indices)
            indices = torch.where(replaced, random_indices, indices)
            codes = torch.where(replaced, random_codes, codes)
            latents = torch.where(replaced, random_codes.to(latents.dtype), latents)
        indices = drop_indices(indices, mask)
        return Quantized(drop(codes, mask), indices, {}, count_codes(indices, self.codebook_sizes), drop(latents, mask))

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            digits, _ = self._round(self._bounded(z)[1])
        return drop_indices(pack_digits(digits, self.levels).unsqueeze(-1), mask)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        digits = unpack_digits(indices.squeeze(-1), self.levels)  # (B, *S, D)
        return self._codes(digits - self.half_width).masked_fill(indices < 0, 0)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        digits = unpack_digits(indices.reshape(-1), self.levels)  # (n, D)
        parts = []
        # The most significant channel first, so that equal distances come in the order of the packed index.
        for number, weight, column in reversed(list(zip(self.levels, self._weights(), digits.unbind(1), strict=True))):
            grid = torch.arange(number, dtype=torch.float64, device=indices.device).unsqueeze(1)
            nearest, distances = table_neighbours(grid, column, min(k, number))
            parts.append((nearest.unsqueeze(2), distances * weight))
        combined, distances = product_neighbours(parts, k)  # (n, k, D), (n, k)
        found = pack_digits(combined.flip(-1), self.levels)
        shape = (*indices.shape[:-1], k)
        unit = (self._step(0) * self.scales[0]) ** 2 / self._weights()[0]
        return found.view(*shape, 1), (distances * unit).to(self.half_width.dtype).view(shape)

    def _bounded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Bounded latents with their gradient, and (without) where they lie between the levels, 0 to L - 1."""
        z = z.to(search_dtype(z))
        if self._scaled:
            z = z / self.unit.to(z.dtype)
        half_width = self.half_width.to(z.dtype)
        if self.symmetric:
            latents = torch.tanh(z) if self.bound == "tanh" else z.clamp(-1, 1)
            positions = (latents.detach() + 1).mul_(half_width)
        else:
            reach = (self.level_counts - 1).to(z.dtype) * ((1 + self.margin) / 2)
            offset = (1 - self.level_counts % 2).to(z.dtype) / 2
            bounded = torch.tanh(z + torch.atanh(offset / reach))
            latents = torch.addcmul(-offset / half_width, bounded, reach / half_width)
            positions = torch.addcmul(-offset, bounded.detach(), reach)
        return latents * self.unit.to(z.dtype) if self._scaled else latents, positions

    @torch.no_grad()
    def _round(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Level numbers (int64) and codes of positions ``(B, *S, D)``, which it overwrites."""
        if self.symmetric:
            numbers = positions.add_(0.5).floor_().nan_to_num_()
            return numbers.to(torch.int64), self._codes(numbers.sub_(self.half_width))
        centred = positions.round_().nan_to_num_().add_(0.0)  # no negative zero: decode has none
        return (centred + self.half_width).to(torch.int64), self._codes(centred)

    def _codes(self, centred: Tensor) -> Tensor:
        """Codes, in the codes' dtype, of level numbers counted from the centre; forward and decode share it."""
        codes = centred.to(self.half_width.dtype) / self.half_width
        return codes * self.unit if self._scaled else codes

    def _corruption(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Which tokens to replace, bool ``(B, *S, 1)``, and random indices ``(B, *S, 1)``."""
        low, high = self.corrupt_share
        called, share = draw_uniform((2,), indices.device, generator).unbind(0)
        share = torch.where(called < self.corrupt, low + (high - low) * share, 0)
        replaced = draw_uniform(indices.shape, indices.device, generator) < share
        random_indices = draw_integers(self.codebook_sizes[0], indices.shape, indices.device, generator)
        return replaced, random_indices

    @property
    def _scaled(self) -> bool:
        return any(unit != 1 for unit in self.scales)

    def _step(self, channel: int) -> float:
        """Distance of neighbouring levels of a channel, before the scale."""
        number = self.levels[channel]
        return 2 / (number - 1) if self.symmetric else 1 / (number // 2)

    def _weights(self) -> list[float]:
        """Relative weights of squared level differences: integers without a scale, so that sums and ties are exact."""
        counts = [number - 1 if self.symmetric else number // 2 for number in self.levels]
        common = math.lcm(*counts)
        return [(common // count * unit / self.scales[0]) ** 2 for count, unit in zip(counts, self.scales, strict=True)]


def _check_levels(levels: tuple[int, ...], symmetric: bool, bound: str, margin: float) -> None:
    """Raise ``ValueError`` for levels that the chosen form cannot express."""
    if not levels or any(not 2 <= number <= MAX_LEVELS for number in levels):
        raise ValueError(f"levels must be one or more integers from 2 to {MAX_LEVELS}; got {list(levels)}")
    if math.prod(levels) > 1 << PACKED_BITS:
        raise ValueError(
            f"levels {list(levels)} make {math.log2(math.prod(levels)):.1f} bits, more than the {PACKED_BITS} that one "
            f"index holds: split the channels over several quantizers"
        )
    if bound not in ("tanh", "clamp"):
        raise ValueError(f"bound must be 'tanh' or 'clamp'; got {bound!r}")
    if symmetric:
        return
    if bound != "tanh":
        raise ValueError("bound='clamp' needs symmetric=True: the centred form has its shift inside the tanh")
    if 2 in levels:
        raise ValueError(
            f"levels {list(levels)}: two levels cannot be centred (they would be -1 and 0, with 0 at the end of the "
            f"tanh); use symmetric=True"
        )
    if not abs(margin) * (max(levels) - 1) < 1:
        raise ValueError(
            f"margin {margin} is too large for {max(levels)} levels: it must stay below half a level, |margin| * "
            f"(levels - 1) < 1; use a smaller margin or symmetric=True"
        )
