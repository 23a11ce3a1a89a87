"""Full-reference metrics of a reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return -10 * torch.log10(error.clamp(min=1e-10))
