"""TiTok: an image as a short 1D sequence (arXiv:2406.07550).

ViT encoder with latent queries, vector quantizer, ViT decoder with mask tokens. Two forms are published:

- :class:`TiTok`, single-stage: the decoder makes pixels. BL-64 and BL-128 (base encoder, large decoder) and SL-256
  (small, large), with 8192 codes of dimension 64 and no l2 normalisation.
- :class:`TwoStageTiTok`: the decoder predicts the codes of a MaskGIT-VQGAN (stage 1), whose own decoder then makes the
  pixels (stage 2). S-128, B-64 and L-32, with 4096 codes of dimension 12, l2-normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..decoders.base import Decoder
from ..decoders.latent_vit import LatentViTDecoder
from ..decoders.proxy_code import ProxyCodeDecoder
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


class TwoStageTiTok(AutoencoderTokenizer):
    """TiTok through the codes of another tokenizer.

    Without ``pixel_decoder`` this is stage 1: ``tokenizer.decoder.logits`` predicts proxy codes, and nothing decodes to
    pixels, so ``forward`` and ``decode`` raise (``bottleneck`` and ``encode`` work). Its weights fit into the same
    tokenizer with a ``pixel_decoder``, stage 2, which trains the decoder alone.

    Args:
        quantizer: its ``dim`` is the size of the latents.
        image_size: side or ``(H, W)`` in pixels, divisible by ``patch_size``.
        patch_size: side of a patch in pixels; the stride of the proxy tokenizer.
        num_latent_tokens: N, the number of tokens of an image.
        encoder_size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        decoder_size: likewise.
        regularizers: act on the quantized latents in training.
        num_proxy_codes: size of the proxy tokenizer's codebook.
        pixel_decoder: the proxy tokenizer's decoder; ``None`` for stage 1.
        legacy_layout: the layout of the latents that the published models have, see
            :mod:`vistok.encoders.latent_vit`; N must divide the encoder's width.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 128,
        encoder_size: str | tuple[int, int, int] = "small",
        decoder_size: str | tuple[int, int, int] = "small",
        regularizers: Sequence[Regularizer] = (),
        num_proxy_codes: int = 1024,
        pixel_decoder: Decoder | None = None,
        legacy_layout: bool = True,
    ) -> None:
        dim = quantizer.dim
        super().__init__(
            encoder=LatentViTEncoder(image_size, patch_size, num_latent_tokens, dim, encoder_size, legacy_layout),
            quantizer=quantizer,
            decoder=ProxyCodeDecoder(
                image_size, patch_size, num_latent_tokens, dim, decoder_size, num_proxy_codes, pixel_decoder
            ),
            regularizers=regularizers,
        )
