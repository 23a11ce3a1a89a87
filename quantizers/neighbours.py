"""The codes nearest to a code: in a table, and in a product of several tables.

pFID and latent perturbation (RobustTok, arXiv:2503.08354) replace a token by one of its nearest codes. Implicit
codebooks (binary, lattice) and several sub-codes per token are product sets, too large to list; their nearest
combinations follow from the nearest entries of each factor.

Everything here may run inside a training step: shapes follow from shapes, nothing is read back from the device, and
the only loop over blocks is an operator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .operators import operator
from .search import full_precision, search_dtype

TABLE_BLOCK = 1 << 22  # distances held at a time


@torch.no_grad()
def table_neighbours(codebook: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of a codebook nearest to given rows, the row itself first, ties by the lowest index.

    Args:
        codebook: ``(K, D)``.
        indices: ``(n,)`` int64; ``-1`` has neighbours ``-1`` at distance 0.
        k: between 1 and K.

    Returns:
        Indices ``(n, k)`` and squared distances ``(n, k)``.

    Raises:
        ValueError: for ``k`` out of range.
    """
    check_k(k, len(codebook))
    dropped, where = (indices < 0).unsqueeze(1), indices.clamp(min=0)
    if len(indices) < len(codebook):
        found, distances = nearest_rows(codebook[where], codebook, k, own=where)
    else:  # as many tokens as rows: every row once
        found, distances = nearest_rows(codebook, codebook, k, own=torch.arange(len(codebook), device=codebook.device))
        found, distances = found[where], distances[where]
    return found.masked_fill(dropped, -1), distances.masked_fill(dropped, 0)


