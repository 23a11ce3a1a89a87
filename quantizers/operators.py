"""Functions that torch.compile sees as one call.

A loop over blocks of codes would be unrolled into a graph, and a switch of the matrix precision cannot be traced at
all, so both live inside an operator. ``torch.library.custom_op`` makes such operators too, but its first call imports
the whole compiler (seconds, which every ``vistok encode`` would wait for), and every later one costs more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "vistok"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """An operator ``vistok::<name>``; call it like the function it was made of."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"{NAMESPACE}::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self._call = getattr(getattr(torch.ops, NAMESPACE), name)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say what shapes and dtypes come out, without computing; for tracing."""
        return torch.library.register_fake(self.name, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Give the operator a gradient; see ``torch.library.register_autograd``."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes the operator ``vistok::<name>`` of a function without side effects.

    The function's type hints are the schema; its results must not be views of its arguments.
    """
    return lambda function: Operator(name, function)
