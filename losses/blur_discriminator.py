"""TiTok's patch discriminator: blur-pooled stages with group norm (arXiv:2406.07550).

A 5x5 convolution, stages of {3x3 convolution, blur with stride 2, group norm, leaky ReLU}, max pooling to a fixed grid,
and two convolutions to one logit per cell. 1,909,889 parameters at the published sizes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blur import Blur
from .discriminator import Discriminator

_GROUPS = 32
_SLOPE = 0.1
_GRID = 16
_MULTIPLIERS = (1, 2, 4, 8)  # the width of a stage; the first one does not widen


class BlurDiscriminator(Discriminator):
    """Patch discriminator without batch statistics.

    It keeps the usual memory layout: the group norm of CUDA has no other, and that of the CPU loses a digit
    channels-last.

    Args:
        channels: width of the first stage, a multiple of 32.
        num_stages: halvings of height and width, at most 4; the widths are ``channels`` times 1, 2, 4, 8.
        pixel_range: what the network sees [0, 1] as.

    Raises:
        ValueError: for other channels or numbers of stages.
    """

    def __init__(self, channels: int = 128, num_stages: int = 3, pixel_range: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(pixel_range)
        if channels < 1 or channels % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS} (group norm); got {channels}")
        if not 1 <= num_stages <= len(_MULTIPLIERS):
            raise ValueError(f"num_stages must lie between 1 and {len(_MULTIPLIERS)}; got {num_stages}")
        widths = [channels] + [channels * factor for factor in _MULTIPLIERS[:num_stages]]
        self.stem = nn.Conv2d(3, channels, 5, padding=2)
        self.stages = nn.ModuleList(_Stage(widths[i], widths[i + 1]) for i in range(num_stages))
        self.hidden = nn.Conv2d(widths[-1], widths[-1], 1)
        self.logits = nn.Conv2d(widths[-1], 1, 5, padding=2)

    def score(self, images: Tensor) -> Tensor:
        """Logits ``(B, 1, 16, 16)``, whatever the resolution."""
        x = F.leaky_relu(self.stem(images), _SLOPE)  # (B, C, H, W)
        for stage in self.stages:
            x = stage(x)
        x = F.adaptive_max_pool2d(x, _GRID)  # (B, C, 16, 16)
        return self.logits(F.leaky_relu(self.hidden(x), _SLOPE))


class _Stage(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.blur = Blur()
        self.norm = nn.GroupNorm(_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.blur(self.conv(x))), _SLOPE)
