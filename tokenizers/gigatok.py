"""GigaTok: tokenizers of up to three billion parameters (arXiv:2504.08736).

A convolutional encoder, a transformer, the quantizer, a transformer and a convolutional decoder. In :class:`GigaTok`
the transformers are Q-Formers and the codes a 1D sequence: 256 of 16384 codes of dimension 8, l2-normalised, with the
rotation trick. :class:`GigaTok2D` is the paper's comparison, vision transformers on the grid.

What lets the large ones learn is in the recipe: alignment of the decoder's third layer with DINOv2 (S-S to XL-XXL) and
entropy regularisation of the codebook (XL-XXL).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..decoders.adaptive_cnn import AdaptiveCNNDecoder
from ..decoders.grid_vit import GridViTDecoder
from ..decoders.q_former import QFormerDecoder
from ..encoders.cnn import CNNEncoder
from ..encoders.grid_vit import GridViTEncoder
from ..encoders.q_former import QFormerEncoder
from ..layers.sizes import image_hw
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .autoencoder import AutoencoderTokenizer


class GigaTok(AutoencoderTokenizer):
    """CNN, Q-Former, quantizer, Q-Former, CNN; pixels in [-1, 1] inside.

    Args:
        quantizer: latents to codes; any ``dim``.
        image_size: side or ``(H, W)`` in pixels, divisible by the stride (five levels: 16).
        num_latent_tokens: N, the number of tokens of an image, a power of two.
        encoder_size: of the encoder's Q-Former: ``tiny``, ``small``, ``base``, ``large``, ``xl``, ``xxl``, ``xxxl`` or
            ``(width, layers, heads)``.
        decoder_size: likewise.
        channels: of the CNNs at full resolution, a multiple of 32.
        channel_multipliers: one per level of the CNNs.
        num_blocks: residual blocks per level of the CNN encoder; the decoder has one more.
        latent_channels: of the features between CNNs, Q-Formers and projections.
        regularizers: act on the quantized latents in training.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        num_latent_tokens: int = 256,
        encoder_size: str | tuple[int, int, int] = "small",
        decoder_size: str | tuple[int, int, int] = "small",
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        latent_channels: int = 256,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        cnn_encoder, cnn_decoder = _cnns(channels, channel_multipliers, num_blocks, latent_channels)
        grid = cnn_encoder.grid(image_hw(image_size, cnn_encoder.stride))
        super().__init__(
            encoder=QFormerEncoder(cnn_encoder, image_size, num_latent_tokens, latent_channels, encoder_size),
            quantizer=quantizer,
            decoder=QFormerDecoder(cnn_decoder, grid, num_latent_tokens, latent_channels, decoder_size),
            regularizers=regularizers,
            pixel_range=(-1.0, 1.0),
            projections="always",
        )


class GigaTok2D(AutoencoderTokenizer):
    """CNN, ViT, quantizer, ViT, CNN; a grid of tokens; pixels in [-1, 1] inside.

    Args:
        quantizer: latents to codes; any ``dim``.
        image_size: side or ``(H, W)`` in pixels, divisible by the stride (five levels: 16).
        encoder_size: of the encoder's ViT, as in :class:`GigaTok`.
        decoder_size: likewise.
        reads_input: the layers attend to their own input besides, see :class:`~vistok.layers.grid_vit.GridViT`; so does
            the paper's smallest model.
        channels: of the CNNs at full resolution, a multiple of 32.
        channel_multipliers: one per level of the CNNs.
        num_blocks: residual blocks per level of the CNN encoder; the decoder has one more.
        latent_channels: of the features between CNNs, ViTs and projections.
        regularizers: act on the quantized latents in training.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        encoder_size: str | tuple[int, int, int] = "small",
        decoder_size: str | tuple[int, int, int] = "small",
        reads_input: bool = False,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        latent_channels: int = 256,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        cnn_encoder, cnn_decoder = _cnns(channels, channel_multipliers, num_blocks, latent_channels)
        grid = cnn_encoder.grid(image_hw(image_size, cnn_encoder.stride))
        super().__init__(
            encoder=GridViTEncoder(cnn_encoder, image_size, latent_channels, encoder_size, reads_input),
            quantizer=quantizer,
            decoder=GridViTDecoder(cnn_decoder, grid, latent_channels, decoder_size, reads_input),
            regularizers=regularizers,
            pixel_range=(-1.0, 1.0),
            projections="always",
        )


def _cnns(
    channels: int, channel_multipliers: Sequence[int], num_blocks: int, latent_channels: int
) -> tuple[CNNEncoder, AdaptiveCNNDecoder]:
    encoder = CNNEncoder(
        channels, channel_multipliers, num_blocks, latent_channels, attention_levels=(), middle_attention=False
    )
    return encoder, AdaptiveCNNDecoder(channels, channel_multipliers, num_blocks + 1, latent_channels)
