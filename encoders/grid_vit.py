"""Grid encoder followed by a vision transformer on its features (the 2D tokenizers of GigaTok, arXiv:2504.08736)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.grid_vit import GridViT
from ..layers.q_former import init_q_former
from ..layers.sizes import image_hw
from .base import Encoder


class GridViTEncoder(Encoder):
    """Grid encoder, ViT, linear layer.

    Args:
        grid_encoder: image to a grid of features.
        image_size: side of square images, or ``(H, W)``, divisible by the grid encoder's stride.
        out_dim: D of the latents.
        size: ``tiny`` to ``xxxl`` as GigaTok names them, or ``(width, layers, heads)``.
        reads_input: see :class:`~vistok.layers.grid_vit.GridViT`.

    Raises:
        ValueError: for a grid encoder without a grid, or an image size that does not fit.
    """

    def __init__(
        self,
        grid_encoder: Encoder,
        image_size: int | tuple[int, int] = 256,
        out_dim: int = 256,
        size: str | tuple[int, int, int] = "small",
        reads_input: bool = False,
    ) -> None:
        super().__init__()
        self.stride = grid_encoder.stride
        self.image_size = image_hw(image_size, self.stride)
        self.out_dim = out_dim
        grid = grid_encoder.grid(self.image_size)
        if grid is None:
            raise ValueError(f"grid_encoder must give a grid of features; {type(grid_encoder).__name__} gives none")
        self.feature_grid = grid
        self.grid_encoder = grid_encoder
        self.vit = GridViT(grid_encoder.out_dim, grid[0] * grid[1], size, reads_input)
        self.out = nn.Linear(self.vit.width, out_dim)
        init_q_former(self, self.vit.width)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return self.feature_grid

    def num_tokens(self, image_size: tuple[int, int]) -> int:
        return self.feature_grid[0] * self.feature_grid[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.vit(self.grid_encoder(images)))  # (B, h * w, D)
