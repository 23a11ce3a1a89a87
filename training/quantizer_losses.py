"""The quantizer's losses as a part of an objective."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .schedules import Ramp


def quantizer_loss(
    losses: Mapping[str, Tensor],
    published: Mapping[str, float],
    chosen: Mapping[str, float | Ramp],
    step: int,
) -> Tensor | float:
    """Weighted sum of the losses that a quantizer returned.

    Args:
        losses: unweighted scalars by name.
        published: default weights.
        chosen: weights over the defaults; 0 turns a loss off.
        step: optimizer steps done before this one.

    Raises:
        ValueError: for a weight of a loss that there is not, or a loss without a weight.
    """
    unknown = sorted(set(chosen) - set(losses))
    if unknown:
        raise ValueError(f"quantizer_weights names {unknown}; this tokenizer's losses are {sorted(losses)}")
    weights = {**published, **chosen}
    missing = sorted(set(losses) - set(weights))
    if missing:
        raise ValueError(f"quantizer_weights needs a weight for {missing} (0 turns a loss off)")
    total: Tensor | float = 0.0
    for name, value in losses.items():
        weight = weights[name]
        weight = weight.at(step) if isinstance(weight, Ramp) else weight
        if weight:
            total = total + weight * value
    return total
