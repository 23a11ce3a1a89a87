"""DiffAugment (arXiv:2006.10738): augment what the discriminator sees, real and reconstructed, differentiably.

Three families, each drawn per image: colour (brightness, then saturation, then contrast), translation, cutout. As in
the paper, real images and reconstructions get draws of their own, and so do the generator's and the discriminator's
terms. The published implementation works in [-1, 1]; here pixels are in [0, 1], so its brightness of 0.5 is 0.25, and
what is moved in or cut out is mid-grey, its 0. Translation and cutout default to 0.125 and 0.2 of the side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_GREY = 0.5


class DiffAugment(nn.Module):
    """Random colour, translation and cutout of images in [0, 1].

    Args:
        probability: of each family, drawn per image and family.
        brightness: largest shift of all pixels of an image.
        saturation: largest relative change of the distance to the grey of a pixel.
        contrast: largest relative change of the distance to the mean of an image.
        translation: largest shift as a share of height and width.
        cutout: side of the box as a share of height and width; its centre may lie anywhere.

    Raises:
        ValueError: for a probability, translation or cutout outside of [0, 1], or a negative strength.
    """

    def __init__(
        self,
        probability: float = 1.0,
        brightness: float = 0.25,
        saturation: float = 1.0,
        contrast: float = 0.5,
        translation: float = 0.125,
        cutout: float = 0.2,
    ) -> None:
        super().__init__()
        for name, value in {"probability": probability, "translation": translation, "cutout": cutout}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value}")
        for name, value in {"brightness": brightness, "saturation": saturation, "contrast": contrast}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        self.probability = probability
        self.brightness, self.saturation, self.contrast = brightness, saturation, contrast
        self.translation, self.cutout = translation, cutout

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augmented images, ``(B, 3, H, W)`` in and out, not clamped.

        Args:
            images: in [0, 1].
            generator: of the images' device; torch's own if ``None``.
        """
        batch, device = images.shape[0], images.device
        chosen = torch.rand(3, batch, 1, 1, 1, device=device, generator=generator) < self.probability
        # One draw in [0, 1) per image for each of: brightness, saturation, contrast, two shifts, two box centres.
        draws = torch.rand(7, batch, 1, 1, 1, device=device, generator=generator)
        if self.brightness or self.saturation or self.contrast:
            images = torch.where(chosen[0], self._recolour(images, *draws[:3].to(images.dtype)), images)
        if self.translation:
            images = torch.where(chosen[1], self._translate(images, *draws[3:5]), images)
        if self.cutout:
            images = torch.where(chosen[2] & self._box(images, *draws[5:]), _GREY, images)
        return images

    def _recolour(self, x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
        if self.brightness:
            x = x + self.brightness * (2 * brightness - 1)
        if self.saturation:
            grey = x.mean(1, keepdim=True)
            x = grey + (x - grey) * (1 + self.saturation * (2 * saturation - 1))
        if self.contrast:
            mean = x.mean((1, 2, 3), keepdim=True)
            x = mean + (x - mean) * (1 + self.contrast * (2 * contrast - 1))
        return x

    def _translate(self, x: Tensor, down: Tensor, right: Tensor) -> Tensor:
        for dim, draw in ((2, down), (3, right)):
            size = x.shape[dim]
            reach = int(size * self.translation + 0.5)
            shift = (draw * (2 * reach + 1)).long() - reach  # (B, 1, 1, 1), in [-reach, reach]
            source = _positions(x, dim) - shift
            inside = (source >= 0) & (source < size)
            moved = x.gather(dim, source.clamp(0, size - 1).expand_as(x))
            x = torch.where(inside, moved, _GREY)
        return x

    def _box(self, x: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """Mask ``(B, 1, H, W)``, True inside the box."""
        inside = []
        for dim, draw in ((2, down), (3, right)):
            size = x.shape[dim]
            side = int(size * self.cutout + 0.5)
            start = (draw * (size + 1 - side % 2)).long() - side // 2
            position = _positions(x, dim)
            inside.append((position >= start) & (position < start + side))
        return inside[0] & inside[1]


def _positions(x: Tensor, dim: int) -> Tensor:
    """``0, 1, ...`` along a dimension of a 4D tensor, the others being 1."""
    shape = [1, 1, 1, 1]
    shape[dim] = x.shape[dim]
    return torch.arange(x.shape[dim], device=x.device).view(shape)
