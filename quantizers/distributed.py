"""Reductions over ranks, decided when they are called.

A module is usually built before the process group exists, so nothing here is looked up at construction. Without a
process group every function returns what it was given.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, as a new tensor of the same shape."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """``(n, ...)`` -> ``(ranks * n, ...)``: the rows of all ranks, rank after rank; every rank brings as many."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def from_first_rank(values: Tensor) -> Tensor:
    """What rank 0 holds, as a new tensor: for random draws that have to be the same everywhere."""
    if world_size() == 1:
        return values
    shared = values.clone()
    dist.broadcast(shared, 0)
    return shared


def mean_over_ranks(mean: Tensor, weight: Tensor) -> Tensor:
    """The mean over the samples of all ranks, of a mean over the samples of each.

    The value is the global mean, the gradient the local one times ranks x share of the samples: after the averaging of
    gradients that data-parallel training does, that equals the gradient of one process with the whole batch.

    Args:
        mean: mean over this rank's samples, any shape.
        weight: scalar tensor, the number of this rank's samples.
    """
    ranks = world_size()
    if ranks == 1:
        return mean
    weight = weight.to(mean.dtype)
    total = sum_over_ranks(weight).clamp(min=1)
    own = mean * (ranks * weight / total)
    everyone = sum_over_ranks(mean.detach() * (weight / total))
    return own + (everyone - own).detach()
