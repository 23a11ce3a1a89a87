"""The codebooks behind a tokenizer's indices, one by one, and the codes nearest to a code in each.

A token may carry sub-codes of several codebooks: residual levels, groups, branches, bits. ``neighbours`` of a quantizer
takes them as one point of a product space; here every codebook is looked at for itself, so that what is said about
codebooks of a certain size holds for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...quantizers.base import Quantizer
from ...quantizers.binary import BinaryQuantizer, hamming_neighbours
from ...quantizers.bits import pack_bits, unpack_bits
from ...quantizers.factorized import Factorized
from ...quantizers.fsq import FiniteScalarQuantizer
from ...quantizers.grouped import Grouped
from ...quantizers.multi_scale import MultiScaleResidual
from ...quantizers.neighbours import table_neighbours
from ...quantizers.perturbation import LatentPerturbation, neighbour_at
from ...quantizers.product import Product
from ...quantizers.residual import Residual
from ...quantizers.scalar import ScalarQuantizer
from ...tokenizers.base import Tokenizer
from ..metric import MetricUnavailable

TABLE_LIMIT = 1 << 26  # entries of a table of neighbours that is kept, 4 bytes each
_BLOCK = 1 << 22  # neighbours looked up at a time


class Codebook:
    """One codebook, and its codes by their distance from each other.

    Args:
        size: K, the number of codes.
        width: g, the number of indices that name a code.
        nearest: codes ``(n, g)`` and k -> the k nearest codes of each ``(n, k, g)``, the code itself first.
        digits: number of values of each digit that an index is packed from, of a binary or a lattice code.
    """

    def __init__(
        self, size: int, width: int, nearest: Callable[[Tensor, int], Tensor], digits: tuple[int, ...] = ()
    ) -> None:
        self.size = size
        self.width = width
        self.digits = digits
        self._nearest = nearest
        self._table: Tensor | None = None

    def at(self, codes: Tensor, ranks: Tensor, k: int) -> Tensor:
        """The codes at certain ranks among the nearest of given codes.

        All neighbours of all codes are looked up once and kept if their table is small enough, else those of the given
        codes are, a block at a time.

        Args:
            codes: ``(n, g)``; ``-1`` stays.
            ranks: int64 ``(n, R)`` below ``k``; 0 is the code itself.
            k: neighbours to look among, at most K.

        Returns:
            ``(n, R, g)``.
        """
        if self.width > 1 or self.size * k > TABLE_LIMIT:
            found = self._looked_up(codes, ranks, k)
        else:
            if self._table is None or self._table.shape[1] < k or self._table.device != codes.device:
                self._table = self._make_table(k, codes.device)
            found = self._table[codes.clamp(min=0), ranks].long().unsqueeze(-1)  # (n, R, 1)
        return torch.where(codes.unsqueeze(1) < 0, codes.unsqueeze(1), found)

    def _make_table(self, k: int, device: torch.device) -> Tensor:
        """``(K, k)`` int32."""
        table = torch.empty(self.size, k, dtype=torch.int32, device=device)
        for rows in torch.arange(self.size, device=device).split(max(1, _BLOCK // k)):
            table[rows] = self._nearest(rows.unsqueeze(1), k).squeeze(-1).int()
        return table

    def _looked_up(self, codes: Tensor, ranks: Tensor, k: int) -> Tensor:
        blocks = zip(codes.split(step := max(1, _BLOCK // k)), ranks.split(step), strict=True)
        return torch.cat([ranked(self._nearest(own, k), rank) for own, rank in blocks])


def ranked(near: Tensor, ranks: Tensor) -> Tensor:
    """Neighbours ``(n, k, g)`` at ranks ``(n, R)`` -> ``(n, R, g)``."""
    return torch.stack([neighbour_at(near, rank) for rank in ranks.unbind(1)], 1)


def codebooks(quantizer: Quantizer) -> list[list[Codebook]]:
    """The codebooks of each of a quantizer's index blocks, in the order of their sub-codes.

    Levels, groups, branches and scales count one by one, also channels of scalar quantization and the indices that a
    binary code is written as. One index that :class:`~vistok.quantizers.factorized.Factorized` presents as several
    keeps its one codebook. A codebook that serves several times is one object.

    Args:
        quantizer: of a tokenizer.

    Raises:
        MetricUnavailable: for a quantizer with several indices per token and codebooks that are not known here.
    """
    known: dict[int, list[Codebook]] = {}

    def walk(part: Quantizer) -> list[list[Codebook]]:
        if isinstance(part, LatentPerturbation) or (isinstance(part, Factorized) and part.subcode_sizes is None):
            return walk(part.quantizer)
        if isinstance(part, Product) and part.shapes is not None:
            return [block for branch in part.branches for block in walk(branch)]
        if isinstance(part, MultiScaleResidual):
            scales = list(part.quantizers) * (len(part.scales) if len(part.quantizers) == 1 else 1)
            return [block for scale in scales for block in walk(scale)]
        if members := _members(part):
            return [sum(blocks, []) for blocks in zip(*map(walk, members), strict=True)]
        if id(part) not in known:
            known[id(part)] = _own_codebooks(part)
        return [known[id(part)]]

    return walk(quantizer)


def code_digits(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The digits that every index of a tokenizer is packed from, least significant first; empty if there are none.

    Bits of lookup-free and spherical quantization, channels of finite scalar quantization. The order is that of
    ``pack_digits``; bits may stand in either order.
    """
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, Quantizer):
        return ()
    try:
        found = {book.digits for block in codebooks(quantizer) for book in block}
    except MetricUnavailable:
        return ()
    return found.pop() if len(found) == 1 else ()


