"""Kernel inception distance, KID (arXiv:1801.01401): the squared maximum mean discrepancy of Inception features.

The kernel is the cubic polynomial ``(x.y / D + 1)^3``. The estimate is unbiased, also for few images, and may come out
slightly negative. It is the mean over random subsets, drawn as torch-fidelity draws them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...quantizers.search import full_precision
from ..metric import MetricUnavailable
from .feature_comparison import FeatureComparison
from .feature_table import FeatureTable
from .reference import InceptionReference

_SEED = 2020


class KernelInceptionDistance(FeatureComparison):
    """``kid`` and its standard deviation over subsets, ``kid_std``.

    Args:
        table: features of the reconstructions.
        reference: features of the originals.
        subsets: how many are drawn.
        subset_size: images in each.

    Raises:
        MetricUnavailable: if the reference has no features of single images.
        ValueError: for fewer than one subset or two images in it.
    """

    def __init__(
        self, table: FeatureTable, reference: InceptionReference, subsets: int = 100, subset_size: int = 1000
    ) -> None:
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"subsets must be at least 1 of at least 2 images; got {subsets} of {subset_size}")
        super().__init__(table, reference)
        self.subsets = subsets
        self.subset_size = subset_size

    def compute(self) -> dict[str, float]:
        features, reference = self.table.features(), self.reference.statistics().features
        fewest = min(len(features), len(reference))
        if fewest < self.subset_size:
            raise MetricUnavailable(f"KID compares subsets of {self.subset_size} images; there are {fewest}")
        values = kernel_distances(
            features, reference, subsets=self.subsets, subset_size=self.subset_size, device=self.table.inception.device
        )
        return {"kid": float(values.mean()), "kid_std": float(values.std(correction=0))}

    def details(self) -> dict[str, Any]:
        return {"subsets": self.subsets, "subset_size": self.subset_size}


def kernel_distances(
    features: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int,
    subset_size: int,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The distance of random subsets of two tables of features ``(N, D)``, float64 ``(subsets,)``."""
    random = np.random.RandomState(_SEED)
    values = torch.empty(subsets, dtype=torch.float64)
    with full_precision(torch.device(device)):
        for number in range(subsets):
            chosen = (random.choice(len(table), subset_size, replace=False) for table in (features, reference))
            x, y = (
                torch.from_numpy(table[rows]).to(device)
                for table, rows in zip((features, reference), chosen, strict=True)
            )
            values[number] = _distance(x, y)
    return values


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared discrepancy of two sets of ``n`` features ``(n, D)``."""
    n = len(x)
    within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    products = x @ y.T  # (n, n)
    if products.device.type == "mps":  # which has no float64
        products = products.cpu()
    return (products.double() / x.shape[1] + 1) ** 3
