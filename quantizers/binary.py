"""What quantizers with two values per channel have in common: bits, packed indices, Hamming neighbours.

The codebook is every combination of ``low`` and ``high``: it is never listed. The squared distance of two codes is
``(high - low)^2`` times the number of bits that differ.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import torch
from torch import Tensor

from .base import Quantizer, drop_indices
from .bits import MAX_BITS, check_bit_order, pack_bits, unpack_bits
from .neighbours import check_k
from .search import search_dtype

MOST_SIGNIFICANT = "most_significant_first"
NEIGHBOUR_BLOCK = 1 << 22  # candidate codes held at a time


class BinaryQuantizer(Quantizer):
    """Base of the quantizers whose channels take one of two values, chosen by their sign.

    Attributes:
        low: value of a channel whose bit is 0.
        high: value of a channel whose bit is 1.

    Args:
        dim: D, the number of channels and of bits.
        subcode_bits: bits of one index, a divisor of D; all of them if ``None``.
        bit_order: which digit of an index its first channel is, one of ``BIT_ORDERS``.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, D / subcode_bits)``. ``decode`` returns float32, float64 after
        ``.double()``.
    """

    low: float
    high: float

    def __init__(self, dim: int, subcode_bits: int | None, bit_order: str) -> None:
        super().__init__()
        check_bit_order(bit_order)
        bits = dim if subcode_bits is None else subcode_bits
        if dim < 1 or bits < 1 or dim % bits:
            raise ValueError(f"dim must be positive and subcode_bits divide it; got {dim} and {subcode_bits}")
        if bits > MAX_BITS:
            raise ValueError(
                f"an index holds at most {MAX_BITS} bits; got {bits}: set subcode_bits to a divisor of dim, or give "
                f"every group of channels its own quantizer (Grouped)"
            )
        self.dim = dim
        self.codebook_sizes = (1 << bits,) * (dim // bits)
        self.subcode_bits, self.bit_order = bits, bit_order
        self.register_buffer("_precision", torch.empty(0), persistent=False)  # remembers .double()

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        return drop_indices(self._pack(z > 0), mask)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        bits = self._unpack(indices.clamp(min=0))  # (B, *S, G, b)
        codes = self._codes(bits, search_dtype(self._precision)).masked_fill((indices < 0).unsqueeze(-1), 0)
        return codes.flatten(-2)  # (B, *S, D)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        check_k(k, 1 << self.dim)
        flat = indices.reshape(-1, self.num_subcodes)  # (n, G)
        dropped = (flat < 0).any(1, keepdim=True)
        bits = unpack_bits(flat.clamp(min=0), self.subcode_bits, MOST_SIGNIFICANT).flatten(1)  # (n, D)
        found, distances = hamming_neighbours(bits, k)
        found = found.view(len(flat), k, self.num_subcodes, self.subcode_bits)
        codes = pack_bits(found, MOST_SIGNIFICANT).masked_fill(dropped.unsqueeze(2), -1)  # (n, k, G)
        dtype = search_dtype(self._precision)
        squared = (distances.to(dtype) * (self.high - self.low) ** 2).expand(len(flat), k).masked_fill(dropped, 0)
        shape = indices.shape[:-1]
        return codes.view(*shape, k, -1), squared.reshape(*shape, k)

    def _codes(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of bits, any shape."""
        values = torch.full_like(bits, self.low, dtype=dtype)
        return values.masked_fill_(bits, self.high)

    def _pack(self, bits: Tensor) -> Tensor:
        """Bool ``(..., D)`` -> indices ``(..., G)``."""
        return pack_bits(bits.unflatten(-1, (self.num_subcodes, self.subcode_bits)), self.bit_order)

    def _unpack(self, indices: Tensor) -> Tensor:
        """Indices ``(..., G)`` -> bool ``(..., G, b)``."""
        return unpack_bits(indices, self.subcode_bits, self.bit_order)


def hamming_neighbours(bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` binary codes with the fewest differing bits, equal distances in the order of their value.

    Codes at distance r differ by one of the ``comb(D, r)`` masks with r bits; shells of masks are added until there are
    ``k`` codes, so the cost depends on ``k`` and not on 2^D.

    Args:
        bits: bool ``(n, D)``, the first channel the most significant; any D.
        k: between 1 and 2^D.

    Returns:
        Bits ``(n, k, D)`` and the number of differing bits ``(k,)``, the same for every code.
    """
    dim = bits.shape[1]
    words = [pack_bits(part, MOST_SIGNIFICANT) for part in bits.split(MAX_BITS, 1)]  # W x (n,)
    found: list[list[Tensor]] = []
    distances: list[int] = []
    for radius in range(dim + 1):
        missing = k - len(distances)
        if missing == 0:
            break
        found.append(_shell(words, _masks(dim, radius, bits.device), missing))
        distances += [radius] * min(missing, comb(dim, radius))
    sizes = [part.shape[1] for part in bits.split(MAX_BITS, 1)]
    columns = [torch.cat(shells, 1) for shells in zip(*found, strict=True)]  # W x (n, k)
    unpacked = [unpack_bits(column, size, MOST_SIGNIFICANT) for column, size in zip(columns, sizes, strict=True)]
    return torch.cat(unpacked, 2), torch.tensor(distances, device=bits.device)


def _masks(dim: int, radius: int, device: torch.device) -> list[Tensor]:
    """Words ``(comb(dim, radius),)`` of all masks with ``radius`` bits."""
    chosen = torch.tensor(list(combinations(range(dim), radius)), dtype=torch.int64)  # (C, radius)
    masks = torch.zeros(len(chosen), dim, dtype=torch.bool).scatter_(1, chosen.view(len(chosen), -1), True)
    return [pack_bits(part, MOST_SIGNIFICANT).to(device) for part in masks.split(MAX_BITS, 1)]


def _shell(words: list[Tensor], masks: list[Tensor], limit: int) -> list[Tensor]:
    """Words ``(n, min(limit, C))`` of the codes that differ from each code by one of C masks, in order of value."""
    kept: list[list[Tensor]] = []
    rows = max(1, NEIGHBOUR_BLOCK // len(masks[0]))
    for start in range(0, max(1, len(words[0])), rows):
        codes = [word[start : start + rows].unsqueeze(1) ^ mask for word, mask in zip(words, masks, strict=True)]
        for key in reversed(range(len(codes))):  # the first word decides, so it is sorted last
            order = codes[key].sort(dim=1, stable=True).indices
            codes = [code.gather(1, order) for code in codes]
        kept.append([code[:, :limit] for code in codes])
    return [torch.cat(parts) for parts in zip(*kept, strict=True)]
