"""Processes out of the environment that torchrun makes."""

from datetime import timedelta

import torch.distributed as dist

from vistok.eval.processes import Processes, from_environment


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert from_environment() == Processes(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = from_environment()
    alone.barrier()
    assert (alone.rank, alone.world_size) == (0, 1)


def test_processes_of_torchrun_meet_over_gloo_and_wait_long_for_the_slowest(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(calls))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.append((backend, timeout)))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    processes = from_environment()
    assert (processes.rank, processes.world_size) == (3, 4)
    processes.barrier()
    assert calls[0][0] == "gloo" and calls[0][1] >= timedelta(hours=12) and calls[1:] == ["barrier"]
    from_environment()
    assert len(calls) == 2  # joined once
