"""Nearest-code search, the torch version: brute force in float64, ties, block sizes, precision, memory, compilation."""

import subprocess
import sys

import pytest
import torch

from vistok.quantizers import search
from vistok.quantizers.search import best_scores, nearest_codes

SIZES = [(1, 1, 1), (1, 130, 3), (50, 1, 5), (70, 64, 8), (33, 65, 16), (130, 300, 8), (40, 90, 150)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(z, codebook):
    return torch.stack([(row - codebook).square().sum(1).argmin() for row in z])


def grid(side):
    """``(side^2, 2)`` points of a square lattice, one unit apart."""
    ticks = torch.arange(float(side))
    return torch.cartesian_prod(ticks, ticks)


@pytest.mark.parametrize("tokens,codes,dim", SIZES)
def test_nearest_equals_brute_force_whatever_the_blocks(tokens, codes, dim, monkeypatch):
    z, codebook = normal(tokens, dim), normal(codes, dim, seed=1)
    expected = brute_force(z, codebook)
    for code_block, chunk in [(8192, 64), (64, 64), (50, 7), (33, 64)]:
        monkeypatch.setattr(search, "CODE_BLOCK", code_block)
        monkeypatch.setattr(search, "CODE_CHUNK", chunk)
        for buffer_elements in (None, 700, 5000):
            assert torch.equal(nearest_codes(z, codebook, buffer_elements=buffer_elements), expected)


@pytest.mark.parametrize("tokens,codes,dim", SIZES)
def test_float32_chooses_a_code_as_near_as_the_nearest(tokens, codes, dim):
    z, codebook = normal(tokens, dim).float(), normal(codes, dim, seed=1).float()
    found, expected = nearest_codes(z, codebook), brute_force(z.double(), codebook.double())
    distance = [(z - codebook[index]).double().square().sum(1) for index in (found, expected)]
    assert (distance[0] - distance[1]).max() < 1e-5 * dim and (found != expected).double().mean() < 0.01


def test_best_scores_equals_brute_force(monkeypatch):
    monkeypatch.setattr(search, "CODE_BLOCK", 40)
    monkeypatch.setattr(search, "CODE_CHUNK", 8)
    latents, codes, bias = normal(60, 6), normal(130, 6, seed=1), normal(130, seed=2)
    expected = (latents @ codes.T + bias).argmax(1)
    for buffer_elements in (0, 1, 333):
        assert torch.equal(best_scores(latents, codes, bias, buffer_elements), expected)


def test_equal_codes_with_equal_scores_give_the_lowest_index_and_with_a_higher_bias_that_one():
    latents, codes, bias = 0.1 * normal(90, 8), normal(300, 8, seed=1), normal(300, seed=2)
    codes[[4, 7, 250]], bias[[4, 7, 250]] = codes[4].clone(), 50.0
    assert best_scores(latents, codes, bias).tolist() == [4] * 90
    bias[[7, 250]] = 51.0
    assert best_scores(latents, codes, bias).tolist() == [7] * 90


@pytest.mark.parametrize("dim", [3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lowest_of_equal_codes_wins_in_a_chunk_in_a_block_and_between_blocks(dim, dtype, monkeypatch):
    monkeypatch.setattr(search, "CODE_BLOCK", 128)
    z = (0.1 * normal(90, dim)).to(dtype)
    for places in [(3, 4), (10, 100), (60, 128, 299), (127, 257), (290, 299)]:  # the last block is shorter
        codebook = (normal(300, dim, seed=1) + 9).to(dtype)
        codebook[list(places)] = normal(1, dim, seed=2).to(dtype)
        for buffer_elements in (None, 128, 128 * 17):
            found = nearest_codes(z, codebook, buffer_elements=buffer_elements)
            assert found.tolist() == [places[0]] * 90


def test_a_codebook_of_equal_codes_gives_index_0():
    assert nearest_codes(normal(40, 4).float(), torch.full((9000, 4), 0.3)).tolist() == [0] * 40


@pytest.mark.parametrize("offset", [0.0, 0.3125, 1000.0])
def test_a_tie_between_different_codes_on_a_grid_goes_to_the_lowest(offset, monkeypatch):
    """Midway between two or four lattice points every score is exact, although the mean of the codes is not."""
    monkeypatch.setattr(search, "CODE_BLOCK", 64)
    codebook = torch.cat([grid(13), torch.full((1, 2), 6.5)])[torch.randperm(170)]
    z = grid(12).repeat_interleave(3, 0) + torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.5, 0.5]]).repeat(144, 1)
    expected = brute_force(z.double(), codebook.double())
    assert torch.equal(nearest_codes(z + offset, codebook + offset), expected)


