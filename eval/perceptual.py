"""Distances that a network trained on ImageNet sees: LPIPS (arXiv:1801.03924) and DISTS (arXiv:2004.07728).

Both look at the feature maps of five stages. LPIPS compares them place by place, with a learned weight per channel; the
metric of most papers is ``alex``, ``vgg`` is what tokenizers are trained on. DISTS compares the means of the channels
(texture) and their correlation over the image (structure), so that one patch of grass may stand for another.

Images are compared at the size they have. Of a batch the features of the originals are computed once, for all variants
of the reconstruction, as far as memory allows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.perceptual import TRUNKS, load_heads, unit_length
from ..losses.trunks import Trunk, load_feature_trunk
from .metric import MetricUnavailable, Pairs, PerImageMetric
from .networks import judging, shared_network

_PIXELS_AT_ONCE = {"cpu": 1 << 18}  # 4 images of 256 x 256: more take memory there, and are no faster
_PIXELS_AT_ONCE_ELSEWHERE = 1 << 21
_BYTES_PER_PIXEL = {"alex": 44, "vgg": 500}  # what the features of one pixel of an image take
_KEEP_BYTES = 1 << 29  # features of a batch of originals that take more are computed again for every variant
_SMALLEST = {"alex": 31, "vgg": 16}  # smaller images end in the network's pooling


class _StageDistance(PerImageMetric):
    """Base class of distances between features of five stages.

    Args:
        name: of the value.
        net: trunk of the network.
        network: the network, shared by all metrics of ``key``.
        key: what the features depend on.
        image_size: ``(H, W)`` of the images to come; checked when they come if ``None``.
    """

    def __init__(
        self, name: str, net: str, network: nn.Module, key: tuple[str, ...], image_size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.names = (name,)
        self.network = network
        self._net, self._key = net, key
        if image_size is not None:
            self._check_size(*image_size)

    @abstractmethod
    def features(self, images: Tensor) -> Iterator[Tensor]:
        """What is compared of uint8 images ``(B, 3, H, W)``, stage after stage: ``(B, C, h, w)``."""

    @abstractmethod
    def distance(self, features: Iterable[Tensor], originals: Iterable[Tensor]) -> Tensor:
        """``(B,)`` from what :meth:`features` gives of reconstructions and originals, which stay as they are."""

    def values(self, pairs: Pairs) -> dict[str, Tensor]:
        images, reconstructions = pairs.originals.images, pairs.reconstructions
        height, width = images.shape[2:]
        self._check_size(height, width)
        keep = len(images) * height * width * _BYTES_PER_PIXEL[self._net] <= _KEEP_BYTES
        pixels = _PIXELS_AT_ONCE.get(images.device.type, _PIXELS_AT_ONCE_ELSEWHERE)
        count = max(1, pixels // (height * width))
        parts = []
        with judging(self.network, images):
            for start in range(0, len(images), count):
                original = images[start : start + count]
                if keep:
                    key = (self._key, start)
                    originals = pairs.originals.once(key, lambda part=original: list(self.features(part)))
                else:
                    originals = self.features(original)
                parts.append(self.distance(self.features(reconstructions[start : start + count]), originals))
        return {self.names[0]: torch.cat(parts)}

    def _check_size(self, height: int, width: int) -> None:
        smallest = _SMALLEST[self._net]
        if min(height, width) < smallest:
            raise MetricUnavailable(
                f"{self.names[0]} needs images of at least {smallest} x {smallest} pixels; got {height} x {width}"
            )


class LPIPS(_StageDistance):
    """Learned perceptual distance, mean over the images: the values of ``lpips.LPIPS`` (version 0.1) in eval.

    Args:
        net: trunk, ``alex`` or ``vgg``; the value is called ``lpips_alex`` or ``lpips_vgg``.
        weights: torchvision's file of the trunk, ``alexnet-owt-7be5be79.pth`` or ``vgg16-397923af.pth``.
        image_size: ``(H, W)`` of the images to come; checked when they come if ``None``.

    Raises:
        MetricUnavailable: if there is no such file, or such images are too small for the trunk (31 and 16 pixels).
        ValueError: for another trunk, or a file that does not hold its weights.
    """

    def __init__(self, net: str = "alex", *, weights: str | Path, image_size: tuple[int, int] | None = None) -> None:
        if net not in TRUNKS:
            raise ValueError(f"net must be one of {', '.join(sorted(TRUNKS))}; got {net!r}")
        key = ("lpips", net, str(weights))
        network = shared_network(key, lambda: _LPIPSNetwork(net, str(weights)))
        super().__init__(f"lpips_{net}", net, network, key, image_size)

    def features(self, images: Tensor) -> Iterator[Tensor]:
        for features in _stages(self.network.trunk, self.network.trunk.normalize(images.float() / 255)):
            yield unit_length(features)

    def distance(self, features: Iterable[Tensor], originals: Iterable[Tensor]) -> Tensor:
        distances = []
        for x, y, weights in zip(features, originals, self.network.heads, strict=True):
            channels = (x - y).square_().mean((2, 3))  # (B, C)
            distances.append(channels @ weights.flatten())
        return torch.stack(distances).sum(0)


class DISTS(_StageDistance):
    """Deep image structure and texture similarity, as a distance, mean over the images; 0 for equal images.

    The weights of the channels are those of the authors, which come with torchmetrics.

    Args:
        weights: torchvision's file of the trunk, ``vgg16-397923af.pth``.
        image_size: ``(H, W)`` of the images to come; checked when they come if ``None``.

    Raises:
        MetricUnavailable: if there is no such file, the installed torchmetrics does not bring the weights of the
            channels, or such images have less than 16 pixels on a side.
        ValueError: if the file does not hold the weights of VGG16.
    """

    def __init__(self, *, weights: str | Path, image_size: tuple[int, int] | None = None) -> None:
        key = ("dists", str(weights))
        network = shared_network(key, lambda: _DISTSNetwork(str(weights)))
        super().__init__("dists", "vgg", network, key, image_size)

    def features(self, images: Tensor) -> Iterator[Tensor]:
        pixels = images.float() / 255
        yield pixels
        yield from _stages(self.network.trunk, self.network.trunk.normalize(pixels))

    def distance(self, features: Iterable[Tensor], originals: Iterable[Tensor]) -> Tensor:
        epsilon = 1e-6  # c1 and c2 of the paper
        similarity = 0
        for x, y, alpha, beta in zip(features, originals, self.network.alpha, self.network.beta, strict=True):
            mean_x, mean_y = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
            x, y = x - mean_x, y - mean_y
            covariance = (x * y).mean((2, 3))  # (B, C)
            variances = x.square_().mean((2, 3)) + y.square_().mean((2, 3))
            mean_x, mean_y = mean_x.flatten(1), mean_y.flatten(1)
            texture = (2 * mean_x * mean_y + epsilon) / (mean_x.square() + mean_y.square() + epsilon)
            structure = (2 * covariance + epsilon) / (variances + epsilon)
            similarity = similarity + texture @ alpha + structure @ beta
        return (1 - similarity).clamp(min=0)  # equal images differ by a rounding error


class _LPIPSNetwork(nn.Module):
    def __init__(self, net: str, weights: str) -> None:
        super().__init__()
        self.trunk = load_feature_trunk(TRUNKS[net], weights)
        self.heads = nn.ParameterList(load_heads(net))


class _DISTSNetwork(nn.Module):
    """VGG16 that shrinks by root mean squares, and the weights ``(C,)`` of the channels at each of six stages."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        first, *others = load_feature_trunk("vgg16", weights).stages
        self.trunk = Trunk(first, *(nn.Sequential(_L2Pool(stage[1].in_channels), *stage[1:]) for stage in others))
        alpha, beta = _channel_weights()
        channels = (3, 64, 128, 256, 512, 512)  # the first stage is the image itself
        total = alpha.sum() + beta.sum()
        self.alpha = nn.ParameterList((alpha / total).split(channels))
        self.beta = nn.ParameterList((beta / total).split(channels))


class _L2Pool(nn.Module):
    """Root of the weighted mean of squares in a 3 x 3 Hann window, at every second position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        window = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("window", (window[:, None] * window).expand(channels, 1, 3, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        squares = F.conv2d(x.square(), self.window, stride=2, padding=1, groups=x.shape[1])
        return (squares + 1e-12).sqrt_()


def _stages(trunk: Trunk, x: Tensor) -> Iterator[Tensor]:
    for stage in trunk.stages:
        x = stage(x)
        yield x


def _channel_weights() -> tuple[Tensor, Tensor]:
    """The learned weights of texture and of structure, ``(1475,)`` each."""
    file = files("torchmetrics") / "functional" / "image" / "dists_models" / "weights.pt"
    if not file.is_file():
        raise MetricUnavailable(f"the installed torchmetrics brings no weights of DISTS ({file}): install 1.8 or later")
    with as_file(file) as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state["alpha"].flatten(), state["beta"].flatten()
