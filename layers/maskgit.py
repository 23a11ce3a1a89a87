"""Blocks of the VQGAN of MaskGIT (arXiv:2202.04200), in the form whose weights TiTok (arXiv:2406.07550) builds on.

Against taming's VQGAN there is no attention, the 3x3 convolutions of the residual blocks have no bias, and downsampling
is average pooling. All convolutions have odd kernels and stride 1, for which the originals' "same" padding is the
symmetric one.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import group_norm


class MaskGITBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, on a residual branch.

    Args:
        in_channels: a multiple of 32.
        out_channels: a multiple of 32.
        shortcut_of: what the 1x1 shortcut of a block that changes the number of channels sees. ``input`` is a residual
            block. In ``output``, which the published weights need, it sees the output ``h`` of the second convolution,
            so the block returns ``h + shortcut(h)`` and its input is dropped.
    """

    def __init__(self, in_channels: int, out_channels: int, shortcut_of: Literal["input", "output"] = "output") -> None:
        super().__init__()
        if shortcut_of not in ("input", "output"):
            raise ValueError(f"shortcut_of must be 'input' or 'output'; got {shortcut_of!r}")
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut_of_output = shortcut_of == "output" and in_channels != out_channels
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            seen = out_channels if self.shortcut_of_output else in_channels
            self.shortcut = nn.Conv2d(seen, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))  # (B, out, H, W)
        return h + self.shortcut(h if self.shortcut_of_output else x)


class MaskGITLevel(nn.Module):
    """All blocks of one resolution, then a resampling where there is one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        resample: nn.Module | None = None,
        shortcut_of: Literal["input", "output"] = "output",
    ) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(MaskGITBlock(channels[i], out_channels, shortcut_of) for i in range(num_blocks))
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.resample(x)
