"""VQGAN: an image as a grid of codes (taming-transformers, arXiv:2012.09841; LlamaGen, arXiv:2406.06525).

Both published forms are this class: taming's has a plain codebook of dimension 256, LlamaGen's an l2-normalised one of
dimension 8. Images of any size divisible by the stride are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..decoders.cnn import CNNDecoder
from ..encoders.cnn import CNNEncoder
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .autoencoder import AutoencoderTokenizer


class VQGAN(AutoencoderTokenizer):
    """CNN encoder, 1x1 projections around the quantizer, CNN decoder; pixels in [-1, 1] inside.

    Args:
        quantizer: latents to codes; any ``dim``.
        image_size: native side or ``(H, W)`` in pixels.
        channels: channels at full resolution, a multiple of 32.
        channel_multipliers: one per level; the stride is 2 to the number of levels minus one (five levels: 16).
        num_blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels between CNN and projections.
        attention_levels: levels (0 = full resolution) with attention; the lowest one if ``None``.
        dropout: dropout inside the residual blocks.
        regularizers: act on the quantized latents in training.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        latent_channels: int = 256,
        attention_levels: Sequence[int] | None = None,
        dropout: float = 0.0,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        common = {
            "channels": channels,
            "channel_multipliers": channel_multipliers,
            "attention_levels": attention_levels,
            "dropout": dropout,
        }
        super().__init__(
            encoder=CNNEncoder(num_blocks=num_blocks, out_dim=latent_channels, **common),
            quantizer=quantizer,
            decoder=CNNDecoder(num_blocks=num_blocks + 1, in_dim=latent_channels, **common),
            regularizers=regularizers,
            image_size=image_size,
            pixel_range=(-1.0, 1.0),
            projections="always",
        )
