"""The decoder contract: quantized latents to image."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from ..layers.configurable import Configurable


class Decoder(Configurable):
    """Base class of decoders.

    Attributes:
        in_dim: D of the latents taken.
        takes_mask: whether ``forward`` can leave out positions of a batch, sample by sample.
        takes_context: whether ``forward`` needs conditioning features (text).
        makes_images: whether ``forward`` works; the first stage of a two-stage recipe only predicts codes.
    """

    in_dim: int
    takes_mask: bool = False
    takes_context: bool = False
    makes_images: bool = True

    @abstractmethod
    def forward(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Images ``(B, 3, H, W)``, not clamped, of latents ``(B, N, D)``.

        Args:
            latents: quantized latents.
            grid: ``(h, w)`` of the latents where they lie on a grid.
            mask: ``(B, N)`` bool, ``True`` = keep; given only to decoders with :attr:`takes_mask`. The image is that of
                the kept latents alone.
            context: ``(B, T, C)`` conditioning features; given only to decoders with :attr:`takes_context`.
        """

    @property
    def last_layer(self) -> nn.Parameter | None:
        """The weight that makes the pixels, at which adaptive loss weights compare gradients; ``None`` if none is."""
        return None
