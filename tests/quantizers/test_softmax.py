"""Codes with the gradient of a soft assignment, against the written-out N x K expression."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.softmax import finite_rows, likeliest_codes, softmax_codes


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(tokens=23, codes=11, dim=4, dtype=torch.float64):
    """Latents, codebook and bias with gradients, the chosen codes, and a gradient to feed in."""
    inputs = [numbers(tokens, dim), numbers(codes, dim, seed=1), numbers(codes, seed=2)]
    chosen = torch.randint(codes, (tokens,), generator=torch.Generator().manual_seed(3))
    return [x.to(dtype).requires_grad_() for x in inputs], chosen, numbers(tokens, dim, seed=4, dtype=dtype)


def dense(latents, codebook, bias, indices, temperature):
    p = ((latents @ codebook.T + bias) / temperature).softmax(1)
    return (F.one_hot(indices, len(codebook)) - p.detach() + p) @ codebook


def gradients(function, inputs, indices, temperature, upstream):
    return torch.autograd.grad((function(*inputs, indices, temperature) * upstream).sum(), inputs)


def shrink_blocks(monkeypatch, block, rows=1, limit=1):
    for name, value in (("CPU_BLOCK", block), ("CPU_ROWS", rows), ("CPU_LIMIT", limit)):
        monkeypatch.setattr(f"vistok.quantizers.softmax.{name}", value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_value_is_the_code_itself(dtype):
    (latents, codebook, bias), chosen, _ = problem(dtype=dtype)
    assert torch.equal(softmax_codes(latents, codebook, bias, chosen, 0.3), codebook[chosen])


@pytest.mark.parametrize("block", [1, 30, 10**6])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_gradient_equals_dense_autograd_for_any_block(block, temperature, monkeypatch):
    shrink_blocks(monkeypatch, block)
    inputs, chosen, upstream = problem()
    expected = gradients(dense, inputs, chosen, temperature, upstream)
    for got, wanted in zip(gradients(softmax_codes, inputs, chosen, temperature, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_without_a_bias_the_logits_are_inner_products():
    (latents, codebook, _), chosen, upstream = problem()
    zero = torch.zeros(11, dtype=torch.float64)
    expected = gradients(lambda x, e, i, t: dense(x, e, zero, i, t), [latents, codebook], chosen, 1.0, upstream)
    got = gradients(lambda x, e, i, t: softmax_codes(x, e, None, i, t), [latents, codebook], chosen, 1.0, upstream)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradients_of_the_logits_sum_to_zero_and_every_code_gets_one():
    inputs, chosen, upstream = problem()
    _, to_codebook, to_bias = gradients(softmax_codes, inputs, chosen.clamp(max=2), 1.0, upstream)
    assert to_bias.sum().abs() < 1e-13 and (to_bias != 0).all()
    assert (to_codebook.abs().sum(1) > 0).all()


def test_large_logits_do_not_overflow():
    (latents, codebook, bias), chosen, upstream = problem()
    inputs = [(3 * latents.detach()).requires_grad_(), codebook, bias]
    expected = gradients(dense, inputs, chosen, 0.01, upstream)
    single = [x.detach().float().requires_grad_() for x in inputs]
    for got, wanted in zip(gradients(softmax_codes, single, chosen, 0.01, upstream.float()), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_latent_that_is_not_finite_neither_gives_nor_gets_a_gradient(value):
    inputs, chosen, upstream = problem(dtype=torch.float32)
    broken = [x.detach().clone().requires_grad_() for x in inputs]
    broken[0].data[5, 1] = value
    without = torch.arange(23) != 5
    assert torch.equal(finite_rows(broken[0]), without)
    spoiled = upstream.clone()
    spoiled[5] = float("nan")
    codes = softmax_codes(*broken, chosen, 1.0)
    assert torch.equal(codes, inputs[1][chosen])
    got = torch.autograd.grad(codes, broken, spoiled)
    rest = [inputs[0].detach()[without].requires_grad_(), *inputs[1:]]
    expected = gradients(softmax_codes, rest, chosen[without], 1.0, upstream[without])
    assert (got[0][5] == 0).all()
    for one, other in zip((got[0][without], *got[1:]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_gradient_ignores_autocast_and_reduced_precision():
    inputs, chosen, upstream = problem(tokens=300, codes=200, dim=8, dtype=torch.float32)
    expected = gradients(softmax_codes, inputs, chosen, 1.0, upstream)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(softmax_codes, inputs, chosen, 1.0, upstream)
            found = likeliest_codes(*inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert torch.equal(found, likeliest_codes(*inputs))


def test_search_finds_the_largest_logit_and_the_lowest_index_of_equal_ones():
    (latents, codebook, bias), _, _ = problem(tokens=200, codes=70)
    assert torch.equal(likeliest_codes(latents, codebook, bias), (latents @ codebook.T + bias).argmax(1))
    assert torch.equal(likeliest_codes(latents, codebook), (latents @ codebook.T).argmax(1))
    same = torch.tensor([[0.5], [2.0], [2.0], [1.0], [2.0]])
    assert likeliest_codes(torch.ones(3, 1), same).tolist() == [1, 1, 1]
    broken = likeliest_codes(torch.tensor([[float("nan")], [float("inf")]]), same)
    assert ((broken >= 0) & (broken < 5)).all()


def test_it_compiles_without_a_graph_break():
    inputs, chosen, upstream = problem()
    compiled = torch.compile(softmax_codes, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, inputs, chosen, 0.7, upstream)
    for one, other in zip(got, gradients(softmax_codes, inputs, chosen, 0.7, upstream), strict=True):
        torch.testing.assert_close(one, other)


def test_no_tensor_of_tokens_times_codes():
    """128 tokens x 262 144 codes: one such tensor takes 134 MB; codes, entropies and draws stay under 110 MB."""
    code = """
import resource, torch
from vistok.quantizers.entropy import codebook_entropy
from vistok.quantizers.gumbel import GumbelQuantizer
from vistok.quantizers.softmax import softmax_codes

def run(tokens, codes):
    z, codebook = torch.randn(tokens, 4, requires_grad=True), torch.randn(codes, 4, requires_grad=True)
    softmax_codes(z, codebook, None, torch.zeros(tokens, dtype=torch.int64), 1.0).sum().backward()
    sample, batch = codebook_entropy(z, codebook, None, 0.1, reduce=True)
    (sample - batch).backward()

def draw(tokens, codes):
    result = GumbelQuantizer(codes, 4)(torch.randn(1, tokens, 4, requires_grad=True))
    (result.losses["kl"] + result.quantized.sum()).backward()

torch.set_num_threads(1)
run(64, 1024)
draw(64, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(128, 262144)
draw(512, 65536)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 110_000  # kB
