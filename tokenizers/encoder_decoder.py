"""What tokenizers with an encoder at one end and a decoder at the other share, whatever stands between the two.

Image sizes, the pixel range that the parts work in, and what a decoder may be given besides latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoders.base import Decoder
from ..encoders.base import Encoder
from ..layers.sizes import image_hw
from .base import Tokenizer


class EncoderDecoderTokenizer(Tokenizer):
    """Base class; a subclass sets :attr:`decoder` and puts a bottleneck between.

    Args:
        encoder: image to latents.
        image_size: native side or ``(H, W)`` for encoders that take any size; an encoder of fixed size brings its own.
        pixel_range: encoder and decoder work in this range; [0, 1] images are mapped to it and back.

    Attributes:
        decoder: latents to image.

    Raises:
        ValueError: for an image size that the encoder does not take.
    """

    decoder: Decoder

    def __init__(
        self,
        encoder: Encoder,
        image_size: int | tuple[int, int] | None = None,
        pixel_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if image_size is None and encoder.image_size is None:
            raise ValueError("image_size is needed: this encoder takes images of any size")
        own_size = encoder.image_size if image_size is None else image_hw(image_size, encoder.stride)
        if encoder.image_size is not None and own_size != encoder.image_size:
            raise ValueError(f"image_size {own_size} differs from the encoder's {encoder.image_size}")
        self._image_size = own_size
        self.pixel_range = (float(pixel_range[0]), float(pixel_range[1]))
        self.encoder = encoder

    @property
    def image_size(self) -> tuple[int, int]:
        return self._image_size

    @property
    def stride(self) -> int:
        return self.encoder.stride

    @property
    def any_image_size(self) -> bool:
        return self.encoder.image_size is None

    @property
    def takes_context(self) -> bool:
        return self.decoder.takes_context

    def run_encoder(self, images: Tensor) -> Tensor:
        """The encoder's output ``(B, N, D)`` for images ``(B, 3, H, W)`` in [0, 1]."""
        self.check_images(images)
        low, high = self.pixel_range
        images = images.to(weight_dtype(self.encoder, images.dtype))
        return self.encoder(images * (high - low) + low)

    def run_decoder(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Images ``(B, 3, H, W)``, nominally in [0, 1] and not clamped, of the latents that the decoder takes.

        Args:
            latents: ``(B, N, D)``.
            grid: ``(h, w)`` of the latents where they lie on a grid.
            mask: ``(B, N)`` bool, ``True`` = keep.
            context: ``(B, T, C)`` conditioning features.

        Raises:
            ValueError: for a mask or a context that the decoder does not take, or a context that it needs and does not
                get.
        """
        name, given = type(self.decoder).__name__, {}
        if mask is not None:
            if not self.decoder.takes_mask:
                raise ValueError(f"{name} cannot leave tokens out: it takes no mask, only whole sequences")
            given["mask"] = mask
        if self.takes_context and context is None:
            raise ValueError(f"{name} needs context: conditioning features (B, T, C), such as those of a text encoder")
        if context is not None:
            if not self.takes_context:
                raise ValueError(f"{name} takes no context; got features of shape {tuple(context.shape)}")
            given["context"] = context
        low, high = self.pixel_range
        latents = latents.to(weight_dtype(self.decoder, latents.dtype))
        return (self.decoder(latents, grid, **given) - low) / (high - low)


def weight_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """What a module computes in: a bottleneck may hand on float32 in a tokenizer that was cast to bfloat16."""
    return next((parameter.dtype for parameter in module.parameters()), default)
