"""What losses between two batches of images have in common: equal shapes, and float32 where numbers are summed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_pair(reconstructions: Tensor, images: Tensor) -> None:
    """Refuse shapes that broadcasting would compare without a word.

    Raises:
        ValueError: unless both are ``(B, 3, H, W)`` with the same sizes.
    """
    if reconstructions.shape != images.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"reconstructions and images must both be (B, 3, H, W); got {tuple(reconstructions.shape)} and "
            f"{tuple(images.shape)}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
