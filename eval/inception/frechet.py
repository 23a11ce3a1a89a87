"""Fréchet inception distance between originals and reconstructions: rFID, and rsFID on spatial features.

FID (arXiv:1706.08500) is the squared 2-Wasserstein distance of two normal distributions fitted to Inception features,
``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``; sFID (arXiv:2103.03841) takes features that still know places. The
value falls with the number of images even if nothing else changes, so only numbers of equally many images compare.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..metric import Metric, MetricUnavailable, Pairs, State
from .moments import Gaussian, Moments
from .network import POOL_DIM, SPATIAL_DIM, Inception
from .reference import InceptionReference

Tap = Literal["pool", "spatial"]


class FrechetInceptionDistance(Metric):
    """Distance of the reconstructions' features from the reference's: ``rfid``, or ``rsfid`` on the spatial features.

    Args:
        inception: the network.
        reference: gathers or holds the other side.
        tap: which features: ``pool`` or ``spatial``.

    Raises:
        ValueError: for other features.
        MetricUnavailable: if the reference has none of these.
    """

    def __init__(self, inception: Inception, reference: InceptionReference, tap: Tap = "pool") -> None:
        if tap not in ("pool", "spatial"):
            raise ValueError(f"tap must be 'pool' or 'spatial'; got {tap!r}")
        reference.require(spatial=tap == "spatial")
        self.inception = inception
        self.reference = reference
        self.tap = tap
        self.moments = Moments(POOL_DIM if tap == "pool" else SPATIAL_DIM)

    def update(self, pairs: Pairs) -> None:
        self.moments.update(getattr(self.inception.reconstructions(pairs), self.tap))

    def state_dict(self) -> State:
        return self.moments.state_dict()

    def merge(self, state: State) -> None:
        self.moments.merge(state)

    def compute(self) -> dict[str, float]:
        if self.moments.count < 2:
            raise MetricUnavailable(f"FID needs at least 2 images; {self.moments.count} evaluated")
        reference = getattr(self.reference.statistics(), self.tap)
        return {"rfid" if self.tap == "pool" else "rsfid": frechet_distance(self.moments.gaussian(), reference)}

    def details(self) -> dict[str, Any]:
        return {"images": self.moments.count, "reference_images": self.reference.statistics().count}


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two normal distributions, with the samples' precision if there are few.

    Args:
        first: one of them.
        second: the other; the root of its covariance is kept for the next call.

    Raises:
        ValueError: if they differ in their number of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"both must have the same features; got {len(first.mean)} and {len(second.mean)}")
    shift = (first.mean - second.mean).square().sum()
    distance = shift + first.variance + second.variance - 2 * _root_trace(first, second)
    return float(distance.clamp(min=0))  # equal distributions differ by a rounding error


def _root_trace(first: Gaussian, second: Gaussian) -> Tensor:
    """Trace of the square root of the product of two covariances.

    With samples, S = X^T X / (n - 1), it is the sum of the singular values of ``X1 X2^T``, or of the roots of the
    eigenvalues of ``X1 S2 X1^T``: as many numbers as there are samples. A root of the whole product would add the roots
    of rounding errors in all the other dimensions.
    """
    if first.samples is not None and second.samples is not None:
        freedom = (len(first.samples) - 1) * (len(second.samples) - 1)
        return torch.linalg.svdvals(first.samples @ second.samples.T).sum() / freedom**0.5
    if first.samples is None and second.samples is not None:
        first, second = second, first
    if first.samples is not None:
        product = first.samples @ second.covariance @ first.samples.T / (len(first.samples) - 1)
        # Centred samples add up to zero, so one eigenvalue is zero, and what is computed for it is rounding.
        return torch.linalg.eigvalsh((product + product.T) / 2)[1:].clamp(min=0).sqrt().sum()
    product = second.root @ first.covariance @ second.root
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
