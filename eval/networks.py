"""Networks that judge images: in memory once however many metrics look through them, and always in full precision.

A metric of every variant, and the fresh ones that merge what was gathered, want the same network. It is kept as long as
one of them is alive, and is moved to where the images are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..quantizers.search import full_precision
from .metric import MetricUnavailable

_IN_USE: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()


def shared_network(key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
    """A frozen network, loaded unless one of this key is still in use.

    Args:
        key: all that the network depends on.
        load: makes it.

    Raises:
        MetricUnavailable: if ``load`` raises a ``FileNotFoundError``; says why on one line.
    """
    network = _IN_USE.get(key)
    if network is None:
        try:
            network = load().requires_grad_(False).eval()
        except FileNotFoundError as error:
            raise MetricUnavailable(" ".join(str(error).split())) from error
        _IN_USE[key] = network
    return network


@contextmanager
def judging(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Run a network where the images are, as :func:`exactly` does."""
    if next(network.parameters()).device != images.device:
        network.to(images.device)
    with exactly(images.device):
        yield


@contextmanager
def exactly(device: torch.device, convolutions: Literal["ieee", "tf32"] = "ieee") -> Iterator[None]:
    """Compute without gradient, in the dtype of the tensors whatever autocast and the global settings allow.

    TF32 changes features by one part in a thousand, which is more than what such metrics tell apart.

    Args:
        device: to compute on.
        convolutions: ``tf32`` lets convolutions on CUDA compute in it all the same.
    """
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    settings.fp32_precision = convolutions
    try:
        with torch.no_grad(), full_precision(device):
            yield
    finally:
        settings.fp32_precision = before
