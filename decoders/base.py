"""The decoder contract: quantized latents to image."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..layers.configurable import Configurable


class Decoder(Configurable):
    """Base class of decoders.

    Attributes:
        in_dim: D of the latents taken.
    """

    in_dim: int

    @abstractmethod
    def forward(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images ``(B, 3, H, W)``, not clamped, of latents ``(B, N, D)``.

        Args:
            latents: quantized latents.
            grid: ``(h, w)`` of the latents where they lie on a grid.
        """
