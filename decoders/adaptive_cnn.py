"""Convolutional grid decoder with depth-to-space and adaptive group norm (MAGVIT-v2, arXiv:2310.05737).

GigaTok (arXiv:2504.08736) decodes with it. Two things differ from the decoder of VQGAN: a convolution makes the four
pixels of a doubled resolution as channels, and before every level the latents set scale and shift of a group norm, by
their standard deviation and mean over the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.conv import GROUPS, Level, Middle, group_norm
from ..layers.layout import DeviceLayout, in_device_layout
from .base import Decoder
from .cnn import latent_map


class DepthToSpace(nn.Module):
    """Double height and width: a 3x3 convolution to four times the channels, then their pixels side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv(x))


def depth_to_space(x: Tensor) -> Tensor:
    """``(B, 4 C, h, w)`` -> ``(B, C, 2 h, 2 w)``; channel ``(2 dy + dx) C + c`` goes to channel c at ``(dy, dx)``.

    That is the order of channels-last networks; ``torch.nn.PixelShuffle`` has ``4 c + 2 dy + dx``.
    """
    x = x.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))  # (B, h, w, dy, dx, C)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, 2 h, 2 w, C)
    return in_device_layout(x.permute(0, 3, 1, 2))


class AdaptiveGroupNorm(nn.Module):
    """Group norm without weights of its own; scale and shift are linear in statistics of the latents.

    Args:
        latent_dim: D of the latents.
        channels: C of what is normalised, a multiple of 32.
    """

    def __init__(self, latent_dim: int, channels: int) -> None:
        super().__init__()
        group_norm(channels)  # refuses channels that the groups do not divide
        self.scale = nn.Linear(latent_dim, channels)
        self.shift = nn.Linear(latent_dim, channels)

    def forward(self, x: Tensor, std: Tensor, mean: Tensor) -> Tensor:
        """``(B, C, h, w)`` in its dtype, for latents of these statistics ``(B, D)``."""
        scale, shift = (y[:, :, None, None] for y in (self.scale(std), self.shift(mean)))  # (B, C, 1, 1)
        return (F.group_norm(x, GROUPS, eps=1e-6) * scale + shift).to(x.dtype)


class AdaptiveCNNDecoder(DeviceLayout, Decoder):
    """VQGAN's decoder without attention, with depth-to-space and adaptive norms. Activations lie as their device likes.

    Args:
        channels: channels of the level of full resolution, a multiple of 32.
        channel_multipliers: one per level, from full to lowest resolution, as the encoder names them.
        num_blocks: residual blocks per level; one more than the encoder has.
        in_dim: D of the latents.
        dropout: dropout inside the residual blocks.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 3,
        in_dim: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        widths.append(widths[-1])
        levels = list(reversed(range(len(channel_multipliers))))  # lowest resolution first: the order in which they run
        self.in_dim = in_dim
        self.conv_in = nn.Conv2d(in_dim, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], attention=False, dropout=dropout)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(in_dim, widths[i + 1]) for i in levels)
        self.levels = nn.ModuleList(
            Level(
                widths[i + 1],
                widths[i],
                num_blocks,
                attention=False,
                resample=DepthToSpace(widths[i]) if i > 0 else None,
                dropout=dropout,
            )
            for i in levels
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
        std, mean = latent_statistics(latents)
        x = self.middle(self.conv_in(latent_map(latents, grid)))
        for norm, level in zip(self.adaptive, self.levels, strict=True):
            x = level(norm(x, std, mean))
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


def latent_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation (unbiased, of the variance plus 1e-6) and mean ``(B, D)`` of ``(B, N, D)`` over N.

    They are computed in float32 at least.

    Raises:
        ValueError: for a single latent, which has no variance.
    """
    if latents.shape[1] < 2:
        raise ValueError("adaptive group norm needs at least two latents; got a grid of one")
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    std = (wide.var(1) + 1e-6).sqrt()
    return std.to(latents.dtype), wide.mean(1).to(latents.dtype)
