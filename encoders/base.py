"""The encoder contract: image to latents."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..layers.configurable import Configurable


class Encoder(Configurable):
    """Base class of encoders.

    Attributes:
        out_dim: D of the latents.
        stride: height and width of an image must be divisible by this.
        image_size: the only ``(H, W)`` taken, or ``None`` for every size divisible by :attr:`stride`.
    """

    out_dim: int
    stride: int
    image_size: tuple[int, int] | None = None

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Latents ``(B, N, D)`` of images ``(B, 3, H, W)`` in the range that the tokenizer chose."""

    @abstractmethod
    def num_tokens(self, image_size: tuple[int, int]) -> int:
        """N for images of ``(H, W)``."""

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """``(h, w)`` if the latents lie on a grid in raster order, else ``None``."""
        return None
