"""A network that is used and never trained: teachers, perceptual trunks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network without registering it.

    The network has no gradient, stays in eval whatever mode its owner is put into, moves with its owner, and is part of
    no state dict, no optimizer and no moving average.

    Args:
        network: frozen in place.

    Attributes:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = [network.requires_grad_(False).eval()]  # in a list: nn.Module does not see it

    @property
    def network(self) -> nn.Module:
        return self._held[0]

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._held[0](*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self._held[0]._apply(fn)
        return super()._apply(fn, recurse)
