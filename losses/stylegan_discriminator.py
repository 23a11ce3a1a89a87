"""StyleGAN2's residual discriminator (arXiv:1912.04958), which ViT-VQGAN (arXiv:2110.04627) trains with.

One logit for the whole image. Weights are drawn with unit variance and scaled by ``1 / sqrt(fan_in)`` where they are
used (equalised learning rate, arXiv:1710.10196); strided convolutions are preceded by a blur.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blur import Blur
from .discriminator import Discriminator

_SMALLEST = 4


class StyleGANDiscriminator(Discriminator):
    """Residual blocks down to 4x4, then two linear layers.

    Args:
        image_size: height and width taken, a power of two from 8.
        channels: width at a resolution is ``channels / resolution``, at most ``max_channels``.
        max_channels: largest width.
        minibatch_group: images that share a minibatch standard deviation (arXiv:1710.10196); 0 leaves it out.
        pixel_range: what the network sees [0, 1] as.

    Raises:
        ValueError: for another image size, or widths of nothing.
    """

    def __init__(
        self,
        image_size: int = 256,
        channels: int = 32768,
        max_channels: int = 512,
        minibatch_group: int = 4,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(pixel_range)
        if image_size < 2 * _SMALLEST or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two from {2 * _SMALLEST}; got {image_size}")
        if max_channels < 1 or channels < image_size or minibatch_group < 0:
            raise ValueError(
                f"needs channels >= image_size, max_channels >= 1 and minibatch_group >= 0; "
                f"got {channels}, {max_channels} and {minibatch_group}"
            )
        self.image_size = image_size
        self.minibatch_group = minibatch_group
        self.batch_statistics = minibatch_group > 1
        sizes = [image_size >> i for i in range(int(math.log2(image_size // _SMALLEST)) + 1)]  # ends at 4
        widths = [min(channels // size, max_channels) for size in sizes]
        self.stem = EqualConv2d(3, widths[0], 1)
        self.blocks = nn.ModuleList(_Block(widths[i], widths[i + 1]) for i in range(len(widths) - 1))
        self.last = EqualConv2d(widths[-1] + (minibatch_group > 0), widths[-1], 3, padding=1)
        self.hidden = EqualLinear(widths[-1] * _SMALLEST**2, widths[-1])
        self.logits = EqualLinear(widths[-1], 1)

    def score(self, images: Tensor) -> Tensor:
        """Logits ``(B, 1)``.

        Raises:
            ValueError: for another image size.
        """
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images must be {self.image_size}x{self.image_size}; got {tuple(images.shape)}")
        images = images.contiguous(memory_format=torch.channels_last)
        x = _activate(self.stem(images))  # (B, C, H, W)
        for block in self.blocks:
            x = block(x)
        if self.minibatch_group:
            x = minibatch_deviation(x, self.minibatch_group)  # (B, C + 1, 4, 4)
        x = _activate(self.last(x)).flatten(1)  # (B, 16 * C)
        return self.logits(_activate(self.hidden(x)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv2d(in_channels, in_channels, 3, padding=1)
        self.blur = Blur(stride=1, padding=2)
        self.conv2 = EqualConv2d(in_channels, out_channels, 3, stride=2)
        self.shortcut_blur = Blur(stride=2, padding=1)
        self.shortcut = EqualConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = _activate(self.conv2(self.blur(_activate(self.conv1(x)))))  # (B, C', H / 2, W / 2)
        return (h + self.shortcut(self.shortcut_blur(x))) / math.sqrt(2)


class EqualConv2d(nn.Conv2d):
    """Convolution whose unit-variance weights are scaled by ``1 / sqrt(fan_in)`` when used; biases start at 0."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight[0].numel() ** -0.5
        return F.conv2d(x, self.weight * scale, self.bias, self.stride, self.padding)


class EqualLinear(nn.Linear):
    """Linear layer whose unit-variance weights are scaled by ``1 / sqrt(fan_in)`` when used; biases start at 0."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


def minibatch_deviation(x: Tensor, group: int) -> Tensor:
    """Appends one channel: the standard deviation over ``group`` images, averaged over channels and positions.

    Args:
        x: ``(B, C, H, W)``. Where ``group`` does not divide B, the largest smaller divisor of B is the group.
        group: images per group, taken in strides through the batch.

    Returns:
        ``(B, C + 1, H, W)``.
    """
    batch, _, height, width = x.shape
    group = max(size for size in range(1, min(group, batch) + 1) if batch % size == 0)
    members = x.float().unflatten(0, (group, batch // group))  # (G, B / G, C, H, W)
    deviation = (members.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (B / G,)
    channel = deviation.repeat(group).view(batch, 1, 1, 1).expand(-1, 1, height, width)
    return torch.cat([x, channel.to(x.dtype)], 1)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)  # the gain keeps the variance
