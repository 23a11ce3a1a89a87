"""TA-TiTok: TiTok whose decoder also reads a caption (arXiv:2501.07730).

The decoder sees the text features of a frozen CLIP behind the latents, so the tokens need not carry what the caption
says; the encoder sees the image alone, and tokens are made without text. The features come from outside, as
``context``: all 77 outputs of the text tower of OpenAI's CLIP ViT-L/14-336 after its last normalisation, neither pooled
nor projected. The published tokenizers are evaluated with the caption "A photo of a {class}.".

Published are BL-32, BL-64 and BL-128 (base encoder, large decoder) with 8192 codes of dimension 64 and no l2
normalisation; the continuous ones are a :class:`~vistok.tokenizers.continuous.ContinuousTiTok` with ``text_dim``. The
published code leaves the decoder with PyTorch's own initialisation, by accident of its order; here it starts as TiTok's
does.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..decoders.latent_vit import LatentViTDecoder
from ..encoders.latent_vit import LatentViTEncoder
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .autoencoder import AutoencoderTokenizer


class TATiTok(AutoencoderTokenizer):
    """Single-stage TiTok with text features in the decoder: ``forward`` and ``decode`` need ``context``.

    Args:
        quantizer: its ``dim`` is the size of the latents.
        image_size: side or ``(H, W)`` in pixels, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the number of tokens of an image.
        encoder_size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        decoder_size: likewise.
        regularizers: act on the quantized latents in training.
        text_dim: C of the text features ``(B, T, C)``.
        text_length: T, their number.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 32,
        encoder_size: str | tuple[int, int, int] = "base",
        decoder_size: str | tuple[int, int, int] = "large",
        regularizers: Sequence[Regularizer] = (),
        text_dim: int = 768,
        text_length: int = 77,
    ) -> None:
        dim = quantizer.dim
        super().__init__(
            encoder=LatentViTEncoder(image_size, patch_size, num_latent_tokens, dim, encoder_size),
            quantizer=quantizer,
            decoder=LatentViTDecoder(
                image_size, patch_size, num_latent_tokens, dim, decoder_size, text_dim, text_length
            ),
            regularizers=regularizers,
        )
