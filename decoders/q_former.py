"""Q-Former decoder: a 1D sequence back to a grid of features (GigaTok, arXiv:2504.08736).

There is one query per cell of the grid, and all start as the same vector, the embedded first token: only the positions,
which every layer adds to queries and keys, tell the cells apart. A grid decoder makes the image of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.layout import DeviceLayout
from ..layers.q_former import QFormerBlock, init_q_former, q_former_size
from ..layers.transformer import token_std
from .base import Decoder, check_sequence
from .cnn import latent_map


class QFormerDecoder(DeviceLayout, Decoder):
    """Q-Former that spreads latent tokens over a grid, then a grid decoder.

    A sequence shorter than N is decoded as it is, with the first positions; a mask leaves tokens out sample by sample
    (cells whose first token is left out start as zero).

    Args:
        grid_decoder: a grid of features to the image.
        patch_grid: ``(h, w)`` of the features.
        num_latent_tokens: N, the longest sequence taken.
        in_dim: D of the latents.
        size: ``tiny`` to ``xxxl`` as GigaTok names them, or ``(width, layers, heads)``.

    Attributes:
        patch_grid: ``(h, w)`` of the features.
    """

    takes_mask = True

    def __init__(
        self,
        grid_decoder: Decoder,
        patch_grid: tuple[int, int] = (16, 16),
        num_latent_tokens: int = 256,
        in_dim: int = 256,
        size: str | tuple[int, int, int] = "small",
    ) -> None:
        super().__init__()
        width, layers, heads = q_former_size(size)
        self.in_dim = in_dim
        self.patch_grid = (int(patch_grid[0]), int(patch_grid[1]))
        scale = token_std(width)
        self.norm_in = nn.LayerNorm(in_dim)
        self.embed = nn.Linear(in_dim, width)
        self.latent_position = nn.Parameter(scale * torch.randn(num_latent_tokens, width))
        self.position = nn.Parameter(scale * torch.randn(self.patch_grid[0] * self.patch_grid[1], width))
        self.blocks = nn.ModuleList(QFormerBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Conv2d(width, grid_decoder.in_dim, 3, padding=1)
        self.grid_decoder = grid_decoder
        init_q_former(self, width)

    @property
    def last_layer(self) -> nn.Parameter | None:
        return self.grid_decoder.last_layer

    def patch_tokens(self, hidden: Tensor) -> Tensor:
        """The patches ``(B, P, width)``, in raster order, among the outputs of a block: all of them."""
        return hidden

    def features(self, latents: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The grid of features ``(B, C, h, w)`` that the grid decoder takes.

        Args:
            latents: ``(B, N', in_dim)`` with ``1 <= N' <= N``.
            mask: ``(B, N')`` bool, ``True`` = keep. Nothing looks at the other latents.

        Raises:
            ValueError: for another number of latents, or a mask of another shape.
        """
        check_sequence(latents, mask, len(self.latent_position))
        length = latents.shape[1]
        memory = self.embed(self.norm_in(latents))  # (B, N', width)
        first = memory[:, :1]
        if mask is not None:
            first = first.masked_fill(~mask[:, :1, None], 0)
        x = first.expand(-1, len(self.position), -1)  # (B, P, width)
        for block in self.blocks:
            x = block(x, memory, self.position, self.latent_position[:length], mask)
        return self.out(latent_map(self.norm_out(x), self.patch_grid))

    def forward(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        features = self.features(latents, mask=mask)  # (B, C, h, w)
        return self.grid_decoder(features.flatten(2).transpose(1, 2), self.patch_grid)  # (B, 3, H, W)
