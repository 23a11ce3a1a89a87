"""Q-Former encoder: a grid of features to a 1D sequence, by queries that start as averages of regions (GigaTok).

GigaTok (arXiv:2504.08736) puts it behind a convolutional encoder. The queries come in groups, coarse to fine: the mean
of the whole grid twice, then of its halves, quarters and so on; together a power of two. Within a group they lie in
raster order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.q_former import QFormerBlock, init_q_former, q_former_size
from ..layers.sizes import image_hw
from ..layers.transformer import token_std
from .base import Encoder


class QFormerEncoder(Encoder):
    """Grid encoder, then a Q-Former that reads its features into latent tokens.

    Args:
        grid_encoder: image to a grid of features.
        image_size: side of square images, or ``(H, W)``, divisible by the grid encoder's stride.
        num_latent_tokens: N, the length of the code sequence, a power of two.
        out_dim: D of the latents.
        size: ``tiny`` to ``xxxl`` as GigaTok names them, or ``(width, layers, heads)``.

    Attributes:
        grids: ``(h, w)`` of the groups of queries.

    Raises:
        ValueError: for a grid encoder without a grid, or sizes that do not fit.
    """

    def __init__(
        self,
        grid_encoder: Encoder,
        image_size: int | tuple[int, int] = 256,
        num_latent_tokens: int = 256,
        out_dim: int = 256,
        size: str | tuple[int, int, int] = "small",
    ) -> None:
        super().__init__()
        width, layers, heads = q_former_size(size)
        self.stride = grid_encoder.stride
        self.image_size = image_hw(image_size, self.stride)
        self.out_dim = out_dim
        feature_grid = grid_encoder.grid(self.image_size)
        if feature_grid is None:
            raise ValueError(f"grid_encoder must give a grid of features; {type(grid_encoder).__name__} gives none")
        self.feature_grid = feature_grid
        self.grids = query_grids(num_latent_tokens)
        finest = self.grids[-1]
        if feature_grid[0] % finest[0] or feature_grid[1] % finest[1]:
            raise ValueError(
                f"num_latent_tokens={num_latent_tokens} makes queries on grids up to {finest[0]}x{finest[1]}, which "
                f"must divide the {feature_grid[0]}x{feature_grid[1]} features of {self.image_size} pixels"
            )
        scale = token_std(width)
        self.grid_encoder = grid_encoder
        self.norm_in = nn.LayerNorm(grid_encoder.out_dim)
        self.embed = nn.Linear(grid_encoder.out_dim, width)
        self.position = nn.Parameter(scale * torch.randn(feature_grid[0] * feature_grid[1], width))
        self.to_queries = nn.Linear(width, width)
        self.latent_position = nn.Parameter(scale * torch.randn(num_latent_tokens, width))
        self.blocks = nn.ModuleList(QFormerBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_dim)
        init_q_former(self, width)

    def num_tokens(self, image_size: tuple[int, int]) -> int:
        return len(self.latent_position)

    def queries(self, memory: Tensor) -> Tensor:
        """What the N latent tokens start as, ``(B, N, width)``, for embedded features ``(B, P, width)``."""
        return self.to_queries(pool_groups(memory, self.feature_grid, self.grids))

    def forward(self, images: Tensor) -> Tensor:
        memory = self.embed(self.norm_in(self.grid_encoder(images)))  # (B, P, width)
        x = self.queries(memory)  # (B, N, width)
        for block in self.blocks:
            x = block(x, memory, self.latent_position, self.position)
        return self.out(self.norm_out(x))  # (B, N, D)


def query_grids(num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Grids ``(h, w)`` of the groups: 1x1, 1x1, 1x2, 2x2, 2x4 ... ``num_tokens`` cells in all.

    Raises:
        ValueError: unless ``num_tokens`` is a power of two.
    """
    levels = num_tokens.bit_length() - 1
    if num_tokens < 1 or num_tokens != 2**levels:
        raise ValueError(f"num_latent_tokens must be a power of two, to halve regions; got {num_tokens}")
    return ((1, 1), *((2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in range(levels)))


def pool_groups(features: Tensor, grid: tuple[int, int], groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Means of the cells of every group, one group after the other.

    Args:
        features: ``(B, H * W, D)`` in raster order.
        grid: ``(H, W)``.
        groups: grids ``(h, w)`` that divide it.

    Returns:
        ``(B, N, D)`` with N the cells of all groups.
    """
    means = []
    for h, w in groups:
        cells = features.unflatten(1, (h, grid[0] // h, w, grid[1] // w))  # (B, h, H / h, w, W / w, D)
        means.append(cells.mean((2, 4)).flatten(1, 2))  # (B, h * w, D)
    return torch.cat(means, 1)
