"""Exponential moving average of a model's weights, as a plain second model."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_decay(step: int, decay: float) -> float:
    """Decay of the update after optimizer step ``step`` (from 0): 0, 2/11, 3/12 ... up to ``decay``.

    The ramp lets the average forget the random start; TiTok's training code uses the same one.
    """
    return 0.0 if step <= 0 else min(decay, (1 + step) / (10 + step))


def ema_copy(model: nn.Module) -> nn.Module:
    """A frozen copy in eval mode, to be updated by :func:`ema_update`."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average = decay * average + (1 - decay) * model`` for parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for own, live in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(live)
