"""The decoder contract: quantized latents to image."""

from __future__ import annotations

from abc import abstractmethod

import torch
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


def check_sequence(latents: Tensor, mask: Tensor | None, longest: int) -> None:
    """Raise unless a sequence and its mask suit a decoder of 1D sequences.

    Args:
        latents: ``(B, N, D)``.
        mask: ``(B, N)`` bool, or ``None``.
        longest: the largest N taken.

    Raises:
        ValueError: for another number of latents, or a mask of another shape or type.
    """
    expected = tuple(latents.shape[:2])
    if not 1 <= expected[1] <= longest:
        raise ValueError(f"this decoder takes 1 to {longest} tokens; got {expected[1]}")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != expected):
        raise ValueError(f"mask must be bool of shape (B, N) = {expected}; got {mask.dtype} of {tuple(mask.shape)}")
