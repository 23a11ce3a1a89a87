"""Continuous latents instead of codes: the variational relatives of discrete tokenizers (arXiv:1312.6114).

The encoder gives a Gaussian per latent, the decoder takes a draw of it in training and its mean afterwards. TiTok
(arXiv:2406.07550) and TA-TiTok (arXiv:2501.07730) are published in this form too, as what the discrete ones are
compared with. There are no codes, so no :class:`~vistok.tokenizers.base.Tokens`: ``posterior`` and ``decode_latents``
take the place of ``encode`` and ``decode``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from ..decoders.base import Decoder
from ..decoders.latent_vit import LatentViTDecoder
from ..encoders.base import Encoder
from ..encoders.latent_vit import LatentViTEncoder
from ..layers.gaussian import Gaussian
from .base import Stream, TokenizerOutput, Tokens
from .encoder_decoder import EncoderDecoderTokenizer


class GaussianTokenizer(EncoderDecoderTokenizer):
    """Encoder, Gaussian bottleneck and decoder in a row.

    The one loss is ``kl``: the divergence to the standard normal distribution, summed over tokens and channels, mean
    over images; its published weight is 1e-6.

    Args:
        encoder: image to ``(B, N, 2 * D)``, means and log-variances.
        decoder: latents ``(B, N, D)`` to image.
        image_size: native side or ``(H, W)`` for encoders that take any size; an encoder of fixed size brings its own.
        pixel_range: encoder and decoder work in this range; [0, 1] images are mapped to it and back.

    Raises:
        ValueError: for an image size that the encoder does not take, or dimensions that do not match.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        image_size: int | tuple[int, int] | None = None,
        pixel_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(encoder, image_size, pixel_range)
        if encoder.out_dim != 2 * decoder.in_dim:
            raise ValueError(
                f"the encoder must write a mean and a log-variance for each of the decoder's {decoder.in_dim} "
                f"dimensions; its out_dim is {encoder.out_dim}"
            )
        self.decoder = decoder

    @property
    def default_loss_weights(self) -> Mapping[str, float]:
        return {"kl": 1e-6}

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return ()

    def layout(self, image_size: tuple[int, int] | None = None) -> tuple[Stream, ...]:
        return ()

    def posterior(self, images: Tensor) -> Gaussian:
        """The Gaussian ``(B, N, D)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        return Gaussian.from_parameters(self.run_encoder(images))

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """The mean latents ``(B, N, D)`` of images ``(B, 3, H, W)`` in [0, 1]: deterministic, without gradient."""
        return self.posterior(images).mean

    def decode_latents(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Images ``(B, 3, H, W)``, nominally in [0, 1] and not clamped, of latents ``(B, N, D)``.

        See :meth:`~vistok.tokenizers.encoder_decoder.EncoderDecoderTokenizer.run_decoder` for the other arguments.
        """
        return self.run_decoder(latents, grid, mask=mask, context=context)

    def forward(
        self, images: Tensor, *, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See :meth:`Tokenizer.forward`; ``generator`` draws the latents in training. There are no ``tokens``."""
        posterior = self.posterior(images)
        latents = posterior.sample(generator) if self.training else posterior.mean  # (B, N, D)
        grid = self.encoder.grid((images.shape[2], images.shape[3]))
        decoded = self.decode_latents(latents, grid, context=context)
        losses = {"kl": posterior.kl().sum() / len(images)}
        return TokenizerOutput(posterior.mean, latents, None, losses, decoded=decoded)

    def encode(self, images: Tensor) -> NoReturn:
        """There are no tokens.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} is continuous and has no tokens; use posterior() or encode_latents()")

    def decode(self, tokens: Tokens, *, clamp: bool = True, context: Tensor | None = None) -> NoReturn:
        """There are no tokens.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} is continuous and decodes no tokens; use decode_latents()")


class ContinuousTiTok(GaussianTokenizer):
    """Single-stage TiTok or TA-TiTok with Gaussian latents.

    Published: LL-32, BL-64 and BL-128 (large, base, base encoder; large decoder) without text, BL-32, BL-64 and SL-128
    with text, all with latents of dimension 16.

    Args:
        latent_dim: D, the size of a latent.
        image_size: side or ``(H, W)`` in pixels, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the number of latents of an image.
        encoder_size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        decoder_size: likewise.
        text_dim: C of the text features ``(B, T, C)`` that the decoder then needs as ``context``, 768 for TA-TiTok; no
            text if ``None``.
        text_length: T, their number.
    """

    def __init__(
        self,
        latent_dim: int = 16,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 64,
        encoder_size: str | tuple[int, int, int] = "base",
        decoder_size: str | tuple[int, int, int] = "large",
        text_dim: int | None = None,
        text_length: int = 77,
    ) -> None:
        super().__init__(
            encoder=LatentViTEncoder(image_size, patch_size, num_latent_tokens, 2 * latent_dim, encoder_size),
            decoder=LatentViTDecoder(
                image_size, patch_size, num_latent_tokens, latent_dim, decoder_size, text_dim, text_length
            ),
        )
