"""The Triton search against brute force, in Triton's interpreter on the CPU, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from vistok.quantizers import search

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CHECKS = """
import torch
from vistok.quantizers import search, search_triton

search.BACKEND = "triton"
calls = []
original = search_triton.best_scores
search_triton.best_scores = lambda *args: calls.append(1) or original(*args)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equals_brute_force(z, codebook, found):
    distances = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert found.dtype == torch.int64 and found.shape == (len(z),)
    wrong = found != distances.argmin(1)
    chosen = distances.gather(1, found[:, None])[:, 0]
    # A code chosen instead of the nearest is as near, up to the rounding of float32.
    assert wrong.float().mean() < 0.01 and (chosen - distances.amin(1) < 1e-5 * z.shape[1]).all()


def check_sizes():
    # Whole tiles, remainders of tokens, codes and channels, one code, one token, several parts of the channels.
    tiles = [(64, 64, 16), (65, 63, 8), (130, 200, 3), (1, 99, 17), (50, 1, 5), (1, 1, 1), (70, 100, 64), (40, 90, 150)]
    for tokens, codes, dim in tiles:
        z, codebook = normal(tokens, dim).float(), normal(codes, dim, seed=1).float()
        equals_brute_force(z, codebook, search.nearest_codes(z, codebook))
    assert search.nearest_codes(z[:0], codebook).shape == (0,)


def check_layout():
    z, codebook = normal(8, 100).float().T, normal(8, 150, seed=1).float().T  # not contiguous
    equals_brute_force(z, codebook, search.nearest_codes(z, codebook))


def check_ties():
    # Equal codes in one tile, in two tiles of one program, and in the shares of two programs.
    code = normal(1, 8, seed=2).float()
    codebook = normal(500, 8, seed=1).float() + 3
    for places in ([70, 71], [5, 69], [40, 300, 450], [130, 499]):
        for split in (64, 4096):
            search_triton.MIN_SPLIT = split
            table = codebook.clone()
            table[places] = code
            assert search.nearest_codes(code.repeat(67, 1), table).tolist() == [places[0]] * 67
    # Different codes at the same distance, on a grid.
    grid = torch.cartesian_prod(torch.arange(-8.0, 9.0), torch.arange(-8.0, 9.0)) + 0.25
    z = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))] + 0.5
    expected = (z[:, None] - grid).square().sum(-1).argmin(1)
    assert torch.equal(search.nearest_codes(z, grid), expected)
    assert search.nearest_codes(z, torch.zeros(200, 2)).tolist() == [0] * len(z)


def check_splits():
    search_triton.MIN_SPLIT = 4096
    z, codebook = normal(70, 8).float(), normal(700, 8, seed=1).float()
    whole = search.nearest_codes(z, codebook)
    for split in (64, 100, 350):
        search_triton.MIN_SPLIT = split
        assert torch.equal(search.nearest_codes(z, codebook), whole)
    equals_brute_force(z, codebook, whole)


def check_offset():
    z, codebook = (normal(200, 8) + 4096).float(), (normal(300, 8, seed=1) + 4096).float()
    equals_brute_force(z, codebook, search.nearest_codes(z, codebook))


def check_not_finite():
    for dim in (4, 70):  # nor do they reach other rows through the channels that fill up a tile
        z, codebook = normal(90, dim).float(), normal(70, dim, seed=1).float()
        clean = search.nearest_codes(z, codebook)
        z[3], z[50, 1], z[89, 2] = torch.nan, torch.inf, -torch.inf
        found = search.nearest_codes(z, codebook)
        assert ((found >= 0) & (found < 70)).all()
        finite = z.isfinite().all(1)
        assert torch.equal(found[finite], clean[finite])


def check_scores():
    z, codebook, bias = normal(66, 6).float(), normal(80, 6, seed=1).float(), normal(80, seed=2).float()
    expected = (z.double() @ codebook.double().T + bias.double()).argmax(1)
    assert torch.equal(search.best_scores(z, codebook, bias), expected)


