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
        return _shares(features, reference, radii, reference_radii, centre)


def _blocks(table: np.ndarray, centre: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Places and centred rows, from the row ``first`` on."""
    for start in range(first, len(table), _BLOCK):
        places = slice(start, min(start + _BLOCK, len(table)))
        yield places, torch.from_numpy(np.array(table[places])).to(centre) - centre


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``(N, M)`` between ``(N, D)`` and ``(M, D)``."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)


def _radii(table: np.ndarray, centre: Tensor, neighbours: int) -> Tensor:
    """Squared distance ``(N,)`` of every row to a neighbour in its own table; the row itself does not count.

    Every two blocks of rows are compared once, for the neighbours of both.
    """
    nearest = centre.new_full((len(table), neighbours), torch.inf)

    def take(places: slice, distances: Tensor) -> None:
        candidates = torch.cat([nearest[places], distances], 1)
        nearest[places] = candidates.topk(neighbours, largest=False).values

    for places, block in _blocks(table, centre):
        take(places, _squared_distances(block, block).fill_diagonal_(torch.inf))
        for others, rows in _blocks(table, centre, places.stop):
            distances = _squared_distances(block, rows)
            take(places, distances)
            take(others, distances.T)
    return nearest.amax(1)


def _shares(x: np.ndarray, y: np.ndarray, x_radii: Tensor, y_radii: Tensor, centre: Tensor) -> tuple[float, float]:
    """Share of the rows of ``x`` that lie in a ball around one of ``y``, and of those of ``y`` in a ball around ``x``.

    One matrix of distances answers both.
    """
    x_inside, y_inside = (torch.zeros(len(table), dtype=torch.bool, device=centre.device) for table in (x, y))
    for places, block in _blocks(x, centre):
        for others, rows in _blocks(y, centre):
            distances = _squared_distances(block, rows)
            x_inside[places] |= (distances <= y_radii[others]).any(1)
            y_inside[others] |= (distances <= x_radii[places].unsqueeze(1)).any(0)
    return int(x_inside.sum()) / len(x), int(y_inside.sum()) / len(y)
