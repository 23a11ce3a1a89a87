"""Entropies of soft assignments, against the written-out N x K expression, fixtures and other processes."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.entropy import codebook_entropy, entropy


def _load(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity, ranks = _load("parity"), _load("ranks")


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(tokens=23, codes=11, dim=4, dtype=torch.float64):
    inputs = numbers(tokens, dim), numbers(codes, dim, seed=1), numbers(codes, seed=2)
    return [x.to(dtype).requires_grad_() for x in inputs]


def dense(latents, codebook, bias, temperature, eps=0.0):
    p = ((latents @ codebook.T + bias) / temperature).softmax(1)
    mean = p.mean(0)
    return -torch.special.xlogy(p, p).sum(1).mean(), -(mean * (mean + eps).log()).sum()


def gradients(pair, inputs, weights=(0.3, -1.7)):
    return torch.autograd.grad(weights[0] * pair[0] + weights[1] * pair[1], inputs)


def shrink_blocks(monkeypatch, block, rows=1, limit=1):
    for name, value in (("CPU_BLOCK", block), ("CPU_ROWS", rows), ("CPU_LIMIT", limit)):
        monkeypatch.setattr(f"vistok.quantizers.softmax.{name}", value)


# ---- values and gradients


@pytest.mark.parametrize("block", [1, 30, 10**6])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_values_and_gradients_equal_dense_autograd_for_any_block(block, temperature, eps, monkeypatch):
    shrink_blocks(monkeypatch, block)
    inputs = problem()
    expected = dense(*inputs, temperature, eps)
    got = codebook_entropy(*inputs, temperature, reduce=True, eps=eps)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_gradients_equal_finite_differences():
    inputs = problem(tokens=4, codes=5, dim=2)
    assert torch.autograd.gradcheck(lambda *x: codebook_entropy(*x, 0.7, reduce=True), inputs)


def test_bounds():
    latents, codebook, _ = problem(tokens=50)
    sample, batch = codebook_entropy(latents, codebook, None, 1.0, reduce=False)
    assert 0 <= sample <= batch <= math.log(11)
    sample, batch = codebook_entropy(0 * latents, codebook, None, 1.0, reduce=False)
    assert abs(sample - math.log(11)) < 1e-12 and abs(batch - math.log(11)) < 1e-12
    every_code_once = torch.eye(11, dtype=torch.float64)
    sample, batch = codebook_entropy(every_code_once, every_code_once, None, 0.01, reduce=False)
    assert sample < 1e-12 and abs(batch - math.log(11)) < 1e-12


def test_codes_that_no_token_can_reach_leave_the_gradient_finite():
    inputs = [(1000 * x.detach()).float().requires_grad_() for x in problem()]
    probabilities = ((inputs[0] @ inputs[1].T + inputs[2]) / 0.01).softmax(1).mean(0)
    assert (probabilities == 0).any()
    pair = codebook_entropy(*inputs, 0.01, reduce=True)
    assert all(value.isfinite() for value in pair)
    assert all(gradient.isfinite().all() for gradient in gradients(pair, inputs))
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    entropy(p).backward()
    assert entropy(p) == 0 and p.grad.isfinite().all()


# ---- masks and latents that are not finite


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_mask_equals_truncation_whatever_the_padding_holds(value):
    inputs = problem()
    short = [inputs[0].detach()[:15].requires_grad_(), *inputs[1:]]
    padded = inputs[0].detach().clone()
    padded[15:] = value
    masked = [padded.requires_grad_(), *inputs[1:]]
    one = codebook_entropy(*masked, 0.5, torch.arange(23) < 15, reduce=True)
    other = codebook_entropy(*short, 0.5, reduce=True)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    got, expected = gradients(one, masked), gradients(other, short)
    assert (got[0][15:] == 0).all()
    for a, b in zip((got[0][:15], *got[1:]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_an_empty_mask_gives_zero_entropies():
    inputs = problem()
    pair = codebook_entropy(*inputs, 0.5, torch.zeros(23, dtype=torch.bool), reduce=True, eps=1e-5)
    assert [float(value.detach()) for value in pair] == [0, 0]
    assert all((gradient == 0).all() for gradient in gradients(pair, inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_latent_that_is_not_finite_makes_the_sample_entropy_nan_but_no_gradient(value):
    inputs = problem()
    rest = [inputs[0].detach()[1:].requires_grad_(), *inputs[1:]]
    broken = [inputs[0].detach().clone().requires_grad_(), *inputs[1:]]
    broken[0].data[0, 2] = value
    sample, batch = codebook_entropy(*broken, 0.5, reduce=True)
    expected = codebook_entropy(*rest, 0.5, reduce=True)
    assert sample.isnan() and abs(batch - expected[1]) < 1e-12
    got = gradients((sample, batch), broken)
    assert (got[0][0] == 0).all()
    for one, other in zip((got[0][1:], *got[1:]), gradients(expected, rest), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


# ---- precision and resources


def test_autocast_and_reduced_precision_change_nothing():
    inputs = problem(tokens=200, codes=100, dtype=torch.float32)
    expected = codebook_entropy(*inputs, 0.01, reduce=True)
    wanted = gradients(expected, inputs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            pair = codebook_entropy(*inputs, 0.01, reduce=True)
            got = gradients(pair, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(one, other) for one, other in zip((*pair, *got), (*expected, *wanted), strict=True))


def test_it_compiles_without_a_graph_break():
    inputs, keep = problem(), torch.arange(23) % 3 > 0
    compiled = torch.compile(codebook_entropy, fullgraph=True, backend="aot_eager")
    got, expected = (function(*inputs, 0.5, keep, reduce=True) for function in (compiled, codebook_entropy))
    torch.testing.assert_close(got, expected)
    for one, other in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


# ---- several processes

RANKS = """
from vistok.quantizers.entropy import codebook_entropy
from vistok.quantizers.ibq import IndexBackpropQuantizer

