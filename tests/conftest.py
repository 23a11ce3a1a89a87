"""One thread per process: the tests run in parallel, and small tensors only lose time in thread pools."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """No test sees the seed of another's run, or counts towards the limits of the compiler for the next."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is put back afterwards
    monkeypatch.delenv("PL_GLOBAL_SEED")
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
