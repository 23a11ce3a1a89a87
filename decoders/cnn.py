"""Convolutional grid decoder of VQGAN (taming-transformers, arXiv:2012.09841; LlamaGen, arXiv:2406.06525)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.conv import Level, Middle, Upsample, group_norm
from ..layers.layout import DeviceLayout, in_device_layout
from .base import Decoder


class CNNDecoder(DeviceLayout, Decoder):
    """The encoder's mirror image, with one residual block more per level. Activations lie as their device likes.

    Args:
        channels: channels of the level of full resolution, a multiple of 32.
        channel_multipliers: one per level, from full to lowest resolution, as the encoder names them.
        num_blocks: residual blocks per level; VQGAN uses one more than its encoder.
        in_dim: D of the latents.
        attention_levels: levels (0 = full resolution) with attention after every block; the lowest one if ``None``.
        middle_attention: attention between the two residual blocks of the middle.
        dropout: dropout inside the residual blocks.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 3,
        in_dim: int = 256,
        attention_levels: Sequence[int] | None = None,
        middle_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_levels = len(channel_multipliers)
        attention_levels = (num_levels - 1,) if attention_levels is None else tuple(attention_levels)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        widths.append(widths[-1])
        self.in_dim = in_dim
        self.conv_in = nn.Conv2d(in_dim, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], middle_attention, dropout)
        self.levels = nn.ModuleList(  # lowest resolution first: the order in which they run
            Level(
                widths[i + 1],
                widths[i],
                num_blocks,
                attention=i in attention_levels,
                resample=Upsample(widths[i]) if i > 0 else None,
                dropout=dropout,
            )
            for i in reversed(range(num_levels))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

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
        x = self.middle(self.conv_in(latent_map(latents, grid)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


def latent_map(latents: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Latents ``(B, N, D)`` in raster order as a map ``(B, D, h, w)``, in the layout of the device.

    Raises:
        ValueError: unless ``grid`` is ``(h, w)`` with ``h * w = N``.
    """
    if grid is None or grid[0] * grid[1] != latents.shape[1]:
        raise ValueError(f"a grid decoder needs the (h, w) of its {latents.shape[1]} latents; got grid={grid}")
    x = latents.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    return in_device_layout(x)
