"""Convolutional grid decoder of MaskGIT's VQGAN (arXiv:2202.04200).

TiTok (arXiv:2406.07550) decodes its proxy codes with it, and fine-tunes it in its second stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.conv import Upsample, group_norm
from ..layers.layout import DeviceLayout
from ..layers.maskgit import MaskGITLevel
from .base import Decoder
from .cnn import latent_map


class MaskGITDecoder(DeviceLayout, Decoder):
    """The encoder's mirror image, with as many blocks per level. Activations lie as their device likes.

    Args:
        channels: channels of the level of full resolution, a multiple of 32.
        channel_multipliers: one per level, from full to lowest resolution, as the encoder names them.
        num_blocks: residual blocks per level, and in the middle.
        in_dim: D of the latents.
        shortcut_of: see :class:`~vistok.layers.maskgit.MaskGITBlock`; the published weights need ``output``.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        in_dim: int = 256,
        shortcut_of: Literal["input", "output"] = "output",
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        widths.append(widths[-1])
        self.in_dim = in_dim
        self.conv_in = nn.Conv2d(in_dim, widths[-1], 3, padding=1)
        self.middle = MaskGITLevel(widths[-1], widths[-1], num_blocks)
        self.levels = nn.ModuleList(  # lowest resolution first: the order in which they run
            MaskGITLevel(
                widths[i + 1],
                widths[i],
                num_blocks,
                resample=Upsample(widths[i]) if i > 0 else None,
                shortcut_of=shortcut_of,
            )
            for i in reversed(range(len(channel_multipliers)))
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
