"""One-D-Piece: a sequence that may end anywhere (arXiv:2501.10064).

Two-stage TiTok with 256 tokens whose tail is dropped at random in both stages of training, so any prefix decodes, with
1 to 256 tokens of 12 bits. Published are S-256, B-256 and L-256 (encoder and decoder of one size), with 4096 codes of
dimension 12, l2-normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..decoders.base import Decoder
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from ..regularizers.tail_drop import TailTokenDrop
from .titok import TwoStageTiTok


class OneDPiece(TwoStageTiTok):
    """Two-stage TiTok of variable length: ``decode(tokens.truncate(n))`` for every n.

    Args:
        quantizer: its ``dim`` is the size of the latents.
        image_size: side or ``(H, W)`` in pixels, divisible by ``patch_size``.
        patch_size: side of a patch in pixels; the stride of the proxy tokenizer.
        num_latent_tokens: N, the largest number of tokens of an image.
        encoder_size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        decoder_size: likewise.
        regularizers: act on the quantized latents in training; ``None`` for the published one,
            ``TailTokenDrop(per="batch")``.
        num_proxy_codes: size of the proxy tokenizer's codebook.
        pixel_decoder: the proxy tokenizer's decoder; ``None`` for stage 1.
        legacy_layout: the layout of the latents that the published models have; N must divide the encoder's width.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 256,
        encoder_size: str | tuple[int, int, int] = "small",
        decoder_size: str | tuple[int, int, int] = "small",
        regularizers: Sequence[Regularizer] | None = None,
        num_proxy_codes: int = 1024,
        pixel_decoder: Decoder | None = None,
        legacy_layout: bool = True,
    ) -> None:
        super().__init__(
            quantizer,
            image_size,
            patch_size,
            num_latent_tokens,
            encoder_size,
            decoder_size,
            [TailTokenDrop(per="batch")] if regularizers is None else regularizers,
            num_proxy_codes,
            pixel_decoder,
            legacy_layout,
        )

    @property
    def variable_length(self) -> bool:
        return True
