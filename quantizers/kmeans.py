"""Lloyd's k-means over the points of all ranks, with nothing larger than the points and the centroids in memory.

A codebook that starts among the latents uses its codes from the first step on. Public code runs k-means on the first
batch, which holds fewer distinct latents than a large codebook has codes; here the points come from several optimizer
steps (see ``VectorQuantizer``). Each rank keeps its own points: only sums and counts per centroid travel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import sum_over_ranks
from .search import nearest_codes


@torch.no_grad()
def kmeans(
    points: Tensor, centroids: Tensor, iterations: int, *, valid: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """Move centroids to the means of the points nearest to them; a centroid without points stays.

    Args:
        points: ``(n, D)`` this rank's points; ranks may hold different numbers of them.
        centroids: ``(K, D)`` where to start, the same on all ranks.
        iterations: number of Lloyd iterations.
        valid: bool ``(n,)``, points that count; all if ``None``.
        normalize: spherical k-means: points and centroids are unit vectors, compared by their angle.

    Returns:
        ``(K, D)``, the same on all ranks. The sum of squared distances to the nearest centroid never increases.
    """
    weight = torch.ones(len(points), dtype=points.dtype, device=points.device)
    if valid is not None:
        weight = weight.masked_fill(~valid, 0)
        points = points.masked_fill(~valid.unsqueeze(1), 0)
    for _ in range(iterations):
        found = nearest_codes(points, centroids)
        sums = sum_over_ranks(sums_by_code(points, found, len(centroids)))
        counts = sum_over_ranks(weight.new_zeros(len(centroids)).scatter_add_(0, found, weight))
        means = sums / counts.clamp(min=1).unsqueeze(1)
        if normalize:
            means = F.normalize(means, dim=1)
        centroids = torch.where(counts.unsqueeze(1) > 0, means, centroids)
    return centroids


def sums_by_code(rows: Tensor, found: Tensor, codes: int) -> Tensor:
    """Per code the sum of its rows, ``(K, D)``; never one-hot.

    Args:
        rows: ``(n, D)``, finite; zero for a row that does not count.
        found: ``(n,)`` the code of each row.
        codes: K.
    """
    return rows.new_zeros(codes, rows.shape[1]).index_add_(0, found, rows)
