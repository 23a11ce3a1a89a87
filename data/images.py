"""Image files to uint8 RGB tensors, and tensors to PNG files.

8-bit RGB and grey JPEGs, the bulk of every training set, go through torchvision's decoder (about 1.4 times as fast as
PIL); everything else goes through PIL: CMYK, PNG, WebP, palettes, 16 bit, transparency, animations. What PIL does
silently wrong is put right here: 16-bit grey is scaled instead of clipped, transparency is laid on white instead of
dropped, and the EXIF orientation is honoured.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import (
    Image,
    ImageOps,
    TiffImagePlugin,  # noqa: F401 -- importing a plugin is what registers its format
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)
from torch import Tensor

from .files import atomic_write

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision has announced that its decoders will go; PIL reads JPEG too, only slower
    decode_jpeg = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# A closed list, because PIL would also try formats that start other programs (EPS runs Ghostscript).
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class ImageError(ValueError):
    """An image that cannot be read; the message begins with its name and ends with the reason."""


def decode_image(data: bytes, name: str = "<bytes>", exif: bool = True) -> Tensor:
    """Decode an image file held in memory.

    Args:
        data: the bytes of the file.
        name: what error messages call the image.
        exif: turn the image upright as its EXIF orientation says.

    Returns:
        uint8 ``(3, H, W)`` RGB. Of an animation, the first frame.

    Raises:
        ImageError: for an empty, truncated or corrupt file, one that is no image, or one so large that it must be
            taken for a decompression bomb.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes)")
    frame = _jpeg_frame(data)
    if decode_jpeg is not None and frame is not None and frame[:2] in ((8, 1), (8, 3)):
        _check_pixels(frame[2] * frame[3], name)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=exif)
        except RuntimeError:
            pass  # PIL reads some files that torchvision refuses, and says better what is wrong with the others
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            pixels = np.array(_to_rgb(ImageOps.exif_transpose(image) if exif else image))
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or damaged beyond recognition") from None
    except Exception as error:  # a decoder fed with arbitrary bytes fails with any type: OSError, SyntaxError, ...
        raise ImageError(f"{name}: {error or type(error).__name__}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image(path: str | Path, exif: bool = True) -> Tensor:
    """Read an image file; see :func:`decode_image`.

    Raises:
        ImageError: also if the file is missing or cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    return decode_image(data, str(path), exif)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8: values outside are clamped, the rest is rounded to the nearest level.

    Raises:
        TypeError: for tensors that are not floating.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating, in [0, 1]; got {images.dtype}")
    return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write an image ``(3, H, W)``, uint8 or float in [0, 1], as PNG; on failure nothing is left behind.

    Raises:
        ValueError: for another shape.
        OSError: naming the path and the reason, if it cannot be written. Missing folders are made.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have shape (3, H, W); got {tuple(image.shape)}")
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    with atomic_write(path) as file:
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG")


def _to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as 8-bit RGB; transparent parts become white.

    Raises:
        ValueError: for pixel formats without a fixed range.
    """
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"pixel values from {levels.min()} to {levels.max()}; 8 and 16 bits are supported")
        return Image.fromarray(np.round(levels / 257.0).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; 8 and 16 bits are supported")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """``(bits, components, height, width)`` of a JPEG's frame header; ``None`` if there is none."""
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # these three are tables, not frames
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return data[position + 4], data[position + 9], height, width
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _check_pixels(pixels: int, name: str) -> None:
    """Refuse what PIL refuses: twice ``Image.MAX_IMAGE_PIXELS``."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise ImageError(f"{name}: {pixels} pixels, more than the limit of {2 * Image.MAX_IMAGE_PIXELS}")
