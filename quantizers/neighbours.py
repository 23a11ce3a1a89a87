"""The codes nearest to a code: in a table, and in a product of several tables.

pFID and latent perturbation (RobustTok, arXiv:2503.08354) replace a token by one of its nearest codes. Implicit
codebooks (binary, lattice) and several sub-codes per token are product sets, too large to list; their nearest
combinations follow from the nearest entries of each factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .search import full_precision

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
    with full_precision(codebook.device):
        wanted, where = indices.clamp(min=0).unique(return_inverse=True)
        found, distances = [], []
        for block in wanted.split(max(1, TABLE_BLOCK // len(codebook))):
            all_distances = torch.cdist(
                codebook[block], codebook, compute_mode="donot_use_mm_for_euclid_dist"
            )  # (m, K)
            own = torch.arange(len(block), device=block.device)
            all_distances[own, block] = -1  # a duplicate cannot go first
            # The k smallest, then in the order of (distance, index): topk alone leaves ties in any order.
            limit = all_distances.topk(k, largest=False).values[:, -1:]
            order = torch.where(all_distances <= limit, all_distances, torch.inf).sort(dim=1, stable=True)
            found.append(order.indices[:, :k])
            distances.append(order.values[:, :k].clamp(min=0).square())
    dropped = (indices < 0).unsqueeze(1)
    return torch.cat(found)[where].masked_fill(dropped, -1), torch.cat(distances)[where].masked_fill(dropped, 0)


@torch.no_grad()
def product_neighbours(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest combinations of the nearest entries of several factors; squared distances add up.

    Exact as long as every factor brings ``min(k, its size)`` entries: a combination among the ``k`` best only uses
    entries among the ``k`` best of each factor.

    Args:
        parts: per factor indices ``(n, k_i, G_i)``, nearest first, and squared distances ``(n, k_i)``.
        k: at most the product of the ``k_i``.

    Returns:
        Indices ``(n, k, sum(G_i))``, nearest first, equal distances in lexicographic order of the factors' own order,
        and squared distances ``(n, k)``.
    """
    indices, distances = parts[0]
    for more, further in parts[1:]:
        sums = distances.unsqueeze(2) + further.unsqueeze(1)  # (n, k_a, k_b)
        order = sums.flatten(1).sort(dim=1, stable=True)
        kept = order.indices[:, :k]
        distances = order.values[:, :k]
        left = kept.div(further.shape[1], rounding_mode="floor")
        right = kept % further.shape[1]
        indices = torch.cat([_take(indices, left), _take(more, right)], 2)
    check_k(k, distances.shape[1])
    return indices[:, :k], distances[:, :k]


def check_k(k: int, available: int) -> None:
    """Raise ``ValueError`` unless ``1 <= k <= available``."""
    if not 1 <= k <= available:
        raise ValueError(f"k must lie between 1 and the number of codes, {available}; got {k}")


def _take(indices: Tensor, chosen: Tensor) -> Tensor:
    """``(n, k, G)``, ``(n, m)`` -> ``(n, m, G)``."""
    return indices.gather(1, chosen.unsqueeze(2).expand(-1, -1, indices.shape[2]))
