"""The side that reconstructions are measured against: features of the originals, gathered once for all variants.

They come from the same pass over the data as everything else, from the cache of an earlier evaluation, or as statistics
from a file. torch-fidelity's users, pytorch-fid and ADM exchange ``.npz`` files with ``mu`` and ``sigma`` (ADM also
``mu_s`` and ``sigma_s`` for sFID): those can be read, and are what is written.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...data.files import atomic_write
from ..metric import EvaluationError, Metric, MetricUnavailable, Pairs, State
from .feature_table import FeatureTable
from .moments import Gaussian, Moments
from .network import POOL_DIM, SPATIAL_DIM, Inception


@dataclass
class ReferenceStatistics:
    """What is known of the reference images.

    Attributes:
        pool: distribution of the features of FID.
        spatial: of the features of sFID; ``None`` if they were not gathered.
        features: float32 ``(N, 2048)``, the features of FID themselves, possibly on disk; ``None`` likewise.
        count: number of images; 0 if a file does not say.
        content: hash of their pixels; empty if nobody said.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    count: int = 0
    content: str = ""


class InceptionReference(Metric):
    """Gathers the reference from originals; goes with :class:`~vistok.eval.variants.OriginalsVariant`. No value.

    Args:
        inception: the network.
        spatial: gather what sFID needs.
        features: keep every image's features on disk, for KID and precision/recall.
        loaded: what is known already: then nothing is gathered, and the network does not see the originals.
    """

    def __init__(
        self,
        inception: Inception,
        *,
        spatial: bool = False,
        features: bool = False,
        loaded: ReferenceStatistics | None = None,
    ) -> None:
        self.inception = inception
        self._loaded = loaded
        self._statistics = loaded
        self._pool = Moments(POOL_DIM)
        self._spatial = Moments(SPATIAL_DIM) if spatial else None
        self._table = FeatureTable(inception, side="originals") if features else None

    def open(self, folder: Path, part: str) -> None:
        if self._table is not None:
            self._table.open(folder, part)

    def update(self, pairs: Pairs) -> None:
        if self._loaded is not None:
            return
        features = self.inception.originals(pairs.originals)
        self._pool.update(features.pool)
        if self._spatial is not None:
            self._spatial.update(features.spatial)
        if self._table is not None:
            self._table.update(pairs)

    def state_dict(self) -> State:
        if self._loaded is not None:
            return {}
        state: State = {"pool": self._pool.state_dict()}
        if self._spatial is not None:
            state["spatial"] = self._spatial.state_dict()
        if self._table is not None:
            state["features"] = self._table.state_dict()
        return state

    def merge(self, state: State) -> None:
        if self._loaded is not None:
            return
        if not state:
            raise EvaluationError(
                "a part was made with statistics of the originals that are no longer kept; begin anew"
            )
        self._statistics = None
        self._pool.merge(state["pool"])
        if self._spatial is not None:
            self._spatial.merge(state["spatial"])
        if self._table is not None:
            self._table.merge(state["features"])

    def compute(self) -> dict[str, float]:
        return {}

    def require(self, *, spatial: bool = False, features: bool = False) -> None:
        """Make sure that something will be there.

        Raises:
            MetricUnavailable: if the reference does not have it.
        """
        known = self._loaded
        if spatial and (self._spatial is None if known is None else known.spatial is None):
            raise MetricUnavailable("the reference has no spatial features: a statistics file needs mu_s and sigma_s")
        if features and (self._table is None if known is None else known.features is None):
            raise MetricUnavailable("the reference has no features of single images: use the originals themselves")

    def statistics(self) -> ReferenceStatistics:
        """The reference, after everything has been merged.

        Raises:
            MetricUnavailable: if fewer than two originals were seen.
        """
        if self._statistics is None:
            if self._pool.count < 2:
                raise MetricUnavailable(f"the reference needs at least 2 images; {self._pool.count} were seen")
            self._statistics = ReferenceStatistics(
                self._pool.gaussian(),
                None if self._spatial is None else self._spatial.gaussian(),
                None if self._table is None else self._table.features(),
                self._pool.count,
            )
        return self._statistics


def load_statistics(path: str | Path) -> ReferenceStatistics:
    """Read a file of statistics: ``mu (2048,)`` and ``sigma (2048, 2048)``, if present also ``mu_s`` and ``sigma_s``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is one array instead of mu and sigma")
        with archive as file:
            pool = _gaussian(file, "mu", "sigma", POOL_DIM)
            spatial = _gaussian(file, "mu_s", "sigma_s", SPATIAL_DIM) if "mu_s" in file else None
            count = int(file["count"]) if "count" in file else 0
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of FID statistics: {error}") from error
    return ReferenceStatistics(pool, spatial, count=count)


def save_statistics(path: str | Path, statistics: ReferenceStatistics) -> None:
    """Write the file that :func:`load_statistics` reads, and pytorch-fid and ADM's evaluator too."""
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    with atomic_write(path) as file:
        np.savez(file, **{name: value.cpu().numpy() for name, value in arrays.items()}, count=statistics.count)


def _gaussian(file: Mapping[str, np.ndarray], mean: str, covariance: str, dim: int) -> Gaussian:
    arrays = []
    for name, shape in ((mean, (dim,)), (covariance, (dim, dim))):
        if name not in file:
            raise ValueError(f"{name} is missing")
        array = np.asarray(file[name])
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite numbers of shape {shape}; got {array.dtype} {array.shape}")
        arrays.append(torch.from_numpy(array.astype(np.float64)))
    return Gaussian(*arrays)
