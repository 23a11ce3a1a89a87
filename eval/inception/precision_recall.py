"""Precision and recall of the reconstructions' distribution (arXiv:1904.06991), in Inception features.

Every image claims the ball around its features that reaches to its third nearest neighbour of the same side. Precision
is the share of reconstructions within a ball of the reference, recall the share of the reference within a ball of the
reconstructions. As in ADM's evaluator there are at most 10,000 reference images and all reconstructions. Both depend on
how many images there are on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...quantizers.search import full_precision
from ..metric import MetricUnavailable
from .feature_comparison import FeatureComparison
from .feature_table import FeatureTable
from .reference import InceptionReference

_BLOCK = 2048  # rows against which as many are compared at once: 17 MB of distances


class PrecisionRecall(FeatureComparison):
    """``precision`` and ``recall``, between 0 and 1.

    Args:
        table: features of the reconstructions.
        reference: features of the originals.
        neighbours: which neighbour the balls reach to.
        max_reference: reference images that are used, chosen at random if there are more.
        seed: of the choice.

    Raises:
        MetricUnavailable: if the reference has no features of single images.
        ValueError: for a neighbour below the first.
    """

    def __init__(
        self,
        table: FeatureTable,
        reference: InceptionReference,
        neighbours: int = 3,
        max_reference: int = 10_000,
        seed: int = 0,
    ) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1; got {neighbours}")
        super().__init__(table, reference)
        self.neighbours = neighbours
        self.max_reference = max_reference
        self.seed = seed

    def compute(self) -> dict[str, float]:
        features, reference = self.table.features(), self.reference.statistics().features
        if len(reference) > self.max_reference:
            chosen = np.random.RandomState(self.seed).permutation(len(reference))[: self.max_reference]
            reference = reference[np.sort(chosen)]
        if min(len(features), len(reference)) <= self.neighbours:
            raise MetricUnavailable(
                f"precision and recall need more than {self.neighbours} images; there are "
                f"{min(len(features), len(reference))}"
            )
        device = self.table.inception.device
        precision, recall = precision_recall(features, reference, neighbours=self.neighbours, device=device)
        return {"precision": precision, "recall": recall}

    def details(self) -> dict[str, Any]:
        count = len(self.reference.statistics().features)
        return {"neighbours": self.neighbours, "reference_images": min(self.max_reference, count)}


def precision_recall(
    features: np.ndarray, reference: np.ndarray, *, neighbours: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Precision and recall of features ``(N, D)`` against those of a reference ``(M, D)``, in blocks."""
    # Distances do not change when both sides are moved, and their rounding errors are smallest around the origin.
    centre = torch.from_numpy(np.mean(reference, 0, dtype=np.float64)).float().to(device)
    with full_precision(torch.device(device)):
        radii, reference_radii = (_radii(table, centre, neighbours) for table in (features, reference))
        inside = _inside(features, reference, reference_radii, centre)
        covered = _inside(reference, features, radii, centre)
    return inside, covered


def _blocks(table: np.ndarray, centre: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(table), _BLOCK):
        yield start, torch.from_numpy(np.array(table[start : start + _BLOCK])).to(centre) - centre


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``(N, M)`` between ``(N, D)`` and ``(M, D)``."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)


def _radii(table: np.ndarray, centre: Tensor, neighbours: int) -> Tensor:
    """Squared distance ``(N,)`` of every row to a neighbour in its own table; the row itself does not count."""
    radii = []
    for start, block in _blocks(table, centre):
        nearest = block.new_empty(len(block), 0)
        for other, rows in _blocks(table, centre):
            distances = _squared_distances(block, rows)
            if other == start:
                distances.fill_diagonal_(torch.inf)
            candidates = torch.cat([nearest, distances], 1)
            nearest = candidates.topk(min(neighbours, candidates.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _inside(points: np.ndarray, centres: np.ndarray, radii: Tensor, centre: Tensor) -> float:
    """Share of points that lie in one of the balls."""
    inside = 0
    for _, block in _blocks(points, centre):
        found = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        for start, rows in _blocks(centres, centre):
            found |= (_squared_distances(block, rows) <= radii[start : start + len(rows)]).any(1)
        inside += int(found.sum())
    return inside / len(points)
