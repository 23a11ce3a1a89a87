"""Which values occur, how often, and in which image first: for sets too large to have a counter for every member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distinct:
    """The values that occur.

    Attributes:
        values: int64 ``(V,)`` ascending.
        counts: int64 ``(V,)``, how often each occurs.
        first: int64 ``(V,)``, the least number of an image that has it.
    """

    values: Tensor
    counts: Tensor
    first: Tensor

    @classmethod
    def of(cls, values: Tensor, images: Tensor) -> Distinct:
        """The values ``(n,)`` that images numbered ``(n,)`` have; negative ones do not count."""
        kept = values >= 0
        values, images = values[kept], images[kept]
        return cls.union([cls(values, torch.ones_like(values), images)])

    @classmethod
    def union(cls, parts: Sequence[Distinct]) -> Distinct:
        """All of them together: counts add, the first image is the first of all."""
        values = torch.cat([part.values for part in parts])
        found, place = values.unique(return_inverse=True)
        counts = torch.zeros_like(found).index_add_(0, place, torch.cat([part.counts for part in parts]))
        first = torch.full_like(found, torch.iinfo(torch.int64).max)
        first.scatter_reduce_(0, place, torch.cat([part.first for part in parts]), "amin")
        return cls(found, counts, first)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def entropy(self) -> float:
        """Of the values, in bits; 0 if there are none."""
        share = self.counts.double() / max(self.total, 1)
        return float(-torch.special.xlogy(share, share).sum()) / _LN2 + 0.0


_LN2 = 0.6931471805599453
