"""Gradient estimators: how a gradient passes the step from a latent to its code.

An estimator is an autograd function that returns the code itself, so the forward value is exact in every precision
(``z + (q - z).detach()`` is not: it rounds wherever ``z`` and ``q`` differ in magnitude).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, codes: Tensor) -> Tensor:
        return codes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.latent_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.latent_dtype), None


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Codes in the forward pass, identity to ``z`` in the backward pass (Bengio et al., arXiv:1308.3432).

    Args:
        z: ``(..., D)`` latents.
        codes: ``(..., D)`` their codes; receive no gradient.

    Returns:
        ``(..., D)``, bit-equal to ``codes`` and in their dtype.
    """
    return _StraightThrough.apply(z, codes.detach())
