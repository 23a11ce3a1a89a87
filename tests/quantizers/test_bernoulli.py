"""Bernoulli bits: fixture, sampling statistics, gradients, annealing, masks."""

import copy
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.bernoulli import BernoulliQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

LN2 = math.log(2)


def logits(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- published numbers


def test_equals_instella(monkeypatch):
    config, weights, io = parity.fixture("instella-binary")
    quantizer = BernoulliQuantizer(config["codebook_size"], temperature=config["train_temp"])
    monkeypatch.setattr(quantizer, "draw", lambda y, generator: io["uniform"].view_as(y))
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    h = io["latents"].clone().requires_grad_()
    y = F.linear(h, weights["proj.0.weight"], weights["proj.0.bias"])
    result = quantizer(y)
    quantized = result.quantized @ weights["embed"]
    assert torch.equal(result.indices, io["train_indices"])
    parity.assert_close(y, io["logits"])
    parity.assert_close(quantized, io["train_quantized"])
    parity.assert_close(result.losses["variance"], io["code_loss"])
    for name, value in (("loss", result.losses["variance"]), ("ste", (quantized * io["upstream"]).sum())):
        wanted = [n for n in weights if f"grad_{name}/{n}" in io]
        found = torch.autograd.grad(value, [h, *(weights[n] for n in wanted)], retain_graph=True)
        parity.assert_close(found[0], io[f"grad_latents__{name}"])
        for n, gradient in zip(wanted, found[1:], strict=True):
            parity.assert_close(gradient, io[f"grad_{name}/{n}"])
    evaluated = quantizer.eval()(y)
    assert torch.equal(evaluated.indices, io["indices"])
    parity.assert_close(evaluated.quantized @ weights["embed"], io["quantized"])


# ---- sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_bits_are_drawn_with_their_probability(temperature):
    quantizer, y = BernoulliQuantizer(5, temperature), logits(1, 1, 5, dtype=torch.float32)
    tokens = 20_000
    result = quantizer(y.expand(1, tokens, 5), generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(y[0, 0] / temperature)
    z_score = (result.quantized.mean((0, 1)) - p) / (p * (1 - p) / tokens).sqrt()
    assert z_score.abs().max() < 4
    pair = (result.quantized[..., 0] * result.quantized[..., 1]).mean()  # bits are independent
    assert abs(pair - p[0] * p[1]) < 4 * math.sqrt(0.25 / tokens)


def test_evaluation_thresholds_and_never_draws():
    quantizer, y = BernoulliQuantizer(6).eval(), logits(2, 9, 6)
    state = torch.get_rng_state()
    result = quantizer(y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(result.quantized, (y > 0).double())
    assert torch.equal(result.indices, (y > 0).long()) and torch.equal(quantizer.encode(y), result.indices)
    assert torch.equal(quantizer.decode(result.indices).double(), result.quantized)
    assert torch.equal(quantizer.train().encode(y), result.indices)


def test_a_generator_makes_training_reproducible():
    quantizer, y = BernoulliQuantizer(6, 1.0), logits(2, 9, 6)
    first, second, other = (quantizer(y, generator=torch.Generator().manual_seed(s)).indices for s in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_low_temperature_samples_the_threshold():
    y = logits(2, 50, 6)
    assert torch.equal(BernoulliQuantizer(6, 1e-4)(y).indices, (y > 0).long())


# ---- gradients and losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tempered", [False, True])
def test_gradient_is_that_of_the_probability(tempered, symmetric, training):
    quantizer = BernoulliQuantizer(5, 0.4, tempered_gradient=tempered, symmetric=symmetric).train(training)
    y, g = logits(2, 7, 5).requires_grad_(), logits(2, 7, 5, seed=3)
    result = quantizer(y)
    assert set(result.quantized.unique().tolist()) == ({-1.0, 1.0} if symmetric else {0.0, 1.0})
    (result.quantized * g).sum().backward()
    temperature = 0.4 if tempered else 1.0
    p = torch.sigmoid(y.detach() / temperature)
    torch.testing.assert_close(y.grad, g * p * (1 - p) / temperature * (2 if symmetric else 1), rtol=1e-12, atol=0)
    expected = 2 * p - 1 if symmetric else p
    torch.testing.assert_close(result.latents.detach(), expected, rtol=1e-12, atol=1e-15)


def test_losses_equal_closed_forms_and_stay_in_bounds():
    quantizer, y = BernoulliQuantizer(5, 0.4), logits(2, 7, 5).requires_grad_()
    losses = quantizer(y).losses
    p = torch.sigmoid(y)
    torch.testing.assert_close(losses["variance"], (p * (1 - p)).mean(), rtol=1e-12, atol=0)
    kl = (p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log()).mean()
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: tuple(quantizer(x).losses.values()), (y,))
    even, certain = quantizer(0 * y).losses, quantizer(1e4 * y).losses
    assert even["variance"] == 0.25 and abs(even["kl"]) < 1e-15
    assert certain["variance"] < 1e-60 and abs(certain["kl"] - LN2) < 1e-12
    assert set(losses) == set(quantizer.default_loss_weights) == set(quantizer.eval()(y).losses)


def test_result_does_not_depend_on_autocast():
    quantizer, y = BernoulliQuantizer(6, 0.5), logits(2, 50, 6, dtype=torch.float32).requires_grad_()
    plain = quantizer(y, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.indices, mixed.indices)
    assert all(torch.equal(plain.losses[name], mixed.losses[name]) for name in plain.losses)


# ---- temperature


def test_temperature_goes_down_once_per_optimizer_step_and_survives_a_checkpoint():
    quantizer, y = BernoulliQuantizer(3, 1.0, final_temperature=0.2, anneal_steps=4), logits(1, 2, 3)
    seen = []
    for _ in range(6):
        seen.append(float(quantizer.temperature))
        quantizer(y), quantizer(y)
        assert float(quantizer.temperature) == seen[-1]
        quantizer.commit_update()
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.2]))
    other = BernoulliQuantizer(3, 1.0, final_temperature=0.2, anneal_steps=4)
    other.load_state_dict(quantizer.state_dict())
    for copied in (other, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert copied.steps == 6
    quantizer.eval().commit_update()
    assert quantizer.steps == 6
    assert not BernoulliQuantizer(3).state_dict()


def test_sampling_and_tempered_gradient_follow_the_temperature():
    quantizer = BernoulliQuantizer(4, 1.0, final_temperature=0.5, anneal_steps=1, tempered_gradient=True)
    y = logits(1, 3, 4).requires_grad_()
    quantizer.commit_update()
    quantizer(y).quantized.sum().backward()
    p = torch.sigmoid(2 * y.detach())
    torch.testing.assert_close(y.grad, 2 * p * (1 - p), rtol=1e-12, atol=0)
    quantizer.draw = lambda values, generator: torch.sigmoid(1.9 * values)
    assert torch.equal(quantizer(y).indices, (y > 0).long())  # sigmoid(1.9 y) < sigmoid(2 y) for positive y only


# ---- masks and bad latents


def test_dropped_tokens_count_for_nothing_whatever_they_hold():
    quantizer, y = BernoulliQuantizer(5, 0.4, tempered_gradient=True).eval(), logits(2, 6, 5)
    y[:, 4], y[:, 5] = math.nan, 1e4
    mask = torch.arange(6).expand(2, 6) < 4
    padded, short = y.clone().requires_grad_(), y[:, :4].clone().requires_grad_()
    masked, truncated = quantizer(padded, mask), quantizer(short)
    assert torch.equal(masked.indices[:, :4], truncated.indices) and (masked.indices[:, 4:] == -1).all()
    assert (masked.quantized[:, 4:] == 0).all() and (masked.latents[:, 4:] == 0).all()
    assert torch.equal(quantizer.decode(masked.indices).double(), masked.quantized)
    assert torch.equal(masked.statistics["counts"], truncated.statistics["counts"])
    for result in (masked, truncated):
        (sum(result.losses.values()) + result.quantized.sum()).backward()
    torch.testing.assert_close(padded.grad[:, :4], short.grad, rtol=1e-12, atol=1e-15)
    assert (padded.grad[:, 4:] == 0).all()
    padded.grad = None
    nothing = quantizer.train()(padded, torch.zeros_like(mask))
    (sum(nothing.losses.values()) + nothing.quantized.sum()).backward()
    assert all(loss == 0 for loss in nothing.losses.values()) and (padded.grad == 0).all()


def test_a_logit_that_is_not_finite_shows_in_the_losses_and_not_in_the_counts():
    quantizer, y = BernoulliQuantizer(3), logits(1, 4, 3)
    for bad in (math.nan, math.inf):
        y[0, 1, 2] = bad
        result = quantizer(y)
        assert all(not loss.isfinite() for loss in result.losses.values())
        assert result.statistics["counts"].sum() == 9 and result.indices.unique().tolist() == [0, 1]


# ---- codes


def test_any_number_of_bits_in_sub_codes_of_any_size():
    y = logits(1, 3, 128)
    single, words = BernoulliQuantizer(128).eval(), BernoulliQuantizer(128, subcode_bits=32).eval()
    assert single.codebook_sizes == (2,) * 128 and words.codebook_sizes == (2**32,) * 4
    assert single.bits == words.bits == 128
    expected = [sum(int(bit) << i for i, bit in enumerate(row[:32])) for row in (y[0] > 0).tolist()]
    assert words(y).indices[0, :, 0].tolist() == expected
    assert torch.equal(words(y).quantized, single(y).quantized)
    assert torch.equal(words.decode(words.encode(y)).double(), words(y).quantized)


@pytest.mark.parametrize("symmetric,per_bit", [(False, 1.0), (True, 4.0)])
def test_neighbours_flip_one_bit_first(symmetric, per_bit):
    quantizer = BernoulliQuantizer(64, symmetric=symmetric)
    indices = quantizer.encode(logits(1, 2, 64))
    found, squared = quantizer.neighbour_distances(indices, 66)
    assert torch.equal(found[:, :, 0], indices)
    flipped = (found != indices.unsqueeze(2)).sum(-1)
    assert (flipped[..., 1:65] == 1).all() and (flipped[..., 65] == 2).all()
    assert torch.equal(squared, per_bit * flipped)


def test_impossible_settings_are_refused():
    for arguments, message in (
        ({"num_bits": 0}, "positive"),
        ({"num_bits": 10, "subcode_bits": 4}, "subcode_bits divide it; got 10 and 4"),
        ({"num_bits": 126, "subcode_bits": 63}, "at most 62 bits; got 63"),
        ({"num_bits": 4, "temperature": 0.0}, "temperatures must be positive; got 0.0"),
        ({"num_bits": 4, "final_temperature": 0.1}, "go together; got 0.1 and None"),
        ({"num_bits": 4, "final_temperature": 0.1, "anneal_steps": 0}, "anneal_steps must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            BernoulliQuantizer(**arguments)


def test_training_forward_compiles_without_a_graph_break():
    quantizer = BernoulliQuantizer(6, 1.0, final_temperature=0.5, anneal_steps=3, tempered_gradient=True)

    def step(y):
        result = quantizer(y, torch.ones(y.shape[:2], dtype=torch.bool))
        return sum(result.losses.values()) + result.latents.sum(), result.quantized

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        y = logits(batch, 10, 6, dtype=torch.float32).requires_grad_()
        value, quantized = compiled(y)
        torch.testing.assert_close(value, step(y)[0])
        assert set(quantized.unique().tolist()) == {0.0, 1.0}
        quantized.sum().backward()
        assert y.grad.isfinite().all()