def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def build():
    quantizer = IndexBackpropQuantizer(9, 3, entropy_temperature=0.5).double()
    quantizer.codebook.data = numbers(9, 3, seed=1)
    return quantizer

def entropies(latents, keep, reduce):
    codebook = numbers(9, 3, seed=1).requires_grad_()
    latents = latents.clone().requires_grad_()
    sample, batch = codebook_entropy(latents, codebook, None, 0.5, keep, reduce=reduce)
    (0.3 * sample - 1.7 * batch).backward()
    return {"sample": sample.detach(), "batch": batch.detach(), "latents": latents.grad, "codebook": codebook.grad}

def work(quantizer, rank, world):
    latents = numbers(20, 3, seed=0)
    rows = latents if world == 1 else (latents[:14], latents[14:])[rank]
    out = {"unequal": entropies(rows, None, True), "local": entropies(rows, None, False)}
    keep = torch.full((len(rows),), rank == 0)
    out["one_is_empty"] = entropies(rows, keep if world == 2 else torch.arange(20) < 14, True)
    with torch.no_grad():
        out["no_grad"] = codebook_entropy(rows, quantizer.codebook, None, 0.5, reduce=True)[1]
    halves = latents.view(2, 10, 3) if world == 1 else latents.view(2, 10, 3)[rank : rank + 1]
    result = quantizer.train()(halves)
    target = numbers(2, 10, 3, seed=2)[slice(None) if world == 1 else slice(rank, rank + 1)]
    total = sum(quantizer.default_loss_weights[name] * loss for name, loss in result.losses.items())
    (total + (result.quantized * target).mean()).backward()
    out["quantizer"] = {"entropy": result.losses["entropy"].detach(), "codebook": quantizer.codebook.grad}
    return out
