"""The discriminator contract: images to logits."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class Discriminator(nn.Module):
    """Base class of discriminators. A subclass implements :meth:`score`.

    Args:
        pixel_range: what :meth:`score` sees [0, 1] as: ``(-1, 1)`` for networks that were published with it.

    Attributes:
        batch_statistics: whether the logits of an image depend on the rest of the batch (batch norm, minibatch standard
            deviation). Real images and reconstructions are then scored one after the other, else together.

    Raises:
        ValueError: for an empty pixel range.
    """

    batch_statistics: bool = False

    def __init__(self, pixel_range: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        low, high = pixel_range
        if not low < high:
            raise ValueError(f"pixel_range must be (low, high) with low < high; got {pixel_range}")
        self.pixel_range = (low, high)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, ...)``, large for real, of images ``(B, 3, H, W)`` nominally in [0, 1]."""
        low, high = self.pixel_range
        if (low, high) != (0.0, 1.0):
            images = images * (high - low) + low
        return self.score(images)

    @abstractmethod
    def score(self, images: Tensor) -> Tensor:
        """Logits ``(B, ...)`` of images ``(B, 3, H, W)`` in :attr:`pixel_range`."""
