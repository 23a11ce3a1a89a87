"""Exponential moving average of a model's weights, as a plain second model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def ema_decay(step: int, decay: float) -> float:
    """Decay of the update after optimizer step ``step`` (from 0): 0, 2/11, 3/12 ... up to ``decay``.

    The ramp lets the average forget the random start; TiTok's training code uses the same one.
    """
    return 0.0 if step <= 0 else min(decay, (1 + step) / (10 + step))


def ema_copy(model: nn.Module, shared: Sequence[nn.Module] = ()) -> nn.Module:
    """A frozen copy in eval mode, to be updated by :func:`ema_update`.

    Args:
        model: what is averaged.
        shared: frozen parts of it, which the copy uses instead of holding a second time.
    """
    return copy.deepcopy(model, {id(part): part for part in shared}).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average = decay * average + (1 - decay) * model`` for trained parameters; buffers are copied.

    Frozen parameters are left alone: both have held the same values from the start.
    """
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    trained = [(own, live) for own, live in pairs if live.requires_grad]
    if trained:
        torch._foreach_lerp_([own for own, _ in trained], [live for _, live in trained], 1 - decay)
    for own, live in zip(average.buffers(), model.buffers(), strict=True):
        if own is not live:
            own.copy_(live)