@torch.no_grad()
def nearest_rows(queries: Tensor, codebook: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of a codebook nearest to any vectors, nearest first, ties by the lowest index.

    Distances come from differences, not from the expanded square: equal rows are at equal distances, and a row is at
    distance 0 from itself.

    Args:
        queries: ``(n, D)``. One that is not finite gets valid rows.
        codebook: ``(K, D)``.
        k: between 1 and K.
        own: ``(n,)`` int64, a row that goes first whatever its distance.

    Returns:
        Indices ``(n, k)`` int64 and squared distances ``(n, k)`` in the search's dtype.

    Raises:
        ValueError: for ``k`` out of range.
    """
    check_k(k, len(codebook))
    return _nearest_rows(queries.detach(), codebook.detach(), k, own)


@operator("nearest_rows")
def _nearest_rows(queries: Tensor, codebook: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = search_dtype(queries)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    distances = torch.empty(len(queries), k, dtype=dtype, device=queries.device)
    with torch.no_grad(), full_precision(queries.device):
        queries, codebook = queries.to(dtype), codebook.to(dtype)
        step = max(1, TABLE_BLOCK // len(codebook))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            block = torch.cdist(queries[rows], codebook, compute_mode="donot_use_mm_for_euclid_dist")  # (m, K)
            block.nan_to_num_(nan=torch.inf, posinf=torch.inf)
            if own is not None:
                block.scatter_(1, own[rows].unsqueeze(1), -1)  # below all: a duplicate cannot go first
            found[rows], distances[rows] = _smallest(block, k)
        return found, distances.clamp_(min=0).square_()


@_nearest_rows.register_fake
def _(queries: Tensor, codebook: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=search_dtype(queries))


def _smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns and values of the ``k`` smallest of each row, in the order of (value, column).

    ``topk`` alone keeps an arbitrary choice of the values equal to the last one, in arbitrary order.
    """
    limit = values.topk(k, largest=False).values[:, -1:]
    below, level = values < limit, values == limit
    room = k - below.sum(1, keepdim=True)
    taken = below | (level & (level.cumsum(1) <= room))  # exactly k per row
    columns = torch.arange(values.shape[1], device=values.device)
    columns = torch.where(taken, columns, values.shape[1]).topk(k, largest=False).values  # ascending
    ordered = values.gather(1, columns).sort(dim=1, stable=True)
    return columns.gather(1, ordered.indices), ordered.values


@torch.no_grad()
def product_neighbours(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest combinations of the nearest entries of several factors; squared distances add up.

    Exact as long as every factor brings its ``min(k, its size)`` nearest entries: whatever comes before an entry in its
    factor also comes before it in a combination, so a combination of the i-th and the j-th entry is preceded by
    i x j - 1 others and counts only while i x j <= k. That is also why some ``k log k`` combinations are looked at, not
    ``k^2``.

    Args:
        parts: per factor indices ``(n, k_i, G_i)``, nearest first with the code itself leading, and squared distances
            ``(n, k_i)``; the most significant factor first. Distances count to float32 precision: their sums are then
            exact in float64, so that combinations at equal distance are equal whatever the order of the terms.
        k: at most the product of the ``k_i``.

    Returns:
        Indices ``(n, k, sum(G_i))``, nearest first with the code itself leading, equal distances in lexicographic order
        of the indices, and squared distances ``(n, k)``.

    Raises:
        ValueError: for ``k`` out of range.
    """
    dtype = parts[0][1].dtype
    indices, distances, rank = _in_order(*parts[0])
    for part in parts[1:]:
        more, further, more_rank = _in_order(*part)
        left, right = _leading_pairs(indices.shape[1], more.shape[1], k, indices.device)  # (M,) each
        sums = distances[:, left] + further[:, right]  # (n, M)
        key = rank[:, left] * more.shape[1] + more_rank[:, right]
        order = _sorted_by(sums, key)[:, :k]
        distances, key = sums.gather(1, order), key.gather(1, order)
        rank = key.argsort(dim=1).argsort(dim=1)
        indices = torch.cat([_take(indices, left[order]), _take(more, right[order])], 2)
    check_k(k, distances.shape[1])
    # The code itself goes to the front, from wherever it stands among its duplicates.
    own = torch.cat([found[:, :1] for found, _ in parts], 2)
    again = (indices == own).all(2)
    order = torch.cat([torch.zeros_like(again[:, :1]), again], 1).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    indices, distances = torch.cat([own, indices], 1), torch.cat([torch.zeros_like(distances[:, :1]), distances], 1)
    return _take(indices, order), distances.gather(1, order).to(dtype)


def _in_order(indices: Tensor, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A factor in the order of (distance, index), its code not leading, with the lexicographic rank of every entry."""
    rank, distances = _lexicographic_rank(indices), distances.float().double()
    order = _sorted_by(distances, rank)
    return _take(indices, order), distances.gather(1, order), rank.gather(1, order)


def _sorted_by(first: Tensor, second: Tensor) -> Tensor:
    """``(n, k)`` places in the order of two keys."""
    order = second.argsort(dim=1, stable=True)
    return order.gather(1, first.gather(1, order).argsort(dim=1, stable=True))


def _leading_pairs(first: int, second: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All ``(i, j)``, i < first, j < second, with ``(i + 1) * (j + 1) <= k``, in lexicographic order."""
    first = min(first, k)
    total = sum(min(second, k // (i + 1)) for i in range(first))
    rows = torch.arange(first, device=device)
    lengths = (k // (rows + 1)).clamp(max=second)
    left = rows.repeat_interleave(lengths, output_size=total)
    return left, torch.arange(total, device=device) - (lengths.cumsum(0) - lengths)[left]


def _lexicographic_rank(indices: Tensor) -> Tensor:
    """``(n, k, G)`` -> ``(n, k)``: the place of every row of indices among the k in lexicographic order."""
    order = indices[:, :, -1].argsort(dim=1, stable=True)
    for column in indices.unbind(2)[-2::-1]:
        order = order.gather(1, column.gather(1, order).argsort(dim=1, stable=True))
    return order.argsort(1)


def check_k(k: int, available: int) -> None:
    """Raise ``ValueError`` unless ``1 <= k <= available``."""
    if not 1 <= k <= available:
        raise ValueError(f"k must lie between 1 and the number of codes, {available}; got {k}")


def _take(indices: Tensor, chosen: Tensor) -> Tensor:
    """``(n, k, G)``, ``(n, m)`` -> ``(n, m, G)``."""
    return indices.gather(1, chosen.unsqueeze(2).expand(-1, -1, indices.shape[2]))
