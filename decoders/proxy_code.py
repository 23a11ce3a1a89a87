"""ViT that decodes a 1D sequence to the codes of another tokenizer (TiTok's two-stage decoder, arXiv:2406.07550).

In the first stage every patch predicts which code a frozen MaskGIT-VQGAN gives it: a classification, with no pixels and
no perceptual losses, that a 1D tokenizer learns from nothing. In the second stage the decoder of that VQGAN turns the
predictions into an image. It takes the mixture of code vectors that the softmax weighs, so gradients pass, and is
trained along with the ViT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.transformer import init_transformer
from .base import Decoder
from .latent_vit import LatentViTTrunk


class ProxyCodeDecoder(LatentViTTrunk):
    """Latent tokens in, logits over proxy codes and, with a pixel decoder, an image out.

    Args:
        image_size: side of square images, or ``(H, W)``, divisible by ``patch_size``.
        patch_size: side of a patch in pixels; the stride of the tokenizer whose codes are predicted.
        num_latent_tokens: N, the longest sequence taken.
        in_dim: D of the latents.
        size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        num_codes: K, the number of proxy codes.
        pixel_decoder: decodes a grid of code vectors to pixels; ``None`` in the first stage.

    Attributes:
        codebook: ``(K, pixel_decoder.in_dim)``, trained with the rest; ``None`` in the first stage. It starts as a
            random codebook does, to be replaced by that of the proxy tokenizer.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 128,
        in_dim: int = 12,
        size: str | tuple[int, int, int] = "small",
        num_codes: int = 1024,
        pixel_decoder: Decoder | None = None,
    ) -> None:
        super().__init__(image_size, patch_size, num_latent_tokens, in_dim, size)
        if num_codes < 1:
            raise ValueError(f"num_codes must be positive; got {num_codes}")
        self.to_logits = nn.Sequential(
            nn.Linear(self.width, 2 * self.width), nn.Tanh(), nn.Linear(2 * self.width, num_codes)
        )
        init_transformer(self, self.width)  # before the pixel decoder is there, which has its own start
        self.codebook = None
        if pixel_decoder is not None:
            codes = torch.empty(num_codes, pixel_decoder.in_dim)
            self.codebook = nn.Parameter(codes.uniform_(-1 / num_codes, 1 / num_codes))
        self.pixel_decoder = pixel_decoder

    @property
    def makes_images(self) -> bool:
        return self.pixel_decoder is not None

    @property
    def last_layer(self) -> nn.Parameter | None:
        return None if self.pixel_decoder is None else self.pixel_decoder.last_layer

    def logits(self, latents: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, P, K)`` of the proxy codes of all patches, in raster order."""
        return self.to_logits(self.patch_features(latents, mask=mask))

    def mixture(self, logits: Tensor) -> Tensor:
        """Code vectors ``(B, P, C)``, weighed by the softmax of logits ``(B, P, K)``; in float32, also under autocast.

        Raises:
            ValueError: in the first stage, which has no code vectors.
        """
        if self.codebook is None:
            raise ValueError(
                "this decoder predicts proxy codes and has no pixel_decoder (the first stage): use logits() and a loss "
                "on codes, or give a pixel_decoder"
            )
        with torch.autocast(logits.device.type, enabled=False):
            # Near-certain predictions mix 1023 small weights: bfloat16 would round them, and their gradients, away.
            dtype = torch.promote_types(torch.promote_types(logits.dtype, self.codebook.dtype), torch.float32)
            mixed = logits.to(dtype).softmax(-1) @ self.codebook.to(dtype)
        return mixed.to(self.codebook.dtype)

    def forward(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        logits = self.to_logits(self.patch_features(latents, mask=mask, context=context))  # (B, P, K)
        codes = self.mixture(logits)  # (B, P, C)
        return self.pixel_decoder(codes, self.patch_grid)  # (B, 3, H, W)