@pytest.mark.parametrize("offset", [10.0, 4096.0, -1e6])
def test_a_common_offset_costs_no_precision(offset):
    codebook = (normal(400, 8, seed=1) + offset).float()
    z = (normal(300, 8) + offset).float()
    # In float64 the differences of these float32 numbers are exact.
    expected = brute_force(z.double(), codebook.double())
    distance = [(z.double() - codebook[i].double()).square().sum(1) for i in (nearest_codes(z, codebook), expected)]
    assert (distance[0] - distance[1]).max() < 1e-4


def test_few_indices_differ_from_float64():
    z, codebook = normal(2000, 16), normal(4096, 16, seed=1)
    exact = nearest_codes(z, codebook)
    assert (nearest_codes(z.float(), codebook.float()) != exact).double().mean() <= 0.001


@pytest.mark.parametrize(
    "z_dtype,codes_dtype", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_half_precision_inputs_are_compared_in_float32(z_dtype, codes_dtype):
    z, codebook = normal(200, 8).to(getattr(torch, z_dtype)), normal(300, 8, seed=1).to(getattr(torch, codes_dtype))
    assert torch.equal(nearest_codes(z, codebook), nearest_codes(z.float(), codebook.float()))


def test_memory_layout_does_not_matter():
    z, codebook = normal(8, 100), normal(8, 150, seed=1)
    assert torch.equal(nearest_codes(z.T, codebook.T), nearest_codes(z.T.contiguous(), codebook.T.contiguous()))


def test_latents_that_are_not_finite_change_no_other_index(monkeypatch):
    monkeypatch.setattr(search, "CODE_BLOCK", 100)
    z, codebook = normal(90, 4).float(), normal(270, 4, seed=1).float()
    clean = nearest_codes(z, codebook)
    z[3], z[50, 1], z[89, 2], z[60] = torch.nan, torch.inf, -torch.inf, 3e38
    found = nearest_codes(z, codebook)
    assert ((found >= 0) & (found < 270)).all()
    touched = torch.tensor([3, 50, 60, 89])
    kept = torch.ones(90, dtype=torch.bool).index_fill(0, touched, False)
    assert torch.equal(found[kept], clean[kept])


def test_no_latents_have_no_indices():
    assert nearest_codes(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)
    assert best_scores(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(3)).shape == (0,)


def test_search_compiles_without_graph_breaks_and_carries_no_gradient():
    z, codebook = normal(30, 4).requires_grad_(), normal(50, 4, seed=1).requires_grad_()
    compiled = torch.compile(lambda z, codebook: nearest_codes(2 * z, codebook), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, codebook), nearest_codes(2 * z, codebook))
    assert not nearest_codes(z, codebook).requires_grad


def test_search_through_262144_codes_stays_small():
    """All scores would take 1 GB, a second codebook 17 MB: the search holds a few blocks and 24 B per code."""
    code = (
        "import resource, torch\n"
        "from vistok.quantizers.search import nearest_codes\n"
        "torch.set_num_threads(1)\n"
        "z, codebook = torch.randn(1024, 16), torch.randn(262144, 16)\n"
        "nearest_codes(z[:64], codebook[:9000])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "nearest_codes(z, codebook)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 12_000  # kB
