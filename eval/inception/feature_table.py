"""Inception features of every image, one row each on disk: what KID and precision/recall are computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from ..metric import Metric, Pairs, State
from ..rows import Rows
from .network import POOL_DIM, Inception


class FeatureTable(Metric):
    """Keeps features of reconstructions, or of originals, for the metrics that hold this object. No value of its own.

    Args:
        inception: the network.
        side: ``reconstructions`` or ``originals``.
    """

    def __init__(self, inception: Inception, side: Literal["reconstructions", "originals"] = "reconstructions") -> None:
        self.inception = inception
        self.side = side
        self._rows = Rows(POOL_DIM)
        self._folder: Path | None = None
        self._part = ""
        self._features: np.ndarray | None = None

    def open(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        self._rows.open(folder, part)

    def update(self, pairs: Pairs) -> None:
        originals = self.side == "originals"
        features = self.inception.originals(pairs.originals) if originals else self.inception.reconstructions(pairs)
        self._rows.append(pairs.index, features.pool)

    def state_dict(self) -> State:
        return self._rows.state_dict()

    def merge(self, state: State) -> None:
        self._rows.merge(state)
        self._features = None

    def compute(self) -> dict[str, float]:
        return {}

    def features(self) -> np.ndarray:
        """Float32 ``(N, 2048)`` in the order of the images; a file, of which only what is used is in memory."""
        if self._features is None:
            if not len(self._rows):
                return np.empty((0, POOL_DIM), np.float32)
            path = self._folder / f"{self._part}.npy"
            shape = (len(self._rows), POOL_DIM)
            table, start = np.lib.format.open_memmap(path, "w+", np.float32, shape), 0
            for block in self._rows.blocks():
                table[start : start + len(block)] = block.numpy()
                start += len(block)
            table.flush()
            self._features = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._features
