"""TiTok: an image as a short 1D sequence (arXiv:2406.07550).

The single-stage form with a pixel head: ViT encoder with latent queries, vector quantizer, ViT decoder. Published
single-stage models: BL-64 and BL-128 (base encoder, large decoder), SL-256 (small, large), with 8192 codes of dimension
64 and no l2 normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..decoders.latent_vit import LatentViTDecoder
from ..encoders.latent_vit import LatentViTEncoder
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .autoencoder import AutoencoderTokenizer


class TiTok(AutoencoderTokenizer):
    """ViT with latent queries, quantizer, ViT with mask tokens.

    Args:
        quantizer: its ``dim`` is the size of the latents.
        image_size: side or ``(H, W)`` in pixels, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the number of tokens of an image.
        encoder_size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        decoder_size: likewise.
        regularizers: act on the quantized latents in training.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 64,
        encoder_size: str | tuple[int, int, int] = "base",
        decoder_size: str | tuple[int, int, int] = "large",
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        super().__init__(
            encoder=LatentViTEncoder(image_size, patch_size, num_latent_tokens, quantizer.dim, encoder_size),
            quantizer=quantizer,
            decoder=LatentViTDecoder(image_size, patch_size, num_latent_tokens, quantizer.dim, decoder_size),
            regularizers=regularizers,
        )
