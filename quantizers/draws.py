"""Random draws that compile.

Passing ``generator=None`` selects another operator than leaving it out, and that one takes no symbolic shapes: under
``torch.compile`` a second batch size would stop with an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_uniform(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Uniform float32 numbers in [0, 1)."""
    if generator is None:
        return torch.rand(tuple(shape), device=device)
    return torch.rand(tuple(shape), device=device, generator=generator)


def draw_integers(
    high: int, shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform int64 numbers in [0, high)."""
    if generator is None:
        return torch.randint(high, tuple(shape), device=device)
    return torch.randint(high, tuple(shape), device=device, generator=generator)
