"""Vision transformer on a grid of latents, followed by a grid decoder (GigaTok's 2D tokenizers, arXiv:2504.08736)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.grid_vit import GridViT
from ..layers.layout import DeviceLayout
from ..layers.q_former import init_q_former
from .base import Decoder
from .cnn import latent_map


class GridViTDecoder(DeviceLayout, Decoder):
    """ViT, 3x3 convolution, grid decoder.

    Args:
        grid_decoder: a grid of features to the image.
        patch_grid: ``(h, w)`` of the latents.
        in_dim: D of the latents.
        size: ``tiny`` to ``xxxl`` as GigaTok names them, or ``(width, layers, heads)``.
        reads_input: see :class:`~vistok.layers.grid_vit.GridViT`.

    Attributes:
        patch_grid: ``(h, w)`` of the latents.
    """

    def __init__(
        self,
        grid_decoder: Decoder,
        patch_grid: tuple[int, int] = (16, 16),
        in_dim: int = 256,
        size: str | tuple[int, int, int] = "small",
        reads_input: bool = False,
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.patch_grid = (int(patch_grid[0]), int(patch_grid[1]))
        self.vit = GridViT(in_dim, self.patch_grid[0] * self.patch_grid[1], size, reads_input)
        self.out = nn.Conv2d(self.vit.width, grid_decoder.in_dim, 3, padding=1)
        self.grid_decoder = grid_decoder
        init_q_former(self, self.vit.width)

    @property
    def last_layer(self) -> nn.Parameter | None:
        return self.grid_decoder.last_layer

    def patch_tokens(self, hidden: Tensor) -> Tensor:
        """The patches ``(B, P, width)``, in raster order, among the outputs of a layer: all of them."""
        return hidden

    def features(self, latents: Tensor) -> Tensor:
        """The grid of features ``(B, C, h, w)`` that the grid decoder takes, of latents ``(B, N, D)``."""
        return self.out(latent_map(self.vit(latents), self.patch_grid))

    def forward(
        self,
        latents: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        if grid is not None and tuple(grid) != self.patch_grid:
            raise ValueError(f"this decoder takes latents on a grid of {self.patch_grid}; got grid={tuple(grid)}")
        features = self.features(latents)  # (B, C, h, w)
        return self.grid_decoder(features.flatten(2).transpose(1, 2), self.patch_grid)  # (B, 3, H, W)
