"""How large text and faces are, in three classes, as TokBench (arXiv:2505.18142) reports them.

An instance belongs to a bucket by its ``ratio`` to the longest side of its image: the mean advance of a character for
text, the box for faces. Buckets are half-open, ``low <= ratio < high``; smaller text is not counted at all. The mean of
a score over the three buckets is unweighted, however many instances each has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

NAMES = ("small", "medium", "large")
_TEXT = {256: (0.02, 0.03, 0.04, 1.0), 512: (0.01, 0.02, 0.03, 1.0), 1024: (0.005, 0.01, 0.02, 1.0)}
_FACE = {256: (0.0, 0.1, 0.2, 1.0), 512: (0.0, 0.05, 0.2, 1.0), 1024: (0.0, 0.05, 0.1, 1.0)}


@dataclass(frozen=True)
class Buckets:
    """Three classes of size.

    Attributes:
        edges: ascending: where small begins, where medium begins, where large begins, where large ends.
        official: whether the benchmark defines them.
    """

    edges: tuple[float, float, float, float]
    official: bool

    def find(self, ratio: float) -> int | None:
        """0, 1 or 2 for small, medium, large; ``None`` for what is not counted."""
        for number in range(3):
            if self.edges[number] <= ratio < self.edges[number + 1]:
                return number
        return None

    def table(self) -> dict[str, list[float]]:
        """Low and high end of every bucket by its name."""
        return {name: [self.edges[i], self.edges[i + 1]] for i, name in enumerate(NAMES)}


def text_buckets(size: int) -> Buckets:
    """Buckets for text at squares of ``size`` pixels; see :func:`_buckets`.

    Raises:
        ValueError: for squares too small for three buckets.
    """
    return _buckets(_TEXT, size)


def face_buckets(size: int) -> Buckets:
    """Buckets for faces at squares of ``size`` pixels; see :func:`_buckets`.

    Raises:
        ValueError: for squares too small for three buckets.
    """
    return _buckets(_FACE, size)


def bucket_means(sums: Mapping[int, float], counts: Mapping[int, int]) -> dict[str, float]:
    """Mean of a score in every bucket, and their unweighted ``mean``; NaN where there is nothing."""
    values = {name: sums[i] / counts[i] if counts[i] else math.nan for i, name in enumerate(NAMES)}
    return values | {"mean": sum(values.values()) / len(NAMES)}


def _buckets(table: Mapping[int, tuple[float, float, float, float]], size: int) -> Buckets:
    """The benchmark's edges at 256, 512 and 1024 pixels.

    At other sizes, which are ours and comparable with nothing published, those of 256 move so that they lie at the same
    number of pixels on the square.
    """
    if size in table:
        return Buckets(table[size], True)
    low, medium, large, high = table[256]
    scale = 256 / size if size > 0 else math.inf
    if large * scale >= high:
        raise ValueError(f"size must exceed {math.ceil(256 * large / high)} pixels to have three buckets; got {size}")
    return Buckets((low * scale, medium * scale, large * scale, high), False)
