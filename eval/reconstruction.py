"""PSNR: how far the pixels of a reconstruction are from those of its original.

Every image has a PSNR of its own, and their mean is reported, as most tokenizer papers do. The PSNR of the squared
error of all pixels together, which others report, is lower (by 1 to 2 dB on photographs), because the worst images
weigh most in it; it stands beside under its own name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .metric import Pairs, PerImageMetric

_SMALLEST_ERROR = 1e-10  # of pixels in [0, 1]: 100 dB


class PSNR(PerImageMetric):
    """Peak signal-to-noise ratio of uint8 pixels, in dB, mean over the images; an exact image counts as 100 dB."""

    names = ("psnr",)

    @torch.no_grad()
    def values(self, pairs: Pairs) -> dict[str, Tensor]:
        batches = zip(_parts(pairs.reconstructions), _parts(pairs.originals.images), strict=True)
        errors = [(x.float() - y.float()).square_().mean((1, 2, 3)) for x, y in batches]
        return {"psnr": _decibels(torch.cat(errors) / 255**2)}

    def details(self) -> dict[str, Any]:
        """``psnr_of_mean_error``: of the squared error averaged over all images, in dB."""
        values = self.table()[1].double()
        return {"psnr_of_mean_error": float(_decibels((10 ** (-values / 10)).mean()))}


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image, in dB.

    Args:
        reconstructions: ``(B, 3, H, W)``, clamped to [0, 1] here.
        images: ``(B, 3, H, W)`` in [0, 1].

    Returns:
        ``(B,)`` float32; an exact reconstruction gives 100 dB instead of infinity, so that means stay finite.
    """
    if reconstructions.shape != images.shape:
        raise ValueError(
            f"reconstructions and images must have one shape; got {tuple(reconstructions.shape)} and "
            f"{tuple(images.shape)}"
        )
    error = (reconstructions.float().clamp(0, 1) - images.float()).square().mean((1, 2, 3))
    return _decibels(error)


def _decibels(error: Tensor) -> Tensor:
    """PSNR of mean squared errors of pixels in [0, 1]."""
    return -10 * torch.log10(error.clamp(min=_SMALLEST_ERROR))


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    """A batch in parts; on a CPU small enough to stay in its cache."""
    pixels = 1 << 18 if images.device.type == "cpu" else 1 << 24
    return images.split(max(1, pixels // images[0, 0].numel()))
