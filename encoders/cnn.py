"""Convolutional grid encoder of VQGAN (taming-transformers, arXiv:2012.09841; LlamaGen, arXiv:2406.06525).

Any image whose sides are divisible by the stride becomes a grid of latents. Activations lie as their device likes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.conv import Downsample, Level, Middle, group_norm
from ..layers.layout import DeviceLayout, in_device_layout
from .base import Encoder


class CNNEncoder(DeviceLayout, Encoder):
    """Residual blocks, one downsampling less than there are levels.

    Args:
        channels: channels of the first level, a multiple of 32.
        channel_multipliers: one per level; the stride is 2 to the number of levels minus one.
        num_blocks: residual blocks per level.
        out_dim: D of the latents.
        attention_levels: levels (0 = full resolution) with attention after every block; the lowest one if ``None``.
        middle_attention: attention between the two residual blocks of the middle.
        dropout: dropout inside the residual blocks.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        out_dim: int = 256,
        attention_levels: Sequence[int] | None = None,
        middle_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_levels = len(channel_multipliers)
        attention_levels = (num_levels - 1,) if attention_levels is None else tuple(attention_levels)
        widths = [channels * multiplier for multiplier in (1, *channel_multipliers)]
        self.stride = 2 ** (num_levels - 1)
        self.out_dim = out_dim
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                num_blocks,
                attention=i in attention_levels,
                resample=Downsample(widths[i + 1]) if i < num_levels - 1 else None,
                dropout=dropout,
            )
            for i in range(num_levels)
        )
        self.middle = Middle(widths[-1], middle_attention, dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_dim, 3, padding=1)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return (image_size[0] // self.stride, image_size[1] // self.stride)

    def num_tokens(self, image_size: tuple[int, int]) -> int:
        height, width = self.grid(image_size)
        return height * width

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(in_device_layout(images))
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.middle(x))))  # (B, D, h, w)
        return x.flatten(2).transpose(1, 2)  # (B, h * w, D)
