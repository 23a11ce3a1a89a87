"""How evenly the digits of implicit codes are used: bits of binary codes, channels of finite scalar quantization.

A codebook of 2^36 codes has no histogram, but 36 bits do. Codes are used well if every digit takes its values equally
often and no digit tells another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...quantizers.radix import unpack_digits


class DigitStatistics:
    """Sums over tokens of digits, and of their products.

    Args:
        sizes: number of values of each digit of an index, least significant first.
        num_subcodes: indices of a token; D is the number of digits of all of them.
    """

    def __init__(self, sizes: Sequence[int], num_subcodes: int) -> None:
        self.sizes = tuple(sizes)
        self.all_sizes = self.sizes * num_subcodes
        dim = len(self.all_sizes)
        self.counts = torch.zeros(dim, max(sizes), dtype=torch.int64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)  # whole numbers: exact, in any order

    def update(self, indices: Tensor) -> None:
        """Add tokens ``(n, G)``; those with a dropped sub-code do not count."""
        device = indices.device
        kept = (indices >= 0).all(1, keepdim=True)
        digits = unpack_digits(indices.clamp(min=0), self.sizes).flatten(1)  # (n, D)
        self.counts, self.products = self.counts.to(device), self.products.to(_summing(device))
        slots = torch.arange(len(self.all_sizes), device=device) * self.counts.shape[1] + digits
        self.counts.view(-1).scatter_add_(0, slots.flatten(), kept.expand_as(slots).long().flatten())
        values = torch.where(kept, digits, 0).to(self.products.device).double()  # (n, D)
        self.products += values.t() @ values

    def state_dict(self) -> dict[str, Tensor]:
        """As plain data on the host."""
        return {"counts": self.counts.cpu().clone(), "products": self.products.cpu().clone()}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the state of another."""
        self.counts = self.counts.cpu() + state["counts"]
        self.products = self.products.cpu() + state["products"]

    def entropies(self) -> Tensor:
        """Entropy of every digit relative to that of even use, float64 ``(D,)``."""
        counts = self.counts.cpu().double()
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        largest = torch.tensor([math.log(size) if size > 1 else 1.0 for size in self.all_sizes], dtype=torch.float64)
        return -torch.special.xlogy(share, share).sum(1) / largest + 0.0

    def correlations(self) -> Tensor:
        """Correlation of every two digits, float64 ``(D, D)``; 0 for digits that never change."""
        counts = self.counts.cpu().double()
        tokens = counts.sum(1)[0].clamp(min=1)
        means = counts @ torch.arange(counts.shape[1], dtype=torch.float64) / tokens  # (D,)
        covariance = self.products.cpu().double() / tokens - means.outer(means)
        scale = covariance.diagonal().clamp(min=0).sqrt()
        varies = scale > 1e-9
        return torch.where(varies.outer(varies), covariance / scale.outer(scale).clamp(min=1e-30), 0.0)


def _summing(device: torch.device) -> torch.device:
    """Where float64 is added up for a device."""
    return torch.device("cpu") if device.type == "mps" else device
