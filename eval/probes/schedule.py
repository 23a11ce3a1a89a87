"""The learning rate of the small models that an evaluation trains: up in a straight line, down along a cosine to 0."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate at a step, 0 <= step < steps."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
