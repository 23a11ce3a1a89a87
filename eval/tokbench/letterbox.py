"""TokBench's way through a tokenizer (arXiv:2505.18142): onto a black square, and back to the original size.

An image is scaled by the LANCZOS filter until it just fits the square, up as well as down, and laid on the middle of
black. What the tokenizer makes of the square is cropped again and scaled, by the same filter, to the size that the
image had: text and faces are judged there. Scripts of the benchmark write that under the original file name, so images
called ``.jpg`` are once more compressed at PIL's default quality 75; :func:`through_jpeg` repeats it for parity.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Placement:
    """Where an image lies on its square.

    Attributes:
        width: of the original.
        height: of the original.
        left: first column that the image covers.
        top: first row that it covers.
        inner_width: columns that it covers.
        inner_height: rows that it covers.
    """

    width: int
    height: int
    left: int
    top: int
    inner_width: int
    inner_height: int


def placement(width: int, height: int, size: int) -> Placement:
    """Where an image of ``width`` x ``height`` lies on a square of ``size`` pixels.

    Raises:
        ValueError: for sizes below 1.
    """
    if min(width, height, size) < 1:
        raise ValueError(f"width, height and size must be at least 1; got {width}, {height} and {size}")
    scale = min(size / width, size / height)
    inner_width, inner_height = min(math.ceil(width * scale), size), min(math.ceil(height * scale), size)
    left, top = (size - inner_width) // 2, (size - inner_height) // 2
    return Placement(width, height, left, top, inner_width, inner_height)


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, Placement]:
    """An image on the middle of a black square.

    Args:
        image: uint8 ``(H, W, 3)``.
        size: side of the square in pixels.

    Returns:
        The square, uint8 ``(size, size, 3)``, and where the image lies on it.

    Raises:
        ValueError: for another shape or dtype.
    """
    _check(image, "image")
    place = placement(image.shape[1], image.shape[0], size)
    canvas = np.zeros((size, size, 3), np.uint8)
    rows, columns = _inner(place)
    canvas[rows, columns] = _resize(image, place.inner_width, place.inner_height)
    return canvas, place


def restore(canvas: np.ndarray, place: Placement) -> np.ndarray:
    """The image on a square, at its original size: uint8 ``(H, W, 3)``.

    Raises:
        ValueError: for another shape or dtype.
    """
    _check(canvas, "canvas")
    rows, columns = _inner(place)
    if canvas.shape[0] < rows.stop or canvas.shape[1] < columns.stop:
        raise ValueError(f"canvas must cover {rows.stop} rows and {columns.stop} columns; got {canvas.shape[:2]}")
    return _resize(canvas[rows, columns], place.width, place.height)


def through_jpeg(image: np.ndarray, name: str) -> np.ndarray:
    """What a viewer reads back if ``image`` is saved under ``name`` as the benchmark's scripts save it.

    Only ``.jpg`` and ``.jpeg`` change pixels: quality 75, chroma at half resolution.
    """
    if PurePath(name).suffix.lower() not in (".jpg", ".jpeg"):
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    with Image.open(buffer, formats=("JPEG",)) as decoded:
        return np.array(decoded.convert("RGB"))


def _inner(place: Placement) -> tuple[slice, slice]:
    return slice(place.top, place.top + place.inner_height), slice(place.left, place.left + place.inner_width)


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _check(image: np.ndarray, name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} must be uint8 (H, W, 3); got {image.dtype} {image.shape}")
