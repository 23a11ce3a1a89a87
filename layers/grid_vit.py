"""Vision transformer over a grid of features, as the 2D tokenizers of GigaTok (arXiv:2504.08736) have on both sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .q_former import QFormerBlock, q_former_size
from .transformer import Block, token_std


class GridViT(nn.Module):
    """Features in, normalised features of another width out. Its owner initialises it.

    Args:
        in_dim: D of the features taken.
        num_positions: N, the cells of the grid.
        size: ``tiny`` to ``xxxl`` as GigaTok names them, or ``(width, layers, heads)``.
        reads_input: the layers are those of a Q-Former whose memory is the input of the layer itself, without a norm;
            positions are then added to queries and keys in every layer. Otherwise the layers are plain ones, and
            positions are added to the features once.

    Attributes:
        width: of the features given.
    """

    def __init__(
        self, in_dim: int, num_positions: int, size: str | tuple[int, int, int], reads_input: bool = False
    ) -> None:
        super().__init__()
        self.width, layers, heads = q_former_size(size)
        self.reads_input = reads_input
        layer = QFormerBlock if reads_input else Block
        self.norm_in = nn.LayerNorm(in_dim)
        self.embed = nn.Linear(in_dim, self.width)
        self.position = nn.Parameter(token_std(self.width) * torch.randn(num_positions, self.width))
        self.blocks = nn.ModuleList(layer(self.width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(self.width)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, N, D)`` -> ``(B, N, width)``."""
        x = self.embed(self.norm_in(features))
        if not self.reads_input:
            x = x + self.position
        for block in self.blocks:
            x = block(x, x, self.position, self.position) if self.reads_input else block(x)
        return self.norm_out(x)
