"""LPIPS as a training loss (arXiv:1801.03924), with the ``lpips`` package.

The package ships the learned linear heads; the ImageNet trunk comes from a local torchvision file or is downloaded once
into torch's hub cache. The network is frozen, always in eval (its dropout would make the loss noisy), and part of
neither checkpoints nor the EMA.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_TRUNKS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
_HOST = "https://download.pytorch.org/models/"


class LPIPSLoss(nn.Module):
    """Mean LPIPS distance of a batch.

    Args:
        net: trunk, ``vgg`` (the usual training loss) or ``alex``.
        weight: factor in the objective.
        start_step: optimizer step from which the term counts; before it, it is not computed.
        trunk_weights: torchvision file of the trunk (``vgg16-397923af.pth`` or ``alexnet-owt-7be5be79.pth``); torch's
            hub cache, then a download, if ``None``.

    Raises:
        ValueError: for an unknown trunk, or a file that is not its weights.
        FileNotFoundError: if the trunk weights are neither given, nor cached, nor to be downloaded.
    """

    def __init__(
        self, net: str = "vgg", weight: float = 1.0, start_step: int = 0, trunk_weights: str | None = None
    ) -> None:
        super().__init__()
        if net not in _TRUNKS:
            raise ValueError(f"net must be one of {sorted(_TRUNKS)}; got {net!r}")
        self.weight = weight
        self.start_step = start_step
        # In a list: not registered as a submodule, hence in no state_dict and no EMA copy.
        self._network = [_build_lpips(net, _trunk_state(net, trunk_weights))]

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Scalar loss of ``(B, 3, H, W)`` against ``(B, 3, H, W)``, both nominally in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self._network[0](reconstructions.float(), images.float(), normalize=True).mean()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LPIPSLoss:
        self._network[0]._apply(fn)
        return super()._apply(fn, recurse)


def _build_lpips(net: str, trunk: dict[str, Tensor]) -> nn.Module:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns about the arguments that lpips passes
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    own = network.net.state_dict()
    # lpips cuts torchvision's `features` into slices and keeps layer numbers: slice3.10.weight is features.10.weight.
    state = {name: trunk.get(re.sub(r"^slice\d+\.", "features.", name)) for name in own}
    wrong = [name for name, value in state.items() if value is None or value.shape != own[name].shape]
    if wrong:
        raise ValueError(f"the trunk weights are not torchvision's {net}: {wrong[0]} does not fit")
    network.net.load_state_dict(state)
    return network.requires_grad_(False).eval()


def _trunk_state(net: str, path: str | None) -> dict[str, Any]:
    name = _TRUNKS[net]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    remedy = (
        f"fetch {_HOST}{name} on a machine with internet access and give its path as trunk_weights, "
        f"or put it at {cached}"
    )
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"trunk_weights: there is no file {path!r}; {remedy}")
    file = Path(path) if path is not None else cached
    if not file.is_file():
        try:
            return torch.hub.load_state_dict_from_url(_HOST + name, map_location="cpu", weights_only=True)
        except OSError as error:
            reason = f"LPIPS needs the {net} trunk, which cannot be downloaded ({error})"
            raise FileNotFoundError(f"{reason}; {remedy}") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is not a readable weights file ({error}); {remedy}") from error
