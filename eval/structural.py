"""SSIM (Wang et al., IEEE TIP 2004) and MS-SSIM (Wang et al., Asilomar 2003).

Means, variances and covariances under a Gaussian window (11 x 11, sigma 1.5), at the positions where the window lies
within the image: scikit-image's ``structural_similarity(gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=255)``. On the three channels of RGB, averaged. Papers differ here: a uniform
7 x 7 window, or a data range of 2 on pixels in [0, 1], gives higher values.

With the difference ``d = x - y``, contrast and structure are ``1 - var(d) / (var(x) + var(y) + c2)`` and luminance is
``1 - mean(d)^2 / (mean(x)^2 + mean(y)^2 + c1)``: the usual terms, in a form in which equal images score exactly 1 and
float32 suffices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .metric import MetricUnavailable, Pairs, PerImageMetric

_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, from full size down
_SMALLEST_FOR_SCALES = (_WINDOW - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1


class SSIM(PerImageMetric):
    """Structural similarity, mean over the images; at most 1.

    Args:
        image_size: ``(H, W)`` of the images to come.

    Raises:
        MetricUnavailable: if the window does not fit into such images.
    """

    names = ("ssim",)

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        _check_size("SSIM", image_size, _WINDOW)

    def values(self, pairs: Pairs) -> dict[str, Tensor]:
        similarity, _ = _at_full_size(pairs)
        return {"ssim": similarity.mean(1)}


class MSSSIM(PerImageMetric):
    """Multi-scale structural similarity, mean over the images; in [0, 1].

    The terms at five scales, each half of the one before (means of 2 x 2 pixels), are multiplied in every channel;
    negative ones count as zero.

    Args:
        image_size: ``(H, W)`` of the images to come.

    Raises:
        MetricUnavailable: if the window does not fit into such images at the smallest scale: under 161 pixels.
    """

    names = ("ms_ssim",)

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        _check_size("MS-SSIM", image_size, _SMALLEST_FOR_SCALES)

    @torch.no_grad()
    def values(self, pairs: Pairs) -> dict[str, Tensor]:
        _, contrast = _at_full_size(pairs)
        below = [_below_full_size(x, y) for x, y in _parts(pairs, cpu_pixels=1 << 19)]
        terms = torch.cat([contrast[None], torch.cat(below, 1)])  # (scales, B, 3)
        weights = torch.tensor(_SCALE_WEIGHTS, device=terms.device).view(-1, 1, 1)
        return {"ms_ssim": (terms.clamp(min=0) ** weights).prod(0).mean(1)}


def _check_size(name: str, image_size: tuple[int, int], smallest: int) -> None:
    if min(image_size) < smallest:
        height, width = image_size
        raise MetricUnavailable(
            f"{name} needs images of at least {smallest} x {smallest} pixels; got {height} x {width}"
        )


def _at_full_size(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """SSIM and its part without luminance, ``(B, 3)`` each; computed once per batch of pairs."""

    def compute() -> tuple[Tensor, Tensor]:
        parts = [_similarity(x, y) for x, y in _parts(pairs)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    return pairs.once("structural similarity", compute)


def _below_full_size(x: Tensor, y: Tensor) -> Tensor:
    """The terms of MS-SSIM ``(scales - 1, B, 3)``: without luminance except at the smallest scale."""
    terms = []
    for _ in _SCALE_WEIGHTS[1:]:
        x, y = _halved(x), _halved(y)
        similarity, contrast = _similarity(x, y)
        terms.append(contrast)
    return torch.stack([*terms[:-1], similarity])


def _halved(images: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, of an odd size the last row's or column's own; ten times as fast as pooling on a CPU."""
    height, width = images.shape[2:]
    if height % 2 or width % 2:
        images = F.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    rows = images[:, :, ::2] + images[:, :, 1::2]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _parts(pairs: Pairs, cpu_pixels: int = 1 << 17) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructions and originals as float32 around zero, a few at a time: on a CPU as many as stay in its cache."""
    images = pairs.originals.images
    pixels = cpu_pixels if images.device.type == "cpu" else 1 << 22
    count = max(1, pixels // images[0, 0].numel())
    for x, y in zip(pairs.reconstructions.split(count), images.split(count), strict=True):
        yield x.float() - 127.5, y.float() - 127.5


@torch.no_grad()
def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its part without luminance, ``(B, 3)`` each, of ``(B, 3, H, W)`` in [-127.5, 127.5]."""
    difference = x - y
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x.square().addcmul_(y, y))  # becomes var(x) + var(y)
    difference_variance = _blur(difference.square_())
    squared_gap = (mean_x - mean_y).square_()
    variances -= mean_x.square().addcmul_(mean_y, mean_y)
    difference_variance -= squared_gap
    contrast = 1 - difference_variance / variances.add_(_C2)
    mean_x, mean_y = mean_x.add_(127.5), mean_y.add_(127.5)
    luminance = 1 - squared_gap / mean_x.square_().addcmul_(mean_y, mean_y).add_(_C1)
    return (luminance * contrast).mean((2, 3)), contrast.mean((2, 3))


def _blur(images: Tensor) -> Tensor:
    """Weighted means ``(B, C, H - 10, W - 10)`` under the window, in one direction and then in the other.

    Eleven shifted sums instead of a convolution: faster on a CPU, and never in TF32.
    """
    weights = [math.exp(-((k - _WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for k in range(_WINDOW)]
    weights = [weight / sum(weights) for weight in weights]
    for dim in (2, 3):
        size = images.shape[dim] - _WINDOW + 1
        total = images.narrow(dim, 0, size) * weights[0]
        for k in range(1, _WINDOW):
            total.add_(images.narrow(dim, k, size), alpha=weights[k])
        images = total
    return images