"""


def test_ranks_with_unequal_numbers_of_tokens_equal_one_process_with_all_of_them(tmp_path):
    (one,), both = ranks.run_ranks(tmp_path, RANKS, 1), ranks.run_ranks(tmp_path, RANKS, 2)
    close = {"rtol": 1e-9, "atol": 1e-12}
    for case in ("unequal", "one_is_empty"):
        for name in ("sample", "batch"):
            for rank in both:
                torch.testing.assert_close(rank[case][name], one[case][name], **close)
        averaged = (both[0][case]["codebook"] + both[1][case]["codebook"]) / 2
        torch.testing.assert_close(averaged, one[case]["codebook"], **close)
        # Data-parallel training averages gradients, so a rank's own latents carry theirs twice.
        own = torch.cat([rank[case]["latents"] for rank in both]) / 2
        torch.testing.assert_close(own, one[case]["latents"], **close)
    assert abs(both[0]["local"]["batch"] - both[1]["local"]["batch"]) > 1e-3
    for rank in both:
        assert rank["no_grad"] == rank["local"]["batch"]
        torch.testing.assert_close(rank["quantizer"]["entropy"], one["quantizer"]["entropy"], **close)
    averaged = (both[0]["quantizer"]["codebook"] + both[1]["quantizer"]["codebook"]) / 2
    torch.testing.assert_close(averaged, one["quantizer"]["codebook"], **close)


# ---- fixtures: GigaTok and FQGAN add 1e-5 to the mean probabilities, UniTok nothing


@pytest.mark.parametrize("suffix", ["", "_uniform_onehot", "_collapsed"])
def test_gigatok(suffix):
    config, _, io = parity.fixture("losses-gigatok-entropy")
    affinity = io[f"affinity{suffix}"].requires_grad_()
    codebook = torch.eye(affinity.shape[1])
    sample, batch = codebook_entropy(affinity, codebook, None, config["temperature"], reduce=True, eps=1e-5)
    parity.assert_close(sample - batch, io[f"loss{suffix}"])
    if not suffix:
        (gradient,) = torch.autograd.grad(sample - batch, affinity)
        parity.assert_close(gradient, io["grad_affinity"])


def unit_distances(latents, codebook):
    """Arguments of ``codebook_entropy`` for minus the squared distances of normalised vectors."""
    z, e = F.normalize(latents, dim=1), F.normalize(codebook, dim=1)
    return 2 * z, e, -e.square().sum(1)


@pytest.mark.parametrize("branch", ["sem", "vis"])
def test_fqgan(branch):
    config, weights, io = parity.fixture("fqgan-quantizers")
    (codebook,) = (value for name, value in weights.items() if branch in name)
    latents = parity.channel_last(io[f"latents_{branch}"]).reshape(40, 8)
    inputs = [latents.requires_grad_(), codebook.requires_grad_()]
    sample, batch = codebook_entropy(*unit_distances(*inputs), 0.01, reduce=True, eps=1e-5)
    loss = config["entropy_loss_ratio"] * (sample - batch)
    parity.assert_close(loss, io[f"entropy_loss_{branch}"])
    to_latents, to_codebook = torch.autograd.grad(loss, inputs)
    parity.assert_close(to_latents, parity.channel_last(io[f"grad_latents_{branch}__entropy"]).reshape(40, 8))
    parity.assert_close(to_codebook, io[f"grad_codebook_{branch}__entropy"])


def test_unitok():
    config, weights, io = parity.fixture("unitok-quantizer")
    latents = io["latents"].requires_grad_()
    codebooks = [weights[f"codebooks.{i}.codebook.weight"].requires_grad_() for i in range(config["num_codebooks"])]
    terms = []
    for part, codebook in zip(latents.chunk(4, -1), codebooks, strict=True):
        arguments = unit_distances(part.reshape(-1, 8), codebook)
        sample, batch = codebook_entropy(*arguments, config["entropy_temp"], reduce=True)
        terms.append(sample - batch)
    loss = sum(terms) / len(terms)
    parity.assert_close(loss, io["entropy_loss"])
    to_latents, *to_codebooks = torch.autograd.grad(loss, [latents, *codebooks])
    parity.assert_close(to_latents, io["grad_latents__entropy"])
    for i, gradient in enumerate(to_codebooks):
        parity.assert_close(gradient, io[f"grad_param_entropy/codebooks.{i}.codebook.weight"])
