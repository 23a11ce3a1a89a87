"""Numbers that change over a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Ramp:
    """A straight line between two values.

    Entropy regularisation of binary codes usually starts strong and relaxes: BSQ-ViT (arXiv:2406.07548) goes from three
    times its weight to once in 2000 steps.

    Args:
        start: value up to step ``begin``.
        end: value from step ``begin + steps`` on.
        steps: length of the line in optimizer steps.
        begin: optimizer step at which it starts.
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.begin < 0:
            raise ValueError(f"a Ramp needs steps >= 1 and begin >= 0; got steps={self.steps}, begin={self.begin}")

    def at(self, step: int) -> float:
        """The value at an optimizer step."""
        done = min(1.0, max(0.0, (step - self.begin) / self.steps))
        return self.start + (self.end - self.start) * done
