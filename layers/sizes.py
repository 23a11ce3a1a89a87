"""Named transformer sizes and helpers for image sizes."""

from __future__ import annotations

TRANSFORMER_SIZES = {  # width, layers, heads: TiTok, arXiv:2406.07550
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def transformer_size(size: str | tuple[int, int, int] | list[int]) -> tuple[int, int, int]:
    """``(width, layers, heads)`` of a named size or of three numbers.

    Raises:
        ValueError: for an unknown name or anything but three positive numbers.
    """
    if isinstance(size, str):
        if size not in TRANSFORMER_SIZES:
            raise ValueError(f"unknown transformer size {size!r}; accepted: {', '.join(TRANSFORMER_SIZES)}")
        return TRANSFORMER_SIZES[size]
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"a transformer size is (width, layers, heads), all positive; got {size!r}")
    return (int(size[0]), int(size[1]), int(size[2]))


def image_hw(size: int | tuple[int, int] | list[int], divisor: int = 1) -> tuple[int, int]:
    """``(H, W)`` of one number (a square) or two.

    Raises:
        ValueError: unless both are positive multiples of ``divisor``.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1 or height % divisor or width % divisor:
        raise ValueError(f"image size must be positive multiples of {divisor} pixels; got {height}x{width}")
    return int(height), int(width)
