"""Keeps the reference of one dataset, crop and network, so that later evaluations run the network half as often."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from ...data.files import atomic_folder
from .moments import Gaussian
from .reference import ReferenceStatistics

_FORMAT = 1


class ReferenceCache:
    """A folder with one entry per key.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load(self, key: str, *, spatial: bool = False, features: bool = False) -> ReferenceStatistics | None:
        """What was kept under a key, features on disk; ``None`` if nothing was, or it is damaged or not enough.

        Whether its ``content`` is that of the images at hand is for the caller to find out.

        Args:
            key: what names dataset, geometry, network, resize and dtype.
            spatial: the features of sFID are needed.
            features: every image's features are needed.
        """
        path = self._path(key)
        try:
            with np.load(path / "statistics.npz", allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    return None
                found = ReferenceStatistics(
                    _read(file, "pool"), _read(file, "spatial"), None, int(file["count"]), str(file["content"])
                )
            if (path / "features.npy").exists():
                found.features = np.load(path / "features.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        enough = (found.spatial is not None or not spatial) and (found.features is not None or not features)
        return found if found.pool is not None and enough else None

    def save(self, key: str, statistics: ReferenceStatistics, content: str) -> None:
        """Keep a reference, in place of what was there.

        Args:
            key: as in :meth:`load`.
            statistics: of the reference.
            content: hash of the pixels of the originals, in their order.

        Raises:
            OSError: if it cannot be written.
        """
        arrays = _arrays("pool", statistics.pool)
        if statistics.spatial is not None:
            arrays |= _arrays("spatial", statistics.spatial)
        with atomic_folder(self._path(key)) as folder:
            np.savez(folder / "statistics.npz", **arrays, format=_FORMAT, count=statistics.count, content=content)
            if statistics.features is not None:
                np.save(folder / "features.npy", statistics.features)

    def _path(self, key: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*", key):
            raise ValueError(f"key must consist of letters, digits, '.', '_' and '-'; got {key!r}")
        return self.folder / key


def _arrays(name: str, gaussian: Gaussian) -> dict[str, np.ndarray]:
    kind, matrix = ("samples", gaussian.samples) if gaussian.samples is not None else ("sigma", gaussian.covariance)
    return {f"{name}.mu": gaussian.mean.cpu().numpy(), f"{name}.{kind}": matrix.cpu().numpy()}


def _read(file: np.lib.npyio.NpzFile, name: str) -> Gaussian | None:
    if f"{name}.mu" not in file:
        return None
    kind = "samples" if f"{name}.samples" in file else "sigma"
    mean, matrix = (torch.from_numpy(file[f"{name}.{part}"]) for part in ("mu", kind))
    return Gaussian(mean, samples=matrix) if kind == "samples" else Gaussian(mean, matrix)