def _members(quantizer: Quantizer) -> Sequence[Quantizer]:
    """Quantizers whose sub-codes stand side by side in a token."""
    if isinstance(quantizer, Residual):
        return list(quantizer.quantizers) * (quantizer.depth if quantizer.shared else 1)
    if isinstance(quantizer, Grouped):
        return list(quantizer.quantizers) * (quantizer.groups if quantizer.shared else 1)
    return list(quantizer.branches) if isinstance(quantizer, Product) else ()


def _own_codebooks(quantizer: Quantizer) -> list[Codebook]:
    """The codebooks of a quantizer that holds no others."""
    sizes = quantizer.codebook_sizes
    digits = ()
    if isinstance(quantizer, BinaryQuantizer):
        digits = (2,) * quantizer.subcode_bits
    elif isinstance(quantizer, FiniteScalarQuantizer):
        digits = quantizer.levels
    if len(sizes) == 1 or isinstance(quantizer, Factorized):
        return [Codebook(math.prod(sizes), len(sizes), quantizer.neighbours, digits)]
    if isinstance(quantizer, BinaryQuantizer):
        nearest = _hamming(quantizer.subcode_bits)
    elif isinstance(quantizer, ScalarQuantizer):
        nearest = _scalar(quantizer)
    else:
        raise MetricUnavailable(
            f"{type(quantizer).__name__} writes {len(sizes)} indices per token whose codebooks cannot be told apart"
        )
    return [Codebook(sizes[0], 1, nearest, digits)] * len(sizes)  # all alike


def _hamming(bits: int) -> Callable[[Tensor, int], Tensor]:
    order = "most_significant_first"  # any order will do: distances count bits

    def nearest(codes: Tensor, k: int) -> Tensor:
        found, _ = hamming_neighbours(unpack_bits(codes.squeeze(1).clamp(min=0), bits, order), k)  # (n, k, bits)
        return pack_bits(found, order).unsqueeze(-1)

    return nearest


def _scalar(quantizer: ScalarQuantizer) -> Callable[[Tensor, int], Tensor]:
    # Every channel has the same values, up to a factor.
    return lambda codes, k: table_neighbours(quantizer.means.unsqueeze(1), codes.squeeze(1), k)[0].unsqueeze(-1)
