"""What every loss term has: a weight, a first step, and a precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LossTerm(nn.Module):
    """Base class of the terms of an objective. ``forward`` returns the unweighted value; the objective weighs it.

    Args:
        weight: factor in the objective.
        start_step: optimizer step from which the term counts; before it, it is not computed.
        precision: what the term's networks compute in, ``float32`` or ``bfloat16``. What a term reduces over (norms,
            means, products with small differences) stays in float32 either way.

    Attributes:
        name: under which the value is logged.

    Raises:
        ValueError: for a negative weight or start step, or an unknown precision.
    """

    name: str = "term"

    def __init__(self, weight: float = 1.0, start_step: int = 0, precision: str = "float32") -> None:
        super().__init__()
        if weight < 0 or start_step < 0:
            raise ValueError(f"weight and start_step must not be negative; got {weight} and {start_step}")
        if precision not in _DTYPES:
            raise ValueError(f"precision must be one of {sorted(_DTYPES)}; got {precision!r}")
        self.weight = weight
        self.start_step = start_step
        self.precision = precision

    def active(self, step: int) -> bool:
        """Whether the term counts at an optimizer step."""
        return self.weight > 0 and step >= self.start_step

    def hold(self) -> Tensor:
        """A scalar 0 that depends on every trainable parameter of the term.

        It keeps a term that has not started in the graph, as DistributedDataParallel demands.
        """
        sums = [parameter.sum() for parameter in self.parameters() if parameter.requires_grad]
        return 0.0 * torch.stack(sums).sum() if sums else torch.zeros(())

    def drop_held_gradients(self, step: int) -> None:
        """Before ``start_step``, takes the zero gradients of :meth:`hold` away again, so an optimizer skips them.

        To be called between the backward pass and the optimizer's step. With zero gradients AdamW would count steps,
        which distorts its bias correction at the start, and decay the weights.
        """
        if not self.active(step):
            for parameter in self.parameters():
                parameter.grad = None

    def autocast(self, device_type: str) -> AbstractContextManager:
        """The precision that the term's networks run in, whatever the autocast around the training step."""
        if self.precision == "float32":
            return torch.autocast(device_type, enabled=False)
        return torch.autocast(device_type, _DTYPES[self.precision])
