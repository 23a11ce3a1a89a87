"""Quantization in another space than that of the latents: behind a projection, or with its index cut into sub-codes.

A projection to few dimensions before the search, and back after it, keeps far more codes alive (the factorized codes of
ViT-VQGAN, arXiv:2110.04627); bits of a binary code get a learned vector each that way (Instella-T2I, arXiv:2506.21022:
``Factorized(BernoulliQuantizer(64), dim, out_bias=False)``).

A large codebook is a large softmax for the model that predicts the tokens. Open-MAGVIT2 (arXiv:2409.04410) predicts the
18 bits of an index as 6 and 12: ``Factorized(LookupFreeQuantizer(18), subcode_sizes=[64, 4096])``. That renames the
codes and changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import IndexBlock, Quantized, Quantizer, count_codes, drop
from .bits import BIT_ORDERS
from .radix import pack_digits, unpack_digits
from .search import search_dtype


class Factorized(Quantizer):
    """A quantizer between two linear layers, or with one index presented as several.

    The inner quantizer's estimator acts between the projections, so task gradients reach both of them. In a container
    that estimates by itself (residual quantization) they reach the output projection only, and the latents directly;
    the input projection then learns from the inner quantizer's losses. Losses are the inner quantizer's, in its space;
    so are the distances of :meth:`neighbour_distances`.

    Projections compute in float32 (float64 weights: float64), also under autocast.

    Args:
        quantizer: quantizes the projected latents.
        dim: D, the size of the latents; ``None`` for no projections.
        in_bias: whether the input projection has a bias.
        out_bias: whether the output projection has a bias.
        project_out: ``False`` returns the inner codes as they are, which must then be of size ``dim``.
        subcode_sizes: sizes of the sub-codes that the inner quantizer's single index is presented as.
        subcode_order: whether the first sub-code counts the index's smallest steps, ``least_significant_first``
            (Open-MAGVIT2), or the largest, ``most_significant_first``.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, G)``, G the inner quantizer's or ``len(subcode_sizes)``.

    Raises:
        ValueError: for an argument that changes nothing or does not fit the inner quantizer.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        dim: int | None = None,
        in_bias: bool = True,
        out_bias: bool = True,
        project_out: bool = True,
        subcode_sizes: Sequence[int] | None = None,
        subcode_order: str = "least_significant_first",
    ) -> None:
        super().__init__()
        _check_arguments(quantizer, dim, project_out, subcode_sizes, subcode_order)
        self.quantizer = quantizer
        self.dim = quantizer.dim if dim is None else dim
        self.project_in = None if dim is None else nn.Linear(dim, quantizer.dim, bias=in_bias)
        self.project_out = nn.Linear(quantizer.dim, dim, bias=out_bias) if dim is not None and project_out else None
        self.subcode_sizes = None if subcode_sizes is None else tuple(subcode_sizes)
        self.subcode_order = subcode_order
        self.codebook_sizes = self.subcode_sizes or tuple(quantizer.codebook_sizes)
        self.default_loss_weights = dict(quantizer.default_loss_weights)

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        inside = drop(_project(self.project_in, z), mask)  # (B, *S, d); a bias would fill dropped positions
        inner = self.quantizer.assign(inside, mask, generator=generator)
        indices, statistics = inner.indices, dict(inner.statistics)
        if self.subcode_sizes is not None:
            indices = self._unpack(indices)
            statistics.pop("counts", None)
            finite = inside.detach().isfinite().all(-1)
            statistics.update(count_codes(indices, self.codebook_sizes, finite))
        latents = inner.latents if self.project_in is None else z.to(search_dtype(z))
        # The inner codes have no gradient to the latents, as agreed, but may have one to parameters of their own.
        codes = drop(_project(self.project_out, inner.quantized), mask)
        return Quantized(codes, indices, dict(inner.losses), statistics, latents, (inner,))

    def estimate(self, assigned: Quantized) -> Tensor:
        return _project(self.project_out, self.quantizer.estimate(assigned.parts[0]))

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            indices = self.quantizer.encode(drop(_project(self.project_in, drop(z, mask)), mask), mask)
        return indices if self.subcode_sizes is None else self._unpack(indices)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        with torch.autocast(indices.device.type, enabled=False):
            codes = _project(self.project_out, self.quantizer.decode(self._pack(indices)))
        if self.project_out is not None and codes.shape[:-1] == indices.shape[:-1]:
            codes = drop(codes, (indices >= 0).any(-1))  # not the bias
        return codes

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        found, distances = self.quantizer.neighbour_distances(self._pack(indices), k)
        return (found if self.subcode_sizes is None else self._unpack(found)), distances

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        blocks = self.quantizer.index_blocks(shape)
        if self.subcode_sizes is None:
            return blocks
        return tuple(IndexBlock(block.name, block.shape, (0, self.num_subcodes)) for block in blocks)

    def check_indices(self, indices: Tensor) -> None:
        """Raise if ``indices`` is not what the inner quantizer takes, which may be a prefix of residual levels."""
        if self.subcode_sizes is None:
            self.quantizer.check_indices(indices)
        else:
            super().check_indices(indices)

    def _unpack(self, indices: Tensor) -> Tensor:
        """``(..., 1)`` -> ``(..., G)``."""
        return unpack_digits(indices.squeeze(-1), self.subcode_sizes, self.subcode_order)

    def _pack(self, indices: Tensor) -> Tensor:
        """The inner quantizer's indices of ``(..., G)``; a token with a sub-code of ``-1`` is a dropped one."""
        if self.subcode_sizes is None:
            return indices
        dropped = (indices < 0).any(-1, keepdim=True)
        packed = pack_digits(indices.clamp(min=0), self.subcode_sizes, self.subcode_order)
        return packed.unsqueeze(-1).masked_fill(dropped, -1)


def _project(layer: nn.Linear | None, values: Tensor) -> Tensor:
    if layer is None:
        return values
    dtype = search_dtype(layer.weight)
    # Always as contiguous rows: other layouts take other kernels, and decode must give the bits of forward.
    rows = values.reshape(-1, values.shape[-1]).to(dtype).contiguous()
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(rows, layer.weight.to(dtype), bias).view(*values.shape[:-1], -1)


def _check_arguments(
    quantizer: Quantizer, dim: int | None, project_out: bool, subcode_sizes: Sequence[int] | None, subcode_order: str
) -> None:
    if dim is None and subcode_sizes is None:
        raise ValueError("Factorized needs dim (projections) or subcode_sizes; with neither it would change nothing")
    if dim is not None and dim < 1:
        raise ValueError(f"dim must be positive; got {dim}")
    if not project_out and dim is not None and dim != quantizer.dim:
        raise ValueError(
            f"project_out=False returns codes of size {quantizer.dim}, but a quantizer returns what is as large as its "
            f"latents, here dim={dim}; project before the quantizer instead"
        )
    if subcode_order not in BIT_ORDERS:
        raise ValueError(f"subcode_order must be one of {BIT_ORDERS}; got {subcode_order!r}")
    if subcode_sizes is None:
        return
    sizes = tuple(quantizer.codebook_sizes)
    if len(sizes) != 1:
        raise ValueError(f"subcode_sizes needs a quantizer with one index per token; this one has {len(sizes)}")
    if any(size < 1 for size in subcode_sizes) or math.prod(subcode_sizes) != sizes[0]:
        raise ValueError(f"subcode_sizes must multiply to the {sizes[0]} codes; got {list(subcode_sizes)}")
