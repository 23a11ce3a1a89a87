"""Latent perturbation: which tokens change, to what, and how the gradient and the schedule behave."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from vistok.layers.configurable import build
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.perturbation import LatentPerturbation, anneal_ratio
from vistok.quantizers.scalar import ScalarQuantizer
from vistok.quantizers.vq import VectorQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

AROUND = pytest.mark.parametrize("around", ["code", "latent"])
SAMPLES = pytest.mark.parametrize("samples", ["random", "first"])


def make(codes=20, dim=3, **arguments):
    torch.manual_seed(0)
    inner = VectorQuantizer(codes, dim)
    with torch.no_grad():
        inner.codebook.normal_()
    return LatentPerturbation(inner, **{"num_neighbours": 5, "sample_fraction": 1.0, **arguments})


def latents(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def code_of(quantizer, quantized):
    """The index of every vector among all codes, by comparison."""
    codes = quantizer.quantizer.codebook.detach()
    return (quantized.detach().unsqueeze(-2) == codes).all(-1).float().argmax(-1)


# ---- which tokens change, and to what


@AROUND
@SAMPLES
def test_replaced_tokens_take_every_near_code_equally_often(around, samples):
    quantizer, z = make(around=around, samples=samples), latents(1, 4, 3).expand(3000, 4, 3)
    result = quantizer(z, generator=torch.Generator().manual_seed(0))
    taken = code_of(quantizer, result.quantized)  # (3000, 4)
    codes = quantizer.quantizer.codebook.detach()
    for token in range(4):
        centre = z[0, token] if around == "latent" else codes[result.indices[0, token, 0]]
        nearest = (codes - centre).square().sum(1).argsort()[:5]
        counts = torch.bincount(taken[:, token], minlength=20).double()
        assert counts[nearest].sum() == 3000 and result.indices[0, token, 0] in nearest
        assert ((counts[nearest] - 600).square() / 600).sum() < 20  # chi squared, four degrees of freedom


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_share_of_changed_tokens(probability):
    quantizer, z = make(token_probability=probability), latents(50, 200, 3)
    result = quantizer(z, generator=torch.Generator().manual_seed(0))
    changed = (code_of(quantizer, result.quantized) != result.indices[..., 0]).double().mean()
    assert abs(changed - probability * 4 / 5) < 0.02


def test_losses_indices_and_statistics_are_those_of_the_clean_codes():
    quantizer, z = make(), latents(4, 9, 3)
    result, clean = quantizer(z), quantizer.quantizer(z)
    assert not torch.equal(result.quantized, clean.quantized)
    assert torch.equal(result.indices, clean.indices)
    assert torch.equal(result.statistics["counts"], clean.statistics["counts"])
    assert all(torch.equal(result.losses[name], clean.losses[name]) for name in clean.losses)
    assert quantizer.default_loss_weights == quantizer.quantizer.default_loss_weights


@pytest.mark.parametrize("batch,fraction", [(10, 0.1), (5, 0.3), (3, 0.1)])
def test_random_samples_make_up_the_exact_share(batch, fraction):
    quantizer, z = make(sample_fraction=fraction), latents(batch, 8, 3)
    generator, numbers, seen = torch.Generator().manual_seed(0), [], torch.zeros(batch)
    for _ in range(150):
        result = quantizer(z, generator=generator)
        touched = (code_of(quantizer, result.quantized) != result.indices[..., 0]).any(1)
        numbers.append(int(touched.sum()))
        seen += touched
    low = int(batch * fraction + 1e-9)
    assert set(numbers) <= ({low} if abs(batch * fraction - low) < 1e-6 else {low, low + 1})
    assert abs(sum(numbers) / 150 - batch * fraction) < 0.15
    assert (seen / 150 - fraction).abs().max() < 0.17  # every sample has its turn


@pytest.mark.parametrize("batch,fraction,expected", [(4, 0.34, 1), (9, 0.1, 0), (10, 0.1, 1), (30, 0.1, 3)])
def test_first_samples_are_counted_as_published(batch, fraction, expected):
    quantizer, z = make(sample_fraction=fraction, samples="first"), latents(batch, 40, 3)
    result = quantizer(z)
    touched = (code_of(quantizer, result.quantized) != result.indices[..., 0]).any(1)
    assert touched.tolist() == [True] * expected + [False] * (batch - expected)


def test_draws_come_from_the_generator():
    quantizer, z = make(sample_fraction=0.5, token_probability=0.5), latents(6, 9, 3)
    first, second, third = (quantizer(z, generator=torch.Generator().manual_seed(seed)).quantized for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, third)


# ---- evaluation, gradient, masks


@AROUND
def test_evaluation_is_the_quantizer_inside(around):
    quantizer, z = make(around=around, anneal_start=0, anneal_end=5).eval(), latents(2, 9, 3)
    result, clean = quantizer(z), quantizer.quantizer(z)
    assert torch.equal(result.quantized, clean.quantized) and torch.equal(result.indices, clean.indices)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.encode(z), result.indices)
    assert quantizer.index_blocks((9,)) == quantizer.quantizer.index_blocks((9,))
    for module in (quantizer, quantizer.quantizer):
        assert torch.equal(module.neighbours(result.indices, 1), result.indices.unsqueeze(-2))


@AROUND
def test_gradient_passes_straight_through_to_the_latent_and_not_to_the_codebook(around):
    quantizer, z, g = make(around=around), latents(2, 7, 3).requires_grad_(), latents(2, 7, 3, seed=3)
    (quantizer(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g) and quantizer.quantizer.codebook.grad is None


@pytest.mark.parametrize("name", ["tanh", "rotation"])
def test_gradient_keeps_the_way_of_the_quantizer_inside(name):
    inner = FiniteScalarQuantizer([5, 5, 5]) if name == "tanh" else VectorQuantizer(30, 3, estimator="rotation")
    inner = inner.double()
    z, g = latents(3, 8, 3, dtype=torch.float64).requires_grad_(), latents(3, 8, 3, dtype=torch.float64, seed=3)
    gradients = [
        torch.autograd.grad((one(z).quantized * g).sum(), z)[0]
        for one in (inner, LatentPerturbation(inner, num_neighbours=9, sample_fraction=1.0))
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("inner", [FiniteScalarQuantizer([5, 4, 5]), ScalarQuantizer(3, 4)], ids=["fsq", "scalar"])
def test_quantizers_without_a_stored_codebook_are_perturbed_to_their_neighbours(inner):
    quantizer, z = LatentPerturbation(inner, num_neighbours=7, sample_fraction=1.0), latents(5, 40, 3)
    result = quantizer(z)
    near = inner.decode(inner.neighbours(result.indices, 7))  # (B, N, 7, D)
    hit = (near == result.quantized.unsqueeze(-2)).all(-1)
    assert (hit.sum(-1) == 1).all() and (hit.sum((0, 1)) > 10).all()


def test_codes_of_several_scales_are_perturbed_through_decode():
    inner = MultiScaleResidual(VectorQuantizer(16, 4), scales=(1, 2, 3))
    quantizer, z = (
        LatentPerturbation(inner, num_neighbours=4, sample_fraction=0.5, samples="first"),
        latents(4, 3, 3, 4),
    )
    mask = torch.ones(4, 3, 3, dtype=torch.bool)
    mask[0, 0] = False
    result, clean = quantizer(z, mask), inner(z, mask)
    assert torch.equal(result.indices, clean.indices) and torch.equal(result.quantized[2:], clean.quantized[2:])
    moved = (result.quantized != clean.quantized).any(-1)
    assert moved[:2][mask[:2]].any() and (result.quantized[~mask] == 0).all()
    with pytest.raises(ValueError, match="needs one index per latent; MultiScaleResidual"):
        LatentPerturbation(inner, num_neighbours=4, sample_fraction=1.0, around="latent")(z)


@AROUND
@SAMPLES
def test_dropped_positions_stay_dropped_whatever_they_held(around, samples):
    quantizer = make(around=around, samples=samples)
    mask = torch.arange(24).view(4, 6) % 3 != 1
    z = torch.where(mask[..., None], latents(4, 6, 3), torch.tensor([torch.nan, 1e4, 0.0])).requires_grad_()
    result = quantizer(z, mask)
    assert (result.quantized[~mask] == 0).all() and (result.indices[~mask] == -1).all()
    (result.quantized.sum() + sum(result.losses.values())).backward()
    assert (z.grad[~mask] == 0).all() and z.grad.isfinite().all()
    assert (quantizer.assign(z.detach().masked_fill(~mask[..., None], 0), mask).quantized[~mask] == 0).all()
    empty = quantizer(z, torch.zeros_like(mask))
    assert (empty.quantized == 0).all() and all(loss == 0 for loss in empty.losses.values())


@pytest.mark.parametrize("around,batches", [("code", (4, 5)), ("latent", (4,))])
def test_training_compiles_without_graph_breaks(around, batches):
    quantizer = make(around=around, sample_fraction=0.4, anneal_start=2, anneal_end=6)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch in batches:
        z = latents(batch, 7, 3).requires_grad_()
        result = compiled(z)
        (result.quantized.sum() + sum(result.losses.values())).backward()
        assert torch.equal(result.indices, quantizer.quantizer(z).indices) and z.grad.isfinite().all()


# ---- annealing


def test_perturbation_fades_over_optimizer_steps_and_stays():
    quantizer, z = make(num_neighbours=10, anneal_start=2, anneal_end=6, end_ratio=0.0), latents(60, 60, 3)
    shares = []
    for _ in range(8):
        for _ in range(2):  # forward passes of one step do not count
            result = quantizer(z)
        shares.append((code_of(quantizer, result.quantized) != result.indices[..., 0]).double().mean().item())
        quantizer.commit_update()
    ratios = [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    expected = [ratio * (1 - 1 / max(1, int(10 * ratio))) for ratio in ratios]
    assert torch.allclose(torch.tensor(shares), torch.tensor(expected), atol=0.04)
    assert int(quantizer.optimizer_steps) == 8


def test_the_step_survives_copies_pickles_and_state_dicts():
    quantizer = make(anneal_start=2, anneal_end=6)
    for _ in range(3):
        quantizer.commit_update()
    again = build(quantizer.config)
    again.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), again, quantizer.bfloat16()):
        assert int(other.optimizer_steps) == 3 and other.optimizer_steps.dtype == torch.int64
    assert "optimizer_steps" not in make().state_dict()


def test_quantizer_inside_is_updated():
    quantizer = make(anneal_start=0, anneal_end=1)
    called = []
    quantizer.quantizer.commit_update = lambda: called.append(1)
    quantizer.commit_update()
    assert called == [1]


@pytest.mark.parametrize("end_ratio", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_the_default_schedule_has_no_jump(end_ratio):
    steps = torch.arange(0, 2001, dtype=torch.float64)
    ratio = anneal_ratio(steps, 400, 1200, end_ratio)
    assert (ratio[:401] == 1).all() and torch.allclose(ratio[1200:], torch.tensor(end_ratio, dtype=torch.float64))
    assert ratio.diff().abs().max() < 1 / 800 + 1e-9 and (ratio.diff() <= 1e-12).all()


# ---- bad arguments


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"token_probability": 1.5}, r"token_probability must lie in \[0, 1\]; got 1.5"),
        ({"sample_fraction": -0.1}, r"sample_fraction must lie in \[0, 1\]"),
        ({"end_ratio": 2.0}, r"end_ratio must lie in \[0, 1\]"),
        ({"num_neighbours": 21}, "between 1 and the number of codes, 20; got 21"),
        ({"num_neighbours": 0}, "between 1 and the number of codes, 20; got 0"),
        ({"around": "token"}, "'code' or 'latent'"),
        ({"samples": "last"}, "'random' or 'first'"),
        ({"anneal_start": 3}, "both be None"),
        ({"anneal_start": 3, "anneal_end": 3}, "anneal_start < anneal_end; got 3 and 3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_latent_neighbours_need_a_codebook_that_can_be_listed():
    with pytest.raises(ValueError, match=r"one index per token.*ScalarQuantizer has sizes \(64, 64\)"):
        LatentPerturbation(ScalarQuantizer(2), around="latent")
    with pytest.raises(ValueError, match="at most 1048576 codes"):
        LatentPerturbation(FiniteScalarQuantizer([16] * 9), around="latent")


# ---- published numbers


@pytest.mark.parametrize("case", ["a", "b", "c", "d", "e"])
def test_fixture(case, monkeypatch):
    config, weights, io = parity.fixture("robusttok-perturbation")
    setting = config["cases"][case]
    inner = VectorQuantizer(config["vocab_size"], config["z_channels"], l2_normalize=True)
    inner.load_state_dict({"codebook": weights["quantize.embedding.weight"]})
    quantizer = LatentPerturbation(
        inner, setting["alpha"], setting["beta"], setting["delta"], around="latent", samples="first"
    )

    def stored(shape, device, generator):
        number, height, width = shape
        u, r = (io[f"draw_{name}__{case}"].view(-1, height, width)[:number] for name in ("u", "r"))
        return u > setting["alpha"], r

    monkeypatch.setattr(quantizer, "_draw", stored)
    z = parity.channel_last(io["latents"]).clone().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io["indices"])
    parity.assert_close(result.quantized.detach(), parity.channel_last(io[f"perturbed__{case}"]))
    parity.assert_close(inner(z).quantized.detach(), parity.channel_last(io["quantized"]))
    (result.quantized * parity.channel_last(io["upstream"])).sum().backward()
    parity.assert_close(z.grad, parity.channel_last(io[f"grad_latents__perturbed_{case}"]))
    parity.assert_close(result.losses["codebook"].detach(), io["vq_loss"])
    parity.assert_close(config["beta"] * result.losses["commitment"].detach(), io["commit_loss"])


def test_fixture_schedule():
    config, _, io = parity.fixture("robusttok-perturbation")
    epochs = io["anneal_epochs"].double()
    for row, setting in enumerate(config["anneal"]):
        ratio = anneal_ratio(epochs, setting["start"], setting["end"], setting["end_ratio"], continuous=False)
        assert torch.equal(ratio, io["anneal_ratio"][row])
        for delta in (3, 10, 25, 100):
            quantizer = make(128, num_neighbours=delta, anneal_start=40, anneal_end=120)
            quantizer.end_ratio, quantizer.continuous = setting["end_ratio"], False
            for epoch, expected in zip(epochs.tolist(), io["anneal_ratio"][row].tolist(), strict=True):
                quantizer.optimizer_steps.fill_(int(epoch))
                probability, number = quantizer._strength()
                assert int(number) == max(1, int(delta * expected)) and float(probability) == expected
