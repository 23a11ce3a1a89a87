"""Geometry of training and evaluation images, on uint8 tensors ``(3, H, W)``.

Everything stays uint8 (a quarter of the bytes of float between workers and device) and every random draw comes from
the generator that is passed in. Sizes are ``(h, w)``; a crop larger than the image makes the image grow.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Size = tuple[int, int]


def as_size(size: int | Size) -> Size:
    """``(h, w)`` of a size given as one number (square) or as a pair.

    Raises:
        ValueError: for anything but one or two positive integers.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"size must be a positive int or a pair (h, w) of them; got {size!r}")
    return pair


def resize(image: Tensor, size: Size) -> Tensor:
    """Bicubic resize with antialias, ``(3, H, W)`` to ``(3, h, w)``."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    # Channels last in memory, as decoders deliver: of channels-first uint8 images torch's kernel makes noise where the
    # result is one pixel wide, and an internal error where it is a single pixel.
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return F.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)


def resize_cover(image: Tensor, size: Size) -> Tensor:
    """Resize, keeping the aspect ratio, to the smallest image that covers ``size``; small images are enlarged."""
    (height, width), (h, w) = image.shape[-2:], size
    scale = max(h / height, w / width)
    return resize(image, (max(h, round(height * scale)), max(w, round(width * scale))))


def center_crop(image: Tensor, size: Size) -> Tensor:
    """The middle ``(3, h, w)`` of an image that covers ``size``.

    Raises:
        ValueError: if the image is smaller than the crop.
    """
    free = _free(image, size)
    return _window(image, free[0] // 2, free[1] // 2, size)


def random_crop(image: Tensor, size: Size, generator: torch.Generator) -> Tensor:
    """A window ``(3, h, w)``, every position equally likely, of an image that covers ``size``.

    Raises:
        ValueError: if the image is smaller than the crop.
    """
    free = _free(image, size)
    top, left = (int(torch.randint(space + 1, (), generator=generator)) for space in free)
    return _window(image, top, left, size)


def random_resized_crop(
    image: Tensor,
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """A random window of random area and shape, resized to ``(3, h, w)``.

    Args:
        image: uint8 ``(3, H, W)``.
        size: ``(h, w)`` of the result.
        scale: range of the window's share of the image area.
        ratio: range of the window's aspect ratio relative to that of ``size``: 1 never distorts.
        generator: source of all random draws.
    """
    height, width = image.shape[-2:]
    for _ in range(10):
        draws = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
        log_ratio = math.log(ratio[0]) + draws[1] * (math.log(ratio[1]) - math.log(ratio[0]))
        aspect = size[1] / size[0] * math.exp(log_ratio)
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            return resize(random_crop(image, (h, w), generator), size)
    return center_crop(resize_cover(image, size), size)  # no window of such a shape fits into a very long image


def horizontal_flip(image: Tensor) -> Tensor:
    """Mirror left and right."""
    return image.flip(-1)


def adm_center_crop(image: Tensor, size: int | Size) -> Tensor:
    """The centre crop of the ADM evaluation protocol (arXiv:2105.05233), through PIL.

    Halve with a box filter while the shorter side is at least twice the target, resize it bicubically to the target,
    crop the middle. Published FID and rFID numbers at 256 x 256 rest on exactly these pixels.

    Raises:
        ValueError: for a size that is not square.
    """
    h, w = as_size(size)
    if h != w:
        raise ValueError(f"size of the ADM crop must be square; got {(h, w)}; use the crop 'center' for other shapes")
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    while min(picture.size) >= 2 * h:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = h / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return center_crop(torch.from_numpy(np.array(picture)).permute(2, 0, 1), (h, w))


class TrainTransform:
    """What a training image goes through: crop to ``size``, then a random mirror image.

    Args:
        size: ``(h, w)``, or one number for a square.
        crop: ``random`` (cover ``size``, then a random window), ``random_resized`` (a window of random area and
            shape, resized) or ``center``.
        scale: range of the share of the image area that ``random_resized`` keeps.
        flip: probability of the mirror image.

    Raises:
        ValueError: for values outside these choices and ranges.
    """

    ratio = (3 / 4, 4 / 3)

    def __init__(
        self,
        size: int | Size,
        crop: Literal["random", "random_resized", "center"] = "random",
        scale: tuple[float, float] = (0.8, 1.0),
        flip: float = 0.5,
    ) -> None:
        if crop not in ("random", "random_resized", "center"):
            raise ValueError(f"crop must be 'random', 'random_resized' or 'center'; got {crop!r}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a range (low, high) with 0 < low <= high <= 1; got {scale}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability in [0, 1]; got {flip}")
        self.size, self.crop, self.scale, self.flip = as_size(size), crop, tuple(scale), flip

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 ``(3, H, W)`` to uint8 ``(3, h, w)``."""
        if self.crop == "random":
            image = random_crop(resize_cover(image, self.size), self.size, generator)
        elif self.crop == "random_resized":
            image = random_resized_crop(image, self.size, self.scale, self.ratio, generator)
        else:
            image = center_crop(resize_cover(image, self.size), self.size)
        return horizontal_flip(image) if float(torch.rand((), generator=generator)) < self.flip else image


class EvalTransform:
    """What an evaluation image goes through, always the same pixels.

    Args:
        size: ``(h, w)``, or one number for a square.
        crop: ``center`` (cover ``size``, then the middle) or ``adm`` (see :func:`adm_center_crop`; square only).

    Raises:
        ValueError: for another crop, or ``adm`` with a size that is not square.
    """

    def __init__(self, size: int | Size, crop: Literal["center", "adm"] = "center") -> None:
        self.size, self.crop = as_size(size), crop
        if crop not in ("center", "adm"):
            raise ValueError(f"crop must be 'center' or 'adm'; got {crop!r}")
        if crop == "adm" and self.size[0] != self.size[1]:
            raise ValueError(f"crop 'adm' needs a square size; got {self.size}; use 'center' for other shapes")

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 ``(3, H, W)`` to uint8 ``(3, h, w)``."""
        if self.crop == "adm":
            return adm_center_crop(image, self.size)
        return center_crop(resize_cover(image, self.size), self.size)


def _free(image: Tensor, size: Size) -> Size:
    free = image.shape[-2] - size[0], image.shape[-1] - size[1]
    if min(free) < 0:
        raise ValueError(f"image {tuple(image.shape[-2:])} is smaller than the crop {tuple(size)}; resize it to cover")
    return free


def _window(image: Tensor, top: int, left: int, size: Size) -> Tensor:
    return image[..., top : top + size[0], left : left + size[1]]
