"""VQGAN's adaptive weight of the adversarial loss (arXiv:2012.09841, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_weight(reference: Tensor, adversarial: Tensor, last_layer: Tensor, maximum: float = 1e4) -> Tensor:
    """How much larger the reconstruction's gradient is than the adversarial one, at the layer that makes the pixels.

    ``|d reference / d last_layer| / (|d adversarial / d last_layer| + 1e-4)``, Frobenius norms in float32, clamped to
    ``[0, maximum]``. It costs two partial backward passes, down to the last layer; both graphs stay usable.

    Args:
        reference: weighted sum of the reconstruction losses, scalar.
        adversarial: the generator's loss, scalar.
        last_layer: weight of the last layer, part of both graphs.
        maximum: upper limit.

    Returns:
        Detached scalar.
    """
    with torch.autocast(last_layer.device.type, enabled=False):  # a backward pass is not to be run under autocast
        norms = [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
            for loss in (reference, adversarial)
        ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, maximum).detach()
