"""Append-only tables on disk: tokens and features of every image, too many to hold in memory.

Every process appends to a file of its own, rows of fixed width behind the numbers of their images. Only what a saved
state counts is ever read, so a process that is killed while it writes spoils nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .metric import EvaluationError


class Rows:
    """One row of numbers per image.

    Args:
        width: numbers in a row.
        dtype: of a number, as NumPy names it (``"float32"``, ``"uint16"``).
    """

    def __init__(self, width: int, dtype: str = "float32") -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1; got {width}")
        self.width = width
        self.dtype = np.dtype(dtype)
        self._folder: Path | None = None
        self._name = ""
        self._file: BinaryIO | None = None
        self._segments: list[tuple[str, int]] = []  # file name and number of rows of each process
        self._count = 0

    @property
    def _record(self) -> np.dtype:
        return np.dtype([("index", "<i8"), ("row", self.dtype.newbyteorder("<"), (self.width,))])

    def open(self, folder: Path, part: str) -> None:
        """Choose the folder of the table, and the name of this process's file in it."""
        self._folder, self._name = folder, f"{part}.rows"

    def append(self, index: Tensor, rows: Tensor) -> None:
        """Add rows ``(B, width)`` of the images numbered ``(B,)``."""
        if tuple(rows.shape) != (len(index), self.width):
            raise ValueError(f"rows must have shape {(len(index), self.width)}; got {tuple(rows.shape)}")
        if self._folder is None:
            raise RuntimeError("open() comes before append()")
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._folder / self._name, "wb")
        records = np.empty(len(index), self._record)
        records["index"] = index.cpu().numpy()
        records["row"] = rows.cpu().numpy()
        self._file.write(records.tobytes())
        self._count += len(index)

    def state_dict(self) -> dict[str, Any]:
        """Where the rows of this process are, after everything is on disk."""
        if self._file is None:
            return {}
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"file": self._name, "rows": self._count}

    def merge(self, state: dict[str, Any]) -> None:
        """Take in the rows of another process."""
        if state:
            self._segments.append((state["file"], state["rows"]))

    def __len__(self) -> int:
        return sum(count for _, count in self._segments)

    def _maps(self) -> list[np.ndarray]:
        if self._folder is None:
            raise RuntimeError("open() comes before reading")
        return [self._map(self._folder / name, count) for name, count in self._segments if count]

    def _map(self, path: Path, count: int) -> np.ndarray:
        try:
            return np.memmap(path, self._record, "r", shape=(count,))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} should hold {count} rows and is damaged; begin again") from error

    def index(self) -> np.ndarray:
        """The numbers of all images, int64 ``(N,)`` ascending."""
        parts = [part["index"] for part in self._maps()]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def blocks(self, size: int = 4096) -> Iterator[Tensor]:
        """The merged rows in the order of their images, ``(<= size, width)`` at a time."""
        maps = self._maps()
        if not maps:
            return
        index = np.concatenate([part["index"] for part in maps])
        segment = np.repeat(np.arange(len(maps)), [len(part) for part in maps])
        place = np.concatenate([np.arange(len(part)) for part in maps])
        order = np.argsort(index, kind="stable")
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows = np.empty((len(chosen), self.width), self.dtype)
            for number, part in enumerate(maps):
                where = segment[chosen] == number
                rows[where] = part["row"][place[chosen[where]]]
            yield torch.from_numpy(rows)

    def read(self) -> Tensor:
        """All merged rows in the order of their images, ``(N, width)``, in memory."""
        blocks = list(self.blocks())
        if blocks:
            return torch.cat(blocks)
        return torch.from_numpy(np.empty((0, self.width), self.dtype))
