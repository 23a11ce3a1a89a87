"""Pixel losses: mean absolute and mean squared error, mixed freely."""

from __future__ import annotations

from torch import Tensor, nn


class PixelLoss(nn.Module):
    """``l1 * mean |x - y| + l2 * mean (x - y)^2``, in float32.

    Args:
        l1: weight of the mean absolute error.
        l2: weight of the mean squared error.
    """

    def __init__(self, l1: float = 0.0, l2: float = 1.0) -> None:
        super().__init__()
        if l1 < 0 or l2 < 0 or l1 + l2 == 0:
            raise ValueError(f"l1 and l2 must not be negative, nor both 0; got l1={l1}, l2={l2}")
        self.l1 = l1
        self.l2 = l2

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Scalar loss of ``(B, 3, H, W)`` against ``(B, 3, H, W)``, both nominally in [0, 1]."""
        difference = reconstructions.float() - images.float()
        loss = difference.new_zeros(())
        if self.l1:
            loss = loss + self.l1 * difference.abs().mean()
        if self.l2:
            loss = loss + self.l2 * difference.square().mean()
        return loss
