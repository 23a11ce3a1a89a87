"""Turning published parameter names into ours, by ordered rules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

Rules = Iterable[tuple[str, str]]


def rename(state: dict[str, Tensor], rules: Rules, training_only: Iterable[str] = ()) -> dict[str, Tensor]:
    """Apply ``(pattern, replacement)`` rules, all in order, to every name.

    Args:
        state: published name -> tensor.
        rules: regular expressions and their replacements.
        training_only: patterns, matched at the start, of tensors that only training needs; these are left out.

    Raises:
        ValueError: if two names become one.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if any(re.match(pattern, name) for pattern in training_only):
            continue
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"two published tensors map to {new!r}; the second is {name!r}")
        renamed[new] = tensor
    return renamed


def pointwise_to_linear(state: dict[str, Tensor], names: Iterable[str]) -> None:
    """Reshape 1x1 convolution weights ``(out, in, 1, 1)`` into linear ones ``(out, in)``, in place."""
    for name in names:
        if name in state:
            state[name] = state[name].flatten(1)


def count(state: dict[str, Tensor], pattern: str) -> int:
    """Number of different first groups that ``pattern`` captures at the start of the names."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})


def reject_overrides(overrides: dict[str, object], family: str, accepted: Iterable[str]) -> None:
    """Raise for overrides that a family does not take."""
    unknown = sorted(set(overrides) - set(accepted))
    if unknown:
        raise ValueError(f"{family} checkpoints take the overrides {sorted(accepted)}; got {unknown}")
