"""The processes that share an evaluation, and how they wait for one another."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

_PATIENCE = timedelta(days=1)  # of a process that is done, with the slowest


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
        barrier: waits until all have called it.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = _nothing


def from_environment() -> Processes:
    """The processes that ``torchrun`` (or SLURM through it) has started, over gloo; this one alone without it.

    Only barriers go over the network: results are merged from files.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return Processes()
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), world_size, dist.barrier)
