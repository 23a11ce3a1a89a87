"""Codebooks over two gloo processes with unequal numbers of tokens, against one process with all of them."""

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("vistok_test_ranks", Path(__file__).with_name("ranks.py"))
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)

WORLD = 2

# `work` runs in every process, and once more here with the tokens of all ranks in one batch.
SOURCE = """
import torch
from vistok import VectorQuantizer
from vistok.quantizers.kmeans import kmeans

OPTIONS = {
    "ema": {"codebook_update": "ema", "ema_decay": 0.9},
    "ema-restart": {"codebook_update": "ema", "restart_below": 0.7, "ema_decay": 0.5},
    "restart": {"restart_below": 0.7, "ema_decay": 0.5},
    "idle": {"restart_after": 1, "l2_normalize": True},
    "anchors": {"anchors": True, "ema_decay": 0.5},
    "kmeans": {"codebook_update": "ema", "kmeans_steps": 2},
    "kmeans-few": {"kmeans_steps": 1},
}

def make(**options):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, **options).double()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(16, 3, dtype=torch.float64))
        if quantizer.ema:
            quantizer.sums.copy_(quantizer.codebook / 16)
            quantizer.usage.fill_(1 / 16)
    return quantizer

def build():
    return {name: make(**options) for name, options in OPTIONS.items()} | {"entropy": make(entropy_temperature=0.3)}

def tokens(rank, world, seed, each=8):
    parts = [
        torch.randn(1, each * (r + 1), 3, generator=torch.Generator().manual_seed(10 * seed + r), dtype=torch.float64)
        for r in range(2)
    ]
    return parts[rank] if world > 1 else torch.cat(parts, 1)

def work(quantizers, rank, world):
    torch.manual_seed(100 + rank)  # each rank draws on its own
    out = {}
    for name in OPTIONS:
        for step in range(1 if name == "kmeans-few" else 3):
            each = 4 if name == "kmeans-few" else 8
            quantizers[name](tokens(rank, world, step, each))
            quantizers[name].commit_update()
            out[f"{name}/{step}"] = {key: value.clone() for key, value in quantizers[name].state_dict().items()}
    quantizer, z = quantizers["entropy"], tokens(rank, world, 0)
    loss = quantizer(z.requires_grad_()).losses["entropy"]
    to_z, to_codebook = torch.autograd.grad(loss, (z, quantizer.codebook))
    out["entropy"] = {"loss": loss.detach(), "to_z": to_z, "to_codebook": to_codebook}
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out["lloyd"] = {"codes": kmeans(tokens(rank, world, 0)[0].detach(), start, 4)}
    return out
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every rank holds, and what a single process does."""
    space = {}
    exec(SOURCE, space)
    several = ranks.run_ranks(tmp_path_factory.mktemp("ranks"), SOURCE, WORLD)
    return several, space["work"](space["build"](), 0, 1), space["tokens"]


def test_all_ranks_hold_the_same_bit_for_bit(outcomes):
    several, _, _ = outcomes
    for other in several[1:]:
        for name in set(other) - {"entropy"}:
            for key, value in several[0][name].items():
                assert torch.equal(value, other[name][key]), (name, key)


@pytest.mark.parametrize("name", ["ema/0", "ema/1", "ema/2", "anchors/0", "anchors/2", "lloyd"])
def test_ranks_equal_one_process_with_all_tokens(outcomes, name):
    several, single, _ = outcomes
    for key, value in single[name].items():
        assert torch.allclose(several[0][name][key], value, rtol=1e-6, atol=1e-9), key


@pytest.mark.parametrize("name", ["ema-restart/0", "restart/0", "idle/0"])
def test_the_same_codes_restart_as_in_one_process_on_tokens_of_all_ranks(outcomes, name):
    several, single, tokens = outcomes
    number = int(name[-1])
    pool = tokens(0, 1, number)[0]
    pool = torch.nn.functional.normalize(pool, dim=1) if name.startswith("idle") else pool
    moved = [(state[name]["codebook"][:, None] == pool).all(-1) for state in (several[0], single)]  # (K, n)
    assert 1 < moved[0].any(1).sum() < 16 and torch.equal(moved[0].any(1), moved[1].any(1))
    assert moved[0].sum(0).max() == 1  # a token for each
    chosen = moved[0].any(0)
    assert chosen[:8].any() and chosen[8:].any()  # of both ranks
    for key in set(single[name]) - {"codebook", "sums"}:
        assert torch.allclose(several[0][name][key].double(), single[name][key].double(), atol=1e-12), key


def test_kmeans_sees_the_tokens_of_all_ranks(outcomes):
    several, single, tokens = outcomes
    # 12 tokens for 16 codes: every token becomes a code, and four codes stay.
    for state in (several[0], single):
        codebook, pool = state["kmeans-few/0"]["codebook"], tokens(0, 1, 0, 4)[0]
        assert ((codebook[:, None] == pool).all(-1).sum(0) == 1).all()
    # 48 tokens in two steps: random centroids of their own, but in either case each code is the mean of its tokens.
    pool = torch.cat([tokens(0, 1, step)[0] for step in range(2)])
    for state in (several[0], single):
        codebook = state["kmeans/1"]["codebook"]
        found = torch.cdist(pool, codebook).argmin(1)
        for code in found.unique():
            assert torch.allclose(codebook[code], pool[found == code].mean(0), atol=1e-6)
        assert state["kmeans/1"]["kmeans_steps_left"] == 0


def test_entropy_and_its_averaged_gradient_equal_one_process(outcomes):
    several, single, _ = outcomes
    for one in several:
        assert torch.allclose(one["entropy"]["loss"], single["entropy"]["loss"], rtol=1e-9)
    averaged = sum(one["entropy"]["to_codebook"] for one in several) / WORLD
    assert torch.allclose(averaged, single["entropy"]["to_codebook"], atol=1e-12)
    to_z = torch.cat([one["entropy"]["to_z"] for one in several], 1) / WORLD
    assert torch.allclose(to_z, single["entropy"]["to_z"], atol=1e-12)
