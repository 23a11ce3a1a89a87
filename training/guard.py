"""Steps whose gradient is not finite: skipped on the device, counted, and the end of a run that makes too many.

A loss that is NaN or infinite makes the norm of the gradient so, on every rank alike once gradients are reduced. The
fused optimizers of torch take a flag that turns such a step into no step at all, so nothing has to wait for the device;
the counters are read only where a run logs or saves anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had no finite gradient."""


class StepGuard(nn.Module):
    """Counters of skipped steps, on the device.

    Args:
        limit: steps in a row without a finite gradient after which :meth:`check` ends the run; never if ``None``.
    """

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        if limit is not None and limit < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, or null for no limit; got {limit}")
        self.limit = limit
        for name in ("total", "in_a_row", "most_in_a_row"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def observe(self, norms: Sequence[Tensor]) -> Tensor:
        """Count a step by its gradient norms; returns float32 ``()``, 1 if the step must be skipped, else 0."""
        bad = ~torch.stack([norm.float() for norm in norms]).isfinite().all()
        self.total += bad
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.most_in_a_row, self.in_a_row, out=self.most_in_a_row)
        return bad.float()

    def check(self, step: int) -> None:
        """Read the counters (this waits for the device) and end the run if there were too many skipped steps in a row.

        Raises:
            NonFiniteLossError: naming the step, the counts, and what usually helps.
        """
        if self.limit is None:
            return
        most, total = int(self.most_in_a_row), int(self.total)
        if most >= self.limit:
            raise NonFiniteLossError(
                f"{most} steps in a row had a loss or gradient that is not finite (step {step}, {total} skipped in "
                f"all, limit max_skipped_steps={self.limit}). The weights are those before the first of them, and so "
                f"are the checkpoints. Usual causes: a learning rate that is too high, float16, a loss that divides by "
                f"almost nothing; try bf16-mixed, a smaller lr, a longer warm-up, or gradient_clip_val"
            )
        self.most_in_a_row.copy_(self.in_a_row)
