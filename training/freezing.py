"""Parts of a tokenizer that are not trained, named in one field of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Take the gradient from named parts of a model and put them into eval mode.

    Args:
        model: changed in place.
        names: of submodules (``encoder``, ``decoder.blocks.0``) or single parameters (``encoder.position``).

    Returns:
        The submodules among them, to be kept in eval mode by whoever calls ``model.train()``.

    Raises:
        ValueError: for a name that is neither, with those that are.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    frozen = []
    for name in names:
        if name and name in modules:
            frozen.append(modules[name].requires_grad_(False).eval())
        elif name in parameters:
            parameters[name].requires_grad_(False)
        else:
            children = [child for child, _ in model.named_children()]
            raise ValueError(f"freeze: {name!r} is no part of {type(model).__name__}; its parts are {children}")
    return frozen
