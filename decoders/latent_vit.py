"""Vision transformer that decodes a 1D sequence (TiTok, arXiv:2406.07550).

One mask token per patch, a class token and the latents run through one transformer; a head turns every patch output
into what it stands for: pixels here, codes of another tokenizer in :mod:`vistok.decoders.proxy_code`. A sequence
shorter than N is decoded as it is, with the first positions, so variable-length tokenizers need nothing else; a mask
leaves tokens out sample by sample. Text features, where a model takes them (TA-TiTok, arXiv:2501.07730), stand behind
the latents.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..layers.sizes import image_hw, transformer_size
from ..layers.transformer import PUBLISHED_WIDTH, Block, init_transformer, token_std
from .base import Decoder, check_sequence


class LatentViTTrunk(Decoder):
    """Latents in, one feature per patch out; a subclass adds the head and initialises.

    Args:
        image_size: side of square images, or ``(H, W)``, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the longest sequence taken.
        in_dim: D of the latents.
        size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        text_dim: C of the text features that the decoder then needs as ``context``; no text if ``None``.
        text_length: T, their number.

    Attributes:
        patch_grid: ``(h, w)`` of the patches.
        width: of the features.
    """

    takes_mask = True

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_latent_tokens: int,
        in_dim: int,
        size: str | tuple[int, int, int],
        text_dim: int | None = None,
        text_length: int = 77,
    ) -> None:
        super().__init__()
        width, layers, heads = transformer_size(size)
        self.image_size = image_hw(image_size, patch_size)
        self.patch_size = patch_size
        self.in_dim = in_dim
        self.width = width
        self.patch_grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.takes_context = text_dim is not None
        scale = token_std(width)
        self.embed = nn.Linear(in_dim, width)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, width))
        self.position = nn.Parameter(scale * torch.randn(1 + self.num_patches, width))
        self.latent_position = nn.Parameter(scale * torch.randn(num_latent_tokens, width))
        if text_dim is not None:
            self.embed_text = nn.Linear(text_dim, width)
            self.text_position = nn.Parameter(scale * torch.randn(text_length, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)

    @property
    def num_patches(self) -> int:
        """P, the number of patches."""
        return self.patch_grid[0] * self.patch_grid[1]

    def patch_tokens(self, hidden: Tensor) -> Tensor:
        """The patches ``(B, P, width)``, in raster order, among the outputs ``(B, 1 + P + ..., width)`` of a block."""
        return hidden[:, 1 : 1 + self.num_patches]

    def patch_features(self, latents: Tensor, *, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Features ``(B, P, width)`` of the patches, normalised.

        Args:
            latents: ``(B, N', in_dim)`` with ``1 <= N' <= N``.
            mask: ``(B, N')`` bool, ``True`` = keep. Nothing looks at the other latents.
            context: text features ``(B, T, C)`` if the decoder takes them.

        Raises:
            ValueError: for another number of latents, or a mask or context of another shape.
        """
        batch, length = latents.shape[:2]
        if context is not None and not self.takes_context:
            raise ValueError(f"this decoder was built without text; got context of shape {tuple(context.shape)}")
        check_sequence(latents, mask, len(self.latent_position))
        x = torch.cat([self.class_token.expand(batch, 1, -1), self.mask_token.expand(batch, self.num_patches, -1)], 1)
        parts = [x + self.position, self.embed(latents) + self.latent_position[:length]]
        if self.takes_context:
            parts.append(self._embedded_text(context, batch))
        keys = None if mask is None else self._keys(mask)
        x = self.norm_in(torch.cat(parts, 1))  # (B, 1 + P + N' (+ T), width)
        for block in self.blocks:
            x = block(x, keys)
        return self.norm_out(self.patch_tokens(x))

    def _embedded_text(self, context: Tensor | None, batch: int) -> Tensor:
        expected = (batch, len(self.text_position), self.embed_text.in_features)
        if context is None or tuple(context.shape) != expected:
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context must be text features of shape (B, T, C) = {expected}; got {got}")
        return self.embed_text(context) + self.text_position  # (B, T, width)

    def _keys(self, mask: Tensor) -> Tensor:
        """Which positions of the whole sequence are looked at, ``(B, 1 + P + N' (+ T))``."""
        after = len(self.text_position) if self.takes_context else 0
        return nn.functional.pad(mask, (1 + self.num_patches, after), value=True)


class LatentViTDecoder(LatentViTTrunk):
    """Latent tokens in, image out: TiTok's single-stage decoder.

    Every patch becomes its pixels by a linear layer, and a 3x3 convolution smooths the seams.

    Args:
        image_size: side of square images, or ``(H, W)``, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the longest sequence taken.
        in_dim: D of the latents.
        size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        text_dim: C of the text features that the decoder then needs as ``context``; no text if ``None``.
        text_length: T, their number.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 64,
        in_dim: int = 64,
        size: str | tuple[int, int, int] = "large",
        text_dim: int | None = None,
        text_length: int = 77,
    ) -> None:
        super().__init__(image_size, patch_size, num_latent_tokens, in_dim, size, text_dim, text_length)
        self.to_pixels = nn.Linear(self.width, 3 * patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        init_transformer(self, self.width)
        if self.width < PUBLISHED_WIDTH:
            nn.init.dirac_(self.conv_out.weight)  # the pixels of a patch pass unchanged at first

    @property
    def last_layer(self) -> nn.Parameter:
        return self.conv_out.weight

    def forward(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        pixels = self.to_pixels(self.patch_features(latents, mask=mask, context=context))  # (B, P, p * p * 3)
        images = rearrange(
            pixels,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.patch_grid[0],
            p=self.patch_size,
            q=self.patch_size,
        )
        return self.conv_out(images)  # (B, 3, H, W)
