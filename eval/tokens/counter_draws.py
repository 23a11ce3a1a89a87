"""Random numbers that belong to an image: the same on every device, in every batch and process.

Each number is a hash of (seed, number of the image, place): the SplitMix64 generator (Steele, Lea and Flood, OOPSLA
2014), begun for every image at a state of its own. Integers all the way, so no device rounds differently, and no loop
over images.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAW_BITS = 31  # a draw is an integer below 2^31

_STEP = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def counter_draws(seed: int, index: Tensor, places: int) -> Tensor:
    """Uniform integers in [0, 2^31).

    Args:
        seed: any integer.
        index: int64 ``(B,)``, the numbers of the images.
        places: P, how many draws each image gets; the first of them do not depend on it.

    Returns:
        int64 ``(B, P)`` on the device of ``index``.
    """
    start = _mixed(_mixed(torch.tensor(_signed(seed), device=index.device)) + index)  # (B,)
    steps = torch.arange(1, places + 1, device=index.device) * _signed(_STEP)  # (P,)
    return _shifted(_mixed(start.unsqueeze(1) + steps), 64 - DRAW_BITS)


def _mixed(state: Tensor) -> Tensor:
    """The output function of SplitMix64, on 64-bit integers that wrap around."""
    state = (state ^ _shifted(state, 30)) * _signed(_MIX[0])
    state = (state ^ _shifted(state, 27)) * _signed(_MIX[1])
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, places: int) -> Tensor:
    """Shifted to the right with zeros coming in, as if there were no sign."""
    return (state >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    """The 64-bit integer with the same bits, as torch writes it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
