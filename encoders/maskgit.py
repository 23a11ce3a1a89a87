"""Convolutional grid encoder of MaskGIT's VQGAN (arXiv:2202.04200).

Any image whose sides are divisible by the stride becomes a grid of latents. Activations lie as their device likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.conv import group_norm
from ..layers.layout import DeviceLayout, in_device_layout
from ..layers.maskgit import MaskGITLevel
from .base import Encoder


class MaskGITEncoder(DeviceLayout, Encoder):
    """Residual blocks without attention, average pooling between the levels.

    Args:
        channels: channels of the first level, a multiple of 32.
        channel_multipliers: one per level; the stride is 2 to the number of levels minus one.
        num_blocks: residual blocks per level, and in the middle.
        out_dim: D of the latents.
        shortcut_of: see :class:`~vistok.layers.maskgit.MaskGITBlock`; the published weights need ``output``.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        out_dim: int = 256,
        shortcut_of: Literal["input", "output"] = "output",
    ) -> None:
        super().__init__()
        num_levels = len(channel_multipliers)
        widths = [channels * multiplier for multiplier in (1, *channel_multipliers)]
        self.stride = 2 ** (num_levels - 1)
        self.out_dim = out_dim
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList(
            MaskGITLevel(
                widths[i],
                widths[i + 1],
                num_blocks,
                resample=nn.AvgPool2d(2) if i < num_levels - 1 else None,
                shortcut_of=shortcut_of,
            )
            for i in range(num_levels)
        )
        self.middle = MaskGITLevel(widths[-1], widths[-1], num_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_dim, 1)

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
