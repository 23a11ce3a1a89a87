"""Vision transformer with latent queries: image to a 1D sequence (TiTok, arXiv:2406.07550).

Patches, a class token and N learned latent tokens run through one transformer with full attention; the N latent outputs
are the code sequence, so their number does not depend on the image size.

The two-stage TiTok models and One-D-Piece were trained with their last step re-viewing the tokens ``(N, width)`` as
``(width, N)`` where a transposition was meant: code n is made of the channels d = n mod N of all tokens. That is
:attr:`legacy_layout`; their weights mean nothing without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.sizes import image_hw, transformer_size
from ..layers.transformer import Block, init_transformer, token_std
from .base import Encoder


class LatentViTEncoder(Encoder):
    """Patches plus latent queries in, latent tokens out.

    Args:
        image_size: side of square images, or ``(H, W)``, divisible by ``patch_size``.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the length of the code sequence.
        out_dim: D of the latents.
        size: ``small``, ``base``, ``large`` or ``(width, layers, heads)``.
        legacy_layout: make code n of the channels d = n mod N of all latent tokens, not of token n; N must divide the
            width.

    Attributes:
        patch_grid: ``(h, w)`` of the patches.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 64,
        out_dim: int = 64,
        size: str | tuple[int, int, int] = "base",
        legacy_layout: bool = False,
    ) -> None:
        super().__init__()
        width, layers, heads = transformer_size(size)
        if legacy_layout and width % num_latent_tokens:
            raise ValueError(
                f"legacy_layout shares the width among the tokens: num_latent_tokens must divide {width}; "
                f"got {num_latent_tokens}"
            )
        self.image_size = image_hw(image_size, patch_size)
        self.stride = patch_size
        self.out_dim = out_dim
        self.legacy_layout = legacy_layout
        self.patch_grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        scale = token_std(width)
        self.patchify = nn.Conv2d(3, width, patch_size, patch_size)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.position = nn.Parameter(scale * torch.randn(1 + self.num_patches, width))
        self.latent_tokens = nn.Parameter(scale * torch.randn(num_latent_tokens, width))
        self.latent_position = nn.Parameter(scale * torch.randn(num_latent_tokens, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_dim)
        init_transformer(self, width)

    @property
    def num_patches(self) -> int:
        """P, the number of patches."""
        return self.patch_grid[0] * self.patch_grid[1]

    def patch_tokens(self, hidden: Tensor) -> Tensor:
        """The patches ``(B, P, width)``, in raster order, among the outputs ``(B, 1 + P + N, width)`` of a block."""
        return hidden[:, 1 : 1 + self.num_patches]

    def num_tokens(self, image_size: tuple[int, int]) -> int:
        return len(self.latent_tokens)

    def forward(self, images: Tensor) -> Tensor:
        batch = len(images)
        patches = self.patchify(images).flatten(2).transpose(1, 2)  # (B, P, width)
        x = torch.cat([self.class_token.expand(batch, 1, -1), patches], 1) + self.position  # (B, 1 + P, width)
        latents = (self.latent_tokens + self.latent_position).expand(batch, -1, -1)  # (B, N, width)
        x = self.norm_in(torch.cat([x, latents], 1))  # (B, 1 + P + N, width)
        for block in self.blocks:
            x = block(x)
        tokens = self.norm_out(x[:, -latents.shape[1] :])  # (B, N, width)
        if self.legacy_layout:
            tokens = tokens.flatten(1).unflatten(1, (-1, latents.shape[1])).mT  # (B, N, width), re-viewed
        return self.out(tokens)  # (B, N, D)
