"""Gumbel-softmax: draws against their probabilities, gradients against dense autograd with the same noise."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.draws import draw_integers
from vistok.quantizers.gumbel import CODE_STEP, MIX, ROW_STEP, WORD, GumbelQuantizer, gumbel_noise

CPU = torch.device("cpu")
HARD = pytest.mark.parametrize("straight_through", [True, False])


def make(codes=13, dim=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return GumbelQuantizer(codes, dim, **options).to(dtype)


def numbers(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def dense(quantizer, z, temperature, noise=0.0):
    """Codes and divergence by N x K tensors, as in the published formula."""
    logits = quantizer.logits(z.reshape(-1, z.shape[-1]))
    soft = ((logits + noise) / temperature).softmax(1)
    onehot = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
    weights = onehot - soft.detach() + soft if quantizer.straight_through or not quantizer.training else soft
    p = logits.softmax(1)
    return (weights @ quantizer.codebook).view(z.shape), (p * (p * p.shape[1]).log()).sum(1).mean()


def noise_of(tokens, codes, seed=5):
    return gumbel_noise(draw_integers(WORD, (2,), CPU, seeded(seed)), slice(0, tokens), codes, torch.float64)


# ---- noise


def test_the_noise_is_the_hash_in_whole_numbers():
    def mix(bits):
        for shift, factor in MIX:
            bits = ((bits ^ (bits >> shift)) * factor) & WORD
        return bits ^ (bits >> 15)

    first, second, row, code = 2_000_000_000, 77, 12_345, 54_321
    one = mix(mix((row * ROW_STEP + first) & WORD))
    two = mix(mix((one + second) & WORD))
    bits = mix(mix(mix((code * CODE_STEP + one) & WORD) ^ two))
    expected = -math.log(-math.log1p(-(bits + 0.5) / 2**31))
    noise = gumbel_noise(torch.tensor([first, second]), slice(row, row + 1), code + 1, torch.float64)
    assert abs(float(noise[0, code]) - expected) < 1e-12


def test_the_noise_has_the_gumbel_distribution_and_no_pattern():
    noise = gumbel_noise(torch.tensor([1, 2]), slice(0, 1000), 600, torch.float32).double()
    uniform = (-(-noise).exp()).exp()
    counts = torch.histc(uniform, 200, 0, 1)
    expected = noise.numel() / 200
    assert ((counts - expected) ** 2 / expected).sum() < 199 + 5 * math.sqrt(2 * 199)
    standard = (uniform - 0.5) * math.sqrt(12)
    next_seed = gumbel_noise(torch.tensor([2, 2]), slice(0, 1000), 600, torch.float32).double()
    other = ((-(-next_seed).exp()).exp() - 0.5) * math.sqrt(12)
    for product in (standard[1:] * standard[:-1], standard[:, 1:] * standard[:, :-1], standard * other):
        assert product.mean().abs() * math.sqrt(product.numel()) < 5
    assert noise.isfinite().all() and noise.max() > 11


def test_the_noise_of_a_row_does_not_depend_on_the_block():
    seed = torch.tensor([3, 4])
    whole = gumbel_noise(seed, slice(0, 50), 20, torch.float64)
    parts = [gumbel_noise(seed, slice(i, min(i + 7, 50)), 20, torch.float64) for i in range(0, 50, 7)]
    assert torch.equal(torch.cat(parts), whole)


# ---- draws


def test_frequencies_are_the_probabilities():
    quantizer, tokens = make(codes=12), 20_000
    with torch.no_grad():
        quantizer.logits.weight.mul_(3)
    z = numbers(1, 1, 4).expand(1, tokens, 4)
    p = quantizer.logits(z[0, 0]).softmax(0).detach()
    counts = quantizer(z, generator=seeded()).statistics["counts"]
    assert (p > 0.002).all() and p.max() > 0.2
    # Pearson's statistic with 11 degrees of freedom exceeds 37.4 once in 10 000 times.
    assert ((counts - tokens * p) ** 2 / (tokens * p)).sum() < 37.4


def test_the_same_generator_draws_the_same_codes():
    quantizer, z = make(), numbers(2, 50, 4)
    one, same, other = (quantizer(z, generator=seeded(s)).indices for s in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.manual_seed(3)
    first, second = quantizer(z).indices, quantizer(z).indices
    torch.manual_seed(3)
    assert torch.equal(quantizer(z).indices, first) and not torch.equal(first, second)


@HARD
def test_evaluation_takes_the_largest_logit_every_time(straight_through):
    quantizer, z = make(straight_through=straight_through).eval(), numbers(2, 50, 4)
    results = [quantizer(z, generator=seeded(seed)) for seed in (1, 2)]
    expected = quantizer.logits(z).argmax(-1, keepdim=True)
    for result in results:
        assert torch.equal(result.indices, expected)
        assert torch.equal(result.quantized, quantizer.decode(expected))
    assert torch.equal(quantizer.encode(z), expected) and torch.equal(quantizer.train().encode(z), expected)


def test_a_training_forward_returns_the_drawn_code_itself():
    quantizer = make(dtype=torch.float32)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        result = quantizer(numbers(2, 3, 5, 4, dtype=dtype))
        assert torch.equal(result.quantized, F.embedding(result.indices[..., 0], quantizer.codebook))


def test_a_mixture_tends_to_the_drawn_code_as_the_temperature_falls():
    z, errors = numbers(2, 50, 4), []
    for temperature in (1.0, 0.1, 0.001):
        quantizer = make(temperature=temperature, anneal_steps=0, straight_through=False)
        result = quantizer(z, generator=seeded())
        errors.append(float((result.quantized - quantizer.decode(result.indices)).detach().abs().mean()))
    assert errors[0] > 0.1 and errors[0] > errors[1] > errors[2] and errors[2] < 1e-2


# ---- gradients and divergence


@HARD
@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_gradients_equal_dense_autograd_with_the_same_noise(straight_through, block, monkeypatch):
    for name, value in (("CPU_BLOCK", block), ("CPU_ROWS", 1), ("CPU_LIMIT", 1)):
        monkeypatch.setattr(f"vistok.quantizers.softmax.{name}", value)
    quantizer = make(temperature=0.5, anneal_steps=0, straight_through=straight_through)
    z, upstream = numbers(2, 7, 4).requires_grad_(), numbers(2, 7, 4, seed=2)
    inputs = [z, *quantizer.parameters()]
    result = quantizer(z, generator=seeded())
    codes, divergence = dense(quantizer, z, 0.5, noise_of(14, 13))
    for got, wanted in (
        ((result.quantized * upstream).sum(), (codes * upstream).sum()),
        (result.losses["kl"], divergence),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(got, inputs, materialize_grads=True, allow_unused=True, retain_graph=True),
            torch.autograd.grad(wanted, inputs, materialize_grads=True, allow_unused=True, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_gradient_in_evaluation_has_no_noise():
    quantizer = make(temperature=0.5, anneal_steps=0).eval()
    z, upstream = numbers(2, 7, 4).requires_grad_(), numbers(2, 7, 4, seed=2)
    (got,) = torch.autograd.grad((quantizer(z).quantized * upstream).sum(), z)
    (wanted,) = torch.autograd.grad((dense(quantizer, z, 0.5)[0] * upstream).sum(), z)
    torch.testing.assert_close(got, wanted)


def test_the_divergence_lies_between_uniform_and_certain():
    quantizer, z = make(), numbers(2, 7, 4)
    assert 0 < quantizer(z).losses["kl"] < math.log(13)
    with torch.no_grad():
        quantizer.logits.weight.mul_(1e6)
        assert abs(quantizer(z).losses["kl"] - math.log(13)) < 1e-6
        quantizer.logits.weight.zero_()
        quantizer.logits.bias.zero_()
    assert abs(quantizer(z).losses["kl"]) < 1e-12
    assert set(quantizer.eval()(z).losses) == {"kl"} == set(quantizer.default_loss_weights)


# ---- temperature


def test_the_temperature_falls_with_the_optimizer_steps():
    quantizer, z = make(temperature=0.9, final_temperature=0.1, anneal_steps=4), numbers(1, 3, 4)
    seen = []
    for _ in range(6):
        quantizer(z)
        seen.append(float(quantizer(z).statistics["temperature"]))  # a second forward pass of the same step
        quantizer.commit_update()
    expected = [0.1 + 0.8 * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(6)]
    assert seen == pytest.approx(expected, abs=1e-6)
    z = z.requires_grad_()
    one, other = (GumbelQuantizer(13, 4, temperature=t, anneal_steps=0).double() for t in (0.9, 0.1))
    for fixed in (one, other):
        fixed.load_state_dict(quantizer.state_dict())
    gradients = [torch.autograd.grad(q(z, generator=seeded()).quantized.sum(), z)[0] for q in (quantizer, one, other)]
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-5, atol=1e-8)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


def test_only_training_steps_are_counted():
    quantizer, z = make(), numbers(1, 3, 4)
    quantizer.commit_update()
    with torch.no_grad():
        quantizer(z)
    quantizer.commit_update()
    quantizer.eval()(z)
    quantizer.encode(z)
    quantizer.commit_update()
    assert int(quantizer.step) == 0
    quantizer.train()(z)
    quantizer.commit_update()
    assert int(quantizer.half().step) == 1 and quantizer.step.dtype == torch.int64


# ---- masks, latents that are not finite


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_mask_hides_whatever_the_padding_holds(value):
    quantizer, upstream = make(), numbers(1, 6, 4, seed=2)
    z = numbers(1, 6, 4)
    z[:, 4:] = value
    mask = torch.arange(6).expand(1, 6) < 4
    padded, short = z.clone().requires_grad_(), z[:, :4].clone().requires_grad_()
    gradients = []
    for latents, kept in ((padded, mask), (short, None)):
        quantizer.zero_grad()
        result = quantizer(latents, kept, generator=seeded())
        (result.losses["kl"] + (result.quantized * upstream[:, : latents.shape[1]]).sum()).backward()
        gradients.append([p.grad.clone() for p in quantizer.parameters()])
        if kept is not None:
            masked = result
    assert torch.equal(masked.indices[:, :4], result.indices) and (masked.indices[:, 4:] == -1).all()
    assert torch.equal(masked.quantized[:, :4], result.quantized) and (masked.quantized[:, 4:] == 0).all()
    torch.testing.assert_close(masked.losses["kl"], result.losses["kl"])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(padded.grad[:, :4], short.grad, rtol=1e-11, atol=1e-14)
    assert (padded.grad[:, 4:] == 0).all()


def test_an_empty_mask_gives_a_zero_loss():
    quantizer, z = make(), numbers(2, 3, 4).requires_grad_()
    result = quantizer(z, torch.zeros(2, 3, dtype=torch.bool))
    (result.losses["kl"] + result.quantized.sum()).backward()
    assert result.losses["kl"] == 0 and (z.grad == 0).all()
    assert all((p.grad == 0).all() for p in quantizer.parameters())


@HARD
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_spoils_the_loss_and_not_the_parameters(straight_through, value):
    quantizer, z = make(straight_through=straight_through), numbers(2, 6, 4)
    z[0, 2, 1] = value
    result = quantizer(z.requires_grad_())
    assert result.quantized.isfinite().all() and result.losses["kl"].isnan()
    assert result.statistics["counts"].sum() == 11
    (result.losses["kl"] + result.quantized.sum()).backward()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters())


# ---- precision, state, resources


def test_autocast_changes_nothing():
    quantizer, z = make(dtype=torch.float32), numbers(2, 50, 4, dtype=torch.float32)
    plain = quantizer(z, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z, generator=seeded())
    assert torch.equal(plain.indices, mixed.indices) and torch.equal(plain.quantized, mixed.quantized)
    assert torch.equal(plain.losses["kl"], mixed.losses["kl"])


def test_training_compiles_without_a_graph_break():
    quantizer, z = make(anneal_steps=3), numbers(2, 7, 4)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second step has another temperature
        gradients = []
        for function in (quantizer, compiled):
            quantizer.zero_grad()
            torch.manual_seed(4)
            result = function(z)
            (result.losses["kl"] + result.quantized.square().sum()).backward()
            gradients.append([p.grad.clone() for p in quantizer.parameters()])
        torch.testing.assert_close(*gradients)
        quantizer.commit_update()
    assert int(quantizer.step) == 2


def test_it_copies_pickles_and_loads():
    quantizer, z = make(anneal_steps=10), numbers(1, 9, 4)
    quantizer(z)
    quantizer.commit_update()
    expected = quantizer(z, generator=seeded())
    fresh = GumbelQuantizer(13, 4, anneal_steps=10).double()
    fresh.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh):
        result = other(z, generator=seeded())
        assert torch.equal(result.quantized, expected.quantized)
        assert torch.equal(result.statistics["temperature"], expected.statistics["temperature"])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="positive; got 4 and 0"):
        GumbelQuantizer(4, 0)
    with pytest.raises(ValueError, match=r"must be positive \(at 0 there is no gradient\); got 1.0 and 0"):
        GumbelQuantizer(4, 4, final_temperature=0)
    with pytest.raises(ValueError, match="anneal_steps must be at least 0; got -1"):
        GumbelQuantizer(4, 4, anneal_steps=-1)
