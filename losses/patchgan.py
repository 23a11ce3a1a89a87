"""PatchGAN discriminator (arXiv:1611.07004) as VQGAN (arXiv:2012.09841) uses it, with batch norm.

LlamaGen and GigaTok train with the same network: 2,765,633 parameters and a 30x30 grid of logits at 256x256.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .discriminator import Discriminator


class PatchGAN(Discriminator):
    """4x4 convolutions, each logit judging a patch (70x70 pixels with three layers).

    Args:
        channels: width of the first layer; later layers double it, up to eightfold.
        num_layers: layers of stride 2.
        pixel_range: what the network sees [0, 1] as.

    Raises:
        ValueError: if ``channels`` or ``num_layers`` is not positive.
    """

    batch_statistics = True

    def __init__(self, channels: int = 64, num_layers: int = 3, pixel_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__(pixel_range)
        if channels < 1 or num_layers < 1:
            raise ValueError(f"channels and num_layers must be positive; got {channels} and {num_layers}")
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers).apply(_initialise)

    def score(self, images: Tensor) -> Tensor:
        """Logits ``(B, 1, H / 2^num_layers - 2, W / 2^num_layers - 2)``."""
        return self.layers(images.contiguous(memory_format=torch.channels_last))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
