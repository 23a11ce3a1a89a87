"""Vision transformer that decodes a 1D sequence to pixels (TiTok's single-stage decoder, arXiv:2406.07550).

One mask token per patch, a class token and the latents run through one transformer; every patch output becomes its
pixels by a linear layer, and a 3x3 convolution smooths the seams. A sequence shorter than N is decoded as it is, with
the first positions, so variable-length tokenizers need nothing else.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..layers.sizes import image_hw, transformer_size
from ..layers.transformer import PUBLISHED_WIDTH, Block, init_transformer, token_std
from .base import Decoder


class LatentViTDecoder(Decoder):
    """Latent tokens in, image out.

    Args:
        image_size: side of square images, or ``(H, W)``, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the longest sequence taken.
        in_dim: D of the latents.
        size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 64,
        in_dim: int = 64,
        size: str | tuple[int, int, int] = "large",
    ) -> None:
        super().__init__()
        width, layers, heads = transformer_size(size)
        self.image_size = image_hw(image_size, patch_size)
        self.patch_size = patch_size
        self.in_dim = in_dim
        self.patch_grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        num_patches = self.patch_grid[0] * self.patch_grid[1]
        scale = token_std(width)
        self.embed = nn.Linear(in_dim, width)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, width))
        self.position = nn.Parameter(scale * torch.randn(1 + num_patches, width))
        self.latent_position = nn.Parameter(scale * torch.randn(num_latent_tokens, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, 3 * patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        init_transformer(self, width)
        if width < PUBLISHED_WIDTH:
            nn.init.dirac_(self.conv_out.weight)  # the pixels of a patch pass unchanged at first

    def forward(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        batch, length = latents.shape[:2]
        if not 1 <= length <= len(self.latent_position):
            raise ValueError(f"this decoder takes 1 to {len(self.latent_position)} tokens; got {length}")
        num_patches = self.patch_grid[0] * self.patch_grid[1]
        x = torch.cat([self.class_token.expand(batch, 1, -1), self.mask_token.expand(batch, num_patches, -1)], 1)
        x = x + self.position  # (B, 1 + P, width)
        latents = self.embed(latents) + self.latent_position[:length]  # (B, N, width)
        x = self.norm_in(torch.cat([x, latents], 1))  # (B, 1 + P + N, width)
        for block in self.blocks:
            x = block(x)
        pixels = self.to_pixels(self.norm_out(x[:, 1 : 1 + num_patches]))  # (B, P, p * p * 3)
        images = rearrange(
            pixels,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.patch_grid[0],
            p=self.patch_size,
            q=self.patch_size,
        )
        return self.conv_out(images)  # (B, 3, H, W)
