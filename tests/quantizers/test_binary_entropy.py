"""Factorised entropies against a softmax over all listed codes."""

import math
import resource

import pytest
import torch

from vistok.quantizers import binary_entropy
from vistok.quantizers.binary_entropy import binary_entropies

LN2 = math.log(2)


def log_odds(*shape, scale=2.0, dtype=torch.float64, seed=0):
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * draw).to(dtype).requires_grad_()


def dense(logits, group=None, eps=0.0):
    """Softmax over all codes of each group of bits, every one listed."""
    group = group or logits.shape[1]
    codes = 2.0 * (torch.arange(2**group)[:, None] >> torch.arange(group) & 1).to(logits.dtype) - 1  # (2^g, g)
    log_p = (logits.unflatten(1, (-1, group)) @ codes.T / 2).log_softmax(-1)  # (n, G, 2^g)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum((1, 2)).mean(), -(mean * (mean + eps).log()).sum()


@pytest.mark.parametrize("bits,group", [(1, None), (2, None), (7, None), (10, None), (12, 3), (12, 1), (6, 2)])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_values_and_gradients_equal_the_dense_softmax(bits, group, eps):
    logits = log_odds(40, bits)
    for actual, expected in zip(binary_entropies(logits, group=group, eps=eps), dense(logits, group, eps), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("group", [None, 2])
def test_gradients_equal_finite_differences(group):
    logits = log_odds(5, 4)
    keep = torch.tensor([True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda x: binary_entropies(x, keep, group=group), (logits,))


def test_blocks_of_tokens_change_nothing(monkeypatch):
    logits = log_odds(700, 6)
    expected = binary_entropies(logits)
    monkeypatch.setattr(binary_entropy, "CPU_BUFFER", 1)  # 256 tokens a block: two and a remainder
    actual = binary_entropies(logits)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(sum(values), logits)[0] for values in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


def test_patterns_are_numbered_with_the_first_channel_lowest():
    logits = torch.full((3, 5), -1e3)
    logits[:, [0, 3]] = 1e3
    share = torch.full((3,), 1 / 3)
    assert binary_entropy._mean_patterns(logits, share, 5).argmax() == 0b01001
    assert binary_entropy._mean_patterns(logits[:, :4], share, 2).argmax(1).tolist() == [0b01, 0b10]


def test_dropped_tokens_count_for_nothing_whatever_they_hold():
    logits = log_odds(9, 4).detach()
    short = logits[:6].clone().requires_grad_()
    logits[6], logits[7], logits[8] = math.nan, 1e30, math.inf
    logits.requires_grad_()
    keep = torch.arange(9) < 6
    actual, expected = binary_entropies(logits, keep), binary_entropies(short)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    gradient, wanted = torch.autograd.grad(sum(actual), logits)[0], torch.autograd.grad(sum(expected), short)[0]
    torch.testing.assert_close(gradient[:6], wanted, rtol=1e-12, atol=1e-16)
    assert (gradient[6:] == 0).all()
    nothing = binary_entropies(logits, torch.zeros(9, dtype=torch.bool))
    assert nothing[0] == 0 and nothing[1] == 0
    assert (torch.autograd.grad(sum(nothing), logits)[0] == 0).all()


def test_bounds_and_extremes():
    for scale in (0.0, 0.1, 1.0, 10.0):
        sample, batch = binary_entropies(log_odds(300, 8, scale=scale))
        assert 0 <= sample <= batch * (1 + 1e-12) and batch <= 8 * LN2 * (1 + 1e-12)
    sample, batch = binary_entropies(torch.zeros(4, 8, dtype=torch.float64))
    assert abs(sample - 8 * LN2) < 1e-12 and abs(batch - 8 * LN2) < 1e-12
    every_code = 1e4 * (2.0 * (torch.arange(16)[:, None] >> torch.arange(4) & 1) - 1)
    sample, batch = binary_entropies(every_code)
    assert sample == 0 and abs(batch - 4 * LN2) < 1e-6


def test_flipping_all_signs_changes_nothing_and_groups_bound_the_joint_entropy():
    logits = log_odds(50, 6)
    torch.testing.assert_close(binary_entropies(logits), binary_entropies(-logits), rtol=1e-12, atol=0)
    joint, pairs, single = (binary_entropies(logits, group=group)[1] for group in (None, 2, 1))
    assert joint < pairs < single


@pytest.mark.parametrize("scale", [0.02, 5.0, 400.0])
def test_float32_is_as_good_as_its_inputs_also_where_bits_are_certain(scale):
    """Relative to each entry: a difference of large probabilities would bury the gradient of an almost certain bit."""
    exact = log_odds(200, 8, scale=scale)
    single = exact.detach().float().requires_grad_()
    exact = single.detach().double().requires_grad_()
    for actual, expected in zip(binary_entropies(single), binary_entropies(exact), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
        gradient = torch.autograd.grad(actual, single, retain_graph=True)[0].double()
        wanted = torch.autograd.grad(expected, exact, retain_graph=True)[0]
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=3e-10)
    saturated = single.detach().abs() > 20
    assert (gradient[saturated].abs() < 1e-8).all()  # batch entropy of the last round


def test_impossible_groups_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="entropy_group must divide the number of bits, 6; got 4"):
        binary_entropies(torch.zeros(2, 6), group=4)
    with pytest.raises(ValueError, match=r"joint batch entropy of 36 bits .* set entropy_group to a divisor of 36"):
        binary_entropies(torch.zeros(2, 36))


def test_compiles_without_a_graph_break():
    def entropies(logits, keep):
        sample, batch = binary_entropies(logits, keep, group=3)
        return sample - batch

    logits, keep = log_odds(20, 6, dtype=torch.float32), torch.arange(20) < 15
    compiled = torch.compile(entropies, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(run(logits, keep), logits)[0] for run in (entropies, compiled)]
    torch.testing.assert_close(*gradients)


def test_memory_does_not_grow_with_tokens_times_codes():
    """16 384 tokens x 2^16 codes: their probabilities alone would take 4.3 GB, far beyond any peak so far."""
    logits = log_odds(16384, 16, dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sum(binary_entropies(logits)).backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000  # kB
