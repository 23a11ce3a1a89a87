"""Gradient estimators: how a gradient passes the step from a latent to its code.

An estimator is an autograd function that returns the code itself, so the forward value is exact in every precision
(``z + (q - z).detach()`` is not: it rounds wherever ``z`` and ``q`` differ in magnitude). Codes that carry a gradient
of their own (to an output projection) get it too; a codebook that must not is detached by its quantizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 1e-12  # lengths and squared lengths below this have no direction


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, codes: Tensor) -> Tensor:
        return codes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.latent_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad.to(ctx.latent_dtype), grad if ctx.needs_input_grad[1] else None


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Codes in the forward pass, identity to ``z`` in the backward pass (Bengio et al., arXiv:1308.3432).

    Args:
        z: ``(..., D)`` latents.
        codes: ``(..., D)`` their codes.

    Returns:
        ``(..., D)``, bit-equal to ``codes`` and in their dtype.
    """
    return _StraightThrough.apply(z, codes)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, codes: Tensor) -> Tensor:
        return codes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        z, codes = ctx.saved_tensors
        z_length, code_length = z.norm(dim=-1, keepdim=True), codes.norm(dim=-1, keepdim=True)
        u, v = z / z_length.clamp(min=TINY), codes / code_length.clamp(min=TINY)
        between = u + v
        middle = between.square().sum(-1, keepdim=True)
        # R = I - 2 w w^T + 2 v u^T with w = (u + v) / |u + v|; its transpose acts on the gradient.
        along_middle = (grad * between).sum(-1, keepdim=True) / middle.clamp(min=TINY)
        along_code = (grad * v).sum(-1, keepdim=True)
        rotated = (code_length / z_length.clamp(min=TINY)) * (grad - 2 * along_middle * between + 2 * along_code * u)
        # Opposite vectors have no plane to rotate in, and a zero vector no direction: straight through there.
        defined = (z_length > TINY) & (code_length > TINY) & (middle > TINY)
        return torch.where(defined, rotated, grad).to(z.dtype), grad if ctx.needs_input_grad[1] else None


def rotation(z: Tensor, codes: Tensor) -> Tensor:
    """Rotation trick (arXiv:2410.06424): codes forward; backward the rotation and scaling that take z to its code.

    The gradient keeps its angle to the code as its angle to the latent, and is ``|code| / |z|`` times as long. Where
    latent or code are zero, or point in opposite directions, the rotation is undefined and the gradient passes straight
    through.

    Args:
        z: ``(..., D)`` latents.
        codes: ``(..., D)`` their codes.

    Returns:
        ``(..., D)``, bit-equal to ``codes``.
    """
    return _Rotation.apply(z, codes)
