"""Where a curve over a logarithmic axis has its points: numbers of images, ranks of codes."""

from __future__ import annotations

_POINTS = 64


def log_spaced(last: int) -> list[int]:
    """At most 64 whole numbers from 1 to ``last``, both among them, evenly spaced in their logarithm; none for 0."""
    if not last:
        return []
    return sorted({round(last ** (step / (_POINTS - 1))) for step in range(_POINTS)})
