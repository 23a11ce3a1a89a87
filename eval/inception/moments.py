"""Mean and covariance of features, gathered batch by batch in float64.

Sums of features and of their outer products add up, so parts of a dataset can be gathered anywhere and in any order.
As long as there are fewer samples than dimensions the samples themselves are kept instead: they are the smaller state,
and they allow an exact Fréchet distance where a covariance is singular.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..metric import State


class Gaussian:
    """A normal distribution, as its mean and either its covariance or the samples it was fitted to.

    Args:
        mean: float64 ``(D,)``.
        covariance: float64 ``(D, D)``.
        samples: float64 ``(N, D)`` instead, centred; their covariance has the denominator ``N - 1``.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | None = None, samples: Tensor | None = None) -> None:
        if (covariance is None) == (samples is None):
            raise ValueError("a Gaussian has either a covariance or samples")
        self.mean = mean
        self.samples = samples
        self._covariance = covariance

    @cached_property
    def covariance(self) -> Tensor:
        """``(D, D)``."""
        if self.samples is not None:
            return self.samples.T @ self.samples / (len(self.samples) - 1)
        return self._covariance

    @cached_property
    def variance(self) -> Tensor:
        """Trace of the covariance."""
        if self.samples is not None:
            return self.samples.square().sum() / (len(self.samples) - 1)
        return self._covariance.trace()

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance, ``(D, D)``; computed once, it takes seconds at 2048 dimensions."""
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.T) / 2)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Moments:
    """Gathers the mean and the covariance of features.

    Args:
        dim: number of features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._samples: list[Tensor] = []  # as they came, while count < dim
        self._sum: Tensor | None = None
        self._outer: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Take in features ``(B, dim)``.

        Raises:
            ValueError: for another number of features.
        """
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (B, {self.dim}); got {tuple(features.shape)}")
        self.count += len(features)
        self._samples.append(features.detach())
        if self.count >= self.dim:
            self._add_up()

    def state_dict(self) -> State:
        """What has been gathered, on the host."""
        if self._sum is None:
            samples = torch.cat(self._samples) if self._samples else torch.empty(0, self.dim)
            self._samples = [samples]
            return {"count": self.count, "samples": samples.cpu()}
        return {"count": self.count, "sum": self._sum.cpu(), "outer": self._outer.cpu()}

    def merge(self, state: State) -> None:
        """Add the :meth:`state_dict` of another part."""
        if "samples" in state:
            self.update(state["samples"].to(self._device))
            return
        self._start_sums(self._device)
        self.count += state["count"]
        self._sum += state["sum"].to(self._sum.device)
        self._outer += state["outer"].to(self._outer.device)
        self._add_up()

    def gaussian(self) -> Gaussian:
        """The distribution of what was gathered, on the host.

        Raises:
            ValueError: if that are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; got {self.count}")
        if self._sum is None:
            samples = torch.cat(self._samples).cpu().double()
            mean = samples.mean(0)
            return Gaussian(mean, samples=samples - mean)
        mean = self._sum.cpu() / self.count
        covariance = (self._outer.cpu() - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)

    @property
    def _device(self) -> torch.device:
        if self._sum is not None:
            return self._sum.device
        return self._samples[0].device if self._samples else torch.device("cpu")

    def _start_sums(self, device: torch.device) -> None:
        if self._sum is None:
            self._sum = torch.zeros(self.dim, dtype=torch.float64, device=device)
            self._outer = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=device)

    def _add_up(self) -> None:
        """Replace samples by their sums."""
        for samples in map(_double, self._samples):
            self._start_sums(samples.device)
            samples = samples.to(self._sum.device)
            self._sum += samples.sum(0)
            self._outer.addmm_(samples.T, samples)
        self._samples = []


def _double(features: Tensor) -> Tensor:
    if features.device.type == "mps":  # which has no float64
        features = features.cpu()
    return features.double()
