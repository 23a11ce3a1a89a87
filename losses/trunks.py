"""The networks that perceptual losses look through: torchvision classifiers with ImageNet weights.

A trunk is cut into stages, so that a loss can compare two images stage by stage and forget the features it has
compared. Weights come from a given file, torch's hub cache, or a download into that cache; never from chance.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.weights_file import read_weights_file
from .pairs import at_least_float32

_HOST = "https://download.pytorch.org/models/"
_FILES = {
    "vgg16": "vgg16-397923af.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
    "convnext_small": "convnext_small-0c510722.pth",
}
# Where a stage of `features` ends: after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, or after each of the five ReLUs.
_STAGE_ENDS = {"vgg16": (4, 9, 16, 23, 30), "alexnet": (2, 5, 8, 10, 12)}


class Trunk(nn.Module):
    """Stages of a network, and the normalisation of the images that it was trained on.

    Args:
        stages: modules to run one after another; what each returns is compared.
    """

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def normalize(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1], ImageNet-normalised, for the first stage."""
        normalized = (at_least_float32(images) - self.mean) / self.std
        return normalized.to(self.mean.dtype, memory_format=torch.channels_last)


def load_feature_trunk(name: str, path: str | None = None) -> Trunk:
    """Five stages of ReLU features of ``vgg16`` or ``alexnet``; arguments and errors of :func:`load_network`."""
    features = load_network(name, path)["features"]
    return Trunk(*(features[start:end] for start, end in pairwise((0, *_STAGE_ENDS[name]))))


def load_network(name: str, path: str | None = None) -> nn.Module:
    """A torchvision network with the weights of a file, in float32.

    Args:
        name: ``convnext_small``, or ``vgg16`` or ``alexnet``, of which only ``features`` up to the last stage is kept.
        path: torchvision's weights file; torch's hub cache, then a download, if ``None``.

    Raises:
        FileNotFoundError: if the weights are neither given, nor cached, nor to be downloaded.
        ValueError: if the file does not hold the weights of this network.
    """
    from torchvision import models  # takes seconds

    state = _load_weights(name, path)
    with torch.device("meta"):  # every weight comes from the file: do not spend seconds on random ones
        network = getattr(models, name)(weights=None)
        if name in _STAGE_ENDS:
            network = nn.ModuleDict({"features": network.features[: _STAGE_ENDS[name][-1]]})
    own = network.state_dict()
    for key, value in own.items():
        given = state.get(key)
        if not isinstance(given, Tensor) or given.shape != value.shape:
            raise ValueError(f"the trunk weights are not torchvision's {name}: {key} does not fit")
    network.load_state_dict({key: state[key].float() for key in own}, assign=True)
    return network


def _load_weights(name: str, path: str | None) -> dict[str, Any]:
    file_name = _FILES[name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    remedy = (
        f"fetch {_HOST}{file_name} on a machine with internet access and give its path as trunk_weights, "
        f"or put it at {cached}"
    )
    if path is None and not cached.is_file():
        try:
            return torch.hub.load_state_dict_from_url(
                _HOST + file_name, map_location="cpu", weights_only=True, check_hash=True
            )
        except OSError as error:
            raise FileNotFoundError(f"{name} cannot be downloaded ({error}); {remedy}") from error
    return read_weights_file(cached if path is None else path, remedy)
