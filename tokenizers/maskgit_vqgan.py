"""The VQGAN of MaskGIT (arXiv:2202.04200): an image as a grid of codes, without attention.

Its codes are the targets of TiTok's first stage (arXiv:2406.07550). The released one has a plain codebook of 1024 codes
of dimension 256 and makes 16x16 tokens of 256x256 pixels. Images of any size divisible by the stride are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..decoders.maskgit import MaskGITDecoder
from ..encoders.maskgit import MaskGITEncoder
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .autoencoder import AutoencoderTokenizer


class MaskGITVQGAN(AutoencoderTokenizer):
    """CNN encoder, quantizer, CNN decoder; pixels in [0, 1] inside.

    Args:
        quantizer: latents to codes; published ``VectorQuantizer(1024, 256)``. Linear layers stand around it if its
            ``dim`` is not ``latent_channels``.
        image_size: native side or ``(H, W)`` in pixels.
        channels: channels at full resolution, a multiple of 32.
        channel_multipliers: one per level; the stride is 2 to the number of levels minus one (five levels: 16).
        num_blocks: residual blocks per level, and in the middle.
        latent_channels: channels of the encoder's output and the decoder's input.
        shortcut_of: see :class:`~vistok.layers.maskgit.MaskGITBlock`; the published weights need ``output``.
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
        shortcut_of: Literal["input", "output"] = "output",
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        common = {
            "channels": channels,
            "channel_multipliers": channel_multipliers,
            "num_blocks": num_blocks,
            "shortcut_of": shortcut_of,
        }
        super().__init__(
            encoder=MaskGITEncoder(out_dim=latent_channels, **common),
            quantizer=quantizer,
            decoder=MaskGITDecoder(in_dim=latent_channels, **common),
            regularizers=regularizers,
            image_size=image_size,
        )