def check_dtype():
    search.BACKEND = "triton"
    try:
        search.nearest_codes(normal(4, 4), normal(4, 4))
    except TypeError as error:
        assert "float32" in str(error)
    else:
        raise AssertionError("float64 was accepted")


for name, check in list(globals().items()):
    if name.startswith("check_"):
        count = len(calls)
        check()
        assert len(calls) > count, name  # it was the kernel that answered
        print(name)
"""


@pytest.fixture(scope="module")
def interpreted():
    """Names of the checks that passed, and what went wrong after them."""
    run = subprocess.run(
        [sys.executable, "-c", CHECKS],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    return run.stdout.split(), run.stderr


NAMES = [line[4:-3] for line in CHECKS.splitlines() if line.startswith("def check_")]


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_kernel_in_the_interpreter(interpreted, name):
    passed, errors = interpreted
    assert name in passed, errors[-3000:]


def test_import_and_cpu_search_do_without_triton():
    code = (
        "import sys, torch, vistok\n"
        "print('triton' in sys.modules)\n"
        "sys.modules['triton'] = None  # an import of it fails\n"
        "from vistok.quantizers.search import nearest_codes\n"
        "codes = torch.randn(7, 4)\n"
        "print(nearest_codes(codes, codes).tolist() == list(range(7)))\n"
        "print('vistok.quantizers.search_triton' in sys.modules)\n"
        "from vistok.quantizers import search_triton\n"
        "try:\n"
        "    search_triton.best_scores(codes, codes, codes[:, 0])\n"
        "except ImportError as error:\n"
        "    print('pip' in str(error))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "False", "True"]


def test_triton_is_used_for_float32_on_a_gpu_only(monkeypatch):
    class Latents:
        def __init__(self, is_cuda, dtype, tokens, dim):
            self.is_cuda, self.dtype, self.shape = is_cuda, dtype, (tokens, dim)

    monkeypatch.setattr(search, "_triton_is_installed", lambda: True)
    assert search._use_triton(Latents(True, torch.float32, 100, 256), 1 << 18)
    assert not search._use_triton(Latents(True, torch.float32, 100, 257), 1 << 18)
    assert not search._use_triton(Latents(True, torch.float64, 100, 8), 1 << 18)
    assert not search._use_triton(Latents(False, torch.float32, 100, 8), 1 << 18)
    assert not search._use_triton(Latents(True, torch.float32, 1 << 28, 8), 1 << 18)
    monkeypatch.setattr(search, "_triton_is_installed", lambda: False)
    assert not search._use_triton(Latents(True, torch.float32, 100, 8), 1 << 18)
    monkeypatch.setattr(search, "BACKEND", "triton")
    assert search._use_triton(Latents(False, torch.float32, 100, 8), 1 << 18)
    monkeypatch.setattr(search, "BACKEND", "torch")
    monkeypatch.setattr(search, "_triton_is_installed", lambda: True)
    assert not search._use_triton(Latents(True, torch.float32, 100, 8), 1 << 18)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_on_a_gpu_equals_the_torch_version(monkeypatch):
    for tokens, codes, dim in [(1, 1, 1), (1000, 300, 8), (4096, 16384, 64), (300, 70000, 256), (777, 5000, 100)]:
        generator = torch.Generator().manual_seed(dim)
        z, codebook = (torch.randn(size, dim, generator=generator).cuda() for size in (tokens, codes))
        found = {}
        for backend in ("torch", "triton"):
            monkeypatch.setattr(search, "BACKEND", backend)
            found[backend] = search.nearest_codes(z, codebook)
        distance = [(z - codebook[index]).double().square().sum(1) for index in found.values()]
        assert (found["torch"] == found["triton"]).double().mean() > 0.995
        assert torch.allclose(*distance, rtol=1e-5, atol=1e-5)
