"""LPIPS as a training loss (arXiv:1801.03924), with the learned heads of the ``lpips`` package.

Five layers of an ImageNet network; at every position the features are scaled to unit length, and the squared
differences are weighed by a learned non-negative weight per channel. The value is that of ``lpips.LPIPS`` in eval; the
computation keeps less for the backward pass.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.frozen import Frozen
from .pairs import at_least_float32
from .perceptual_term import PerceptualTerm
from .trunks import load_feature_trunk

TRUNKS = {"vgg": "vgg16", "alex": "alexnet"}
_EPSILON = 1e-10  # added to norms, as lpips does


class LPIPSLoss(PerceptualTerm):
    """Mean LPIPS distance of a batch.

    Args:
        net: trunk, ``vgg`` (the usual training loss) or ``alex``.
        weight: factor in the objective.
        start_step: optimizer step from which the term counts; before it, it is not computed.
        trunk_weights: torchvision file of the trunk (``vgg16-397923af.pth`` or ``alexnet-owt-7be5be79.pth``); torch's
            hub cache, then a download, if ``None``.
        precision: of the trunk, ``float32`` or ``bfloat16``; norms, differences and means stay in float32.

    Raises:
        ValueError: for an unknown trunk, or a file that is not its weights.
        FileNotFoundError: if the trunk weights are neither given, nor cached, nor to be downloaded.
    """

    name = "lpips"

    def __init__(
        self,
        net: str = "vgg",
        weight: float = 1.0,
        start_step: int = 0,
        trunk_weights: str | None = None,
        precision: str = "float32",
    ) -> None:
        if net not in TRUNKS:
            raise ValueError(f"net must be one of {sorted(TRUNKS)}; got {net!r}")
        super().__init__(load_feature_trunk(TRUNKS[net], trunk_weights), weight, start_step, precision)
        self.heads = Frozen(nn.ParameterList(load_heads(net)))

    def compare(self, stage: int, features: Tensor, targets: Tensor) -> Tensor:
        return _WeightedUnitDistance.apply(features, targets, self.heads.network[stage])


class _WeightedUnitDistance(torch.autograd.Function):
    """Mean over batch and positions of ``sum_c w_c (a_c / (|a| + eps) - b_c / (|b| + eps))^2``.

    The value is a scalar, so its gradient with respect to ``a`` is known, up to a factor, when the value is. Keeping
    that one tensor, in the features' own type, takes the place of the float32 features and differences that autograd
    would keep (a third of what a bfloat16 VGG16 keeps in all), and leaves one product to the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        x = at_least_float32(a)  # (B, C, H, W)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (B, 1, H, W)
        unit = x / (norm + _EPSILON)
        difference = unit - unit_length(at_least_float32(b))
        slope = difference * weights  # half the gradient with respect to the unit vectors
        positions = norm.numel()
        value = (slope * difference).sum() / positions
        if ctx.needs_input_grad[0]:
            # Of u = a / (|a| + eps): what lies along a changes the length, which u does not have.
            radial = (slope * unit).sum(1, keepdim=True) / norm.clamp_min(_EPSILON)
            gradient = (slope - radial * x) * (2 / positions) / (norm + _EPSILON)
            ctx.save_for_backward(gradient.to(a.dtype))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None


def unit_length(x: Tensor) -> Tensor:
    """Features ``(B, C, H, W)`` scaled to length one at every position; zeros stay zeros."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON)


def load_heads(net: str) -> list[nn.Parameter]:
    """The learned weights ``(1, C, 1, 1)`` of the channels of each stage of ``vgg`` or ``alex``, without gradient."""
    with as_file(files("lpips") / "weights" / "v0.1" / f"{net}.pth") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return [
        nn.Parameter(state[f"lin{i}.model.1.weight"], requires_grad=False) for i in range(len(state))
    ]  # (1, C, 1, 1)
