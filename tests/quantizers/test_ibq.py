"""Index backpropagation: gradients, losses and masks against dense autograd and the original's numbers."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.grouped import Grouped
from vistok.quantizers.ibq import IndexBackpropQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

BOTH = pytest.mark.parametrize("l2_normalize", [False, True])
LOSSES = {"quantization", "commitment", "codebook", "entropy"}


def make(l2_normalize=False, codes=13, dim=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return IndexBackpropQuantizer(codes, dim, l2_normalize, **{"entropy_temperature": 0.3, **options}).to(dtype)


def numbers(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(quantizer, z):
    """The method written out: quantized and losses by N x K tensors."""
    normalize = (lambda x: F.normalize(x, dim=-1)) if quantizer.l2_normalize else (lambda x: x)
    latents, codebook = normalize(z.reshape(-1, z.shape[-1])), normalize(quantizer.codebook)
    p = (latents @ codebook.T / quantizer.temperature).softmax(1)
    onehot = F.one_hot(p.argmax(1), len(codebook)).to(p)
    soft, hard = (onehot - p.detach() + p) @ codebook, onehot @ codebook
    q = (latents @ codebook.T / quantizer.entropy_temperature).softmax(1)
    mean = q.mean(0)
    return soft.view(z.shape), {
        "quantization": (soft - latents).square().mean(),
        "commitment": (hard.detach() - latents).square().mean(),
        "codebook": (hard - latents.detach()).square().mean(),
        "entropy": -(q * q.log()).sum(1).mean() + (mean * (mean + quantizer.entropy_eps).log()).sum(),
    }


def total(quantizer, losses):
    return sum(quantizer.default_loss_weights[name] * loss for name, loss in losses.items())


# ---- forward, gradients, losses


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_returns_the_code_itself(l2_normalize, dtype):
    quantizer = make(l2_normalize, dtype=torch.float32)
    result = quantizer(numbers(2, 3, 5, 4, dtype=dtype))
    assert result.indices.shape == (2, 3, 5, 1) and result.indices.dtype == torch.int64
    codebook = F.normalize(quantizer.codebook, dim=1) if l2_normalize else quantizer.codebook
    assert torch.equal(result.quantized, F.embedding(result.indices[..., 0], codebook))
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.eval()(numbers(2, 3, 5, 4, dtype=dtype)).quantized, result.quantized)


def test_a_codebook_in_bfloat16_is_compared_in_float32():
    quantizer = make(dtype=torch.bfloat16)
    result = quantizer(numbers(2, 9, 4, dtype=torch.bfloat16))
    total(quantizer, result.losses).backward()
    logits = numbers(18, 4, dtype=torch.bfloat16).float() @ quantizer.codebook.float().T
    assert torch.equal(result.indices.flatten(), logits.argmax(1))
    assert torch.equal(result.quantized, quantizer.decode(result.indices))
    assert quantizer.codebook.grad.dtype == torch.bfloat16


@BOTH
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_losses_and_gradients_equal_dense_autograd(l2_normalize, temperature):
    quantizer = make(l2_normalize, temperature=temperature)
    z, upstream = numbers(2, 7, 4).requires_grad_(), numbers(2, 7, 4, seed=2)
    soft, expected = dense(quantizer, z)
    result = quantizer(z)
    assert set(result.losses) == LOSSES == set(quantizer.default_loss_weights)
    outputs = {"task": ((result.quantized * upstream).sum(), (soft * upstream).sum())}
    outputs |= {name: (result.losses[name], expected[name]) for name in LOSSES}
    for got, wanted in outputs.values():
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(got, [z, quantizer.codebook], retain_graph=True, materialize_grads=True),
            torch.autograd.grad(wanted, [z, quantizer.codebook], retain_graph=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_every_code_gets_a_gradient_from_what_follows():
    quantizer, z = make(), numbers(1, 2, 4).requires_grad_()
    quantizer(z).quantized.square().sum().backward()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all() and (z.grad != 0).all()


def test_without_entropy_there_is_no_such_loss():
    quantizer = make(entropy_temperature=None)
    result = quantizer(numbers(1, 5, 4))
    assert set(result.losses) == set(quantizer.default_loss_weights) == LOSSES - {"entropy"}
    assert set(result.statistics) == {"counts"}


def test_losses_and_statistics_are_the_same_in_evaluation():
    quantizer, z = make(), numbers(2, 7, 4)
    training, evaluation = quantizer(z), quantizer.eval()(z)
    for part in ("losses", "statistics"):
        one, other = getattr(training, part), getattr(evaluation, part)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(quantizer.encode(z), evaluation.indices)


# ---- the original


@pytest.mark.parametrize("suffix", ["", "_wide"])
def test_parity(suffix):
    config, weights, io = parity.fixture("ibq-quantizer")
    quantizer = IndexBackpropQuantizer(config["n_e"], config["e_dim"])  # published defaults
    quantizer.load_state_dict({"codebook": weights["embedding.weight"]})
    z = parity.channel_last(io[f"latents{suffix}"]).contiguous().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io[f"indices{suffix}"])
    parity.assert_close(result.quantized, parity.channel_last(io[f"quantized{suffix}"]))
    if not suffix:
        assert torch.equal(quantizer.decode(result.indices), parity.channel_last(io["quantized_from_indices"]))
    parity.assert_close(result.statistics["sample_entropy"], io[f"sample_entropy{suffix}"])
    parity.assert_close(result.statistics["batch_entropy"], io[f"avg_entropy{suffix}"])
    weighted = {name: quantizer.default_loss_weights[name] * loss for name, loss in result.losses.items()}
    outputs = {
        "entropy": result.losses["entropy"],
        "quant": weighted["quantization"] + weighted["commitment"] + weighted["codebook"],
        "upstream": (result.quantized * parity.channel_last(io["upstream"])).sum(),
    }
    parity.assert_close(outputs["entropy"], io[f"entropy_loss{suffix}"])
    parity.assert_close(outputs["quant"], io[f"quant_loss{suffix}"])
    for name, output in outputs.items():
        to_z, to_codebook = torch.autograd.grad(output, [z, quantizer.codebook], retain_graph=True)
        parity.assert_close(to_z, parity.channel_last(io[f"grad_latents__{name}{suffix}"]))
        parity.assert_close(to_codebook, io[f"grad_codebook__{name}{suffix}"])


# ---- masks, latents that are not finite


@BOTH
@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_mask_equals_truncation_whatever_the_padding_holds(l2_normalize, value):
    quantizer, upstream = make(l2_normalize), numbers(2, 6, 4, seed=2)
    z = numbers(2, 6, 4)
    z[:, 4:] = value
    mask = torch.arange(6).expand(2, 6) < 4
    padded, short = z.clone().requires_grad_(), z[:, :4].clone().requires_grad_()
    masked, truncated = quantizer(padded, mask), quantizer(short)
    assert torch.equal(masked.indices[:, :4], truncated.indices) and (masked.indices[:, 4:] == -1).all()
    assert torch.equal(masked.quantized[:, :4], truncated.quantized) and (masked.quantized[:, 4:] == 0).all()
    assert torch.equal(quantizer.encode(z, mask), masked.indices)
    assert torch.equal(quantizer.decode(masked.indices), masked.quantized)
    for part in ("losses", "statistics"):
        for name, expected in getattr(truncated, part).items():
            torch.testing.assert_close(getattr(masked, part)[name], expected, rtol=1e-12, atol=0)
    gradients = []
    for result, weight in ((masked, upstream), (truncated, upstream[:, :4])):
        quantizer.zero_grad()
        (total(quantizer, result.losses) + (result.quantized * weight).sum()).backward()
        gradients.append(quantizer.codebook.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(padded.grad[:, :4], short.grad, rtol=1e-11, atol=1e-14)
    assert (padded.grad[:, 4:] == 0).all()


def test_an_empty_mask_gives_zero_losses():
    quantizer, z = make(), numbers(2, 3, 4).requires_grad_()
    result = quantizer(z, torch.zeros(2, 3, dtype=torch.bool))
    (total(quantizer, result.losses) + result.quantized.sum()).backward()
    assert all(loss.item() == 0 for loss in result.losses.values())
    assert (z.grad == 0).all() and (quantizer.codebook.grad == 0).all() and result.statistics["counts"].sum() == 0


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_spoils_the_losses_and_not_the_codebook(l2_normalize, value):
    quantizer, z = make(l2_normalize), numbers(2, 6, 4)
    z[0, 2, 1] = value
    broken = z.requires_grad_()
    result = quantizer(broken)
    assert ((result.indices >= 0) & (result.indices < 13)).all() and result.quantized.isfinite().all()
    assert not any(result.losses[name].isfinite() for name in ("quantization", "commitment", "entropy"))
    assert result.losses["codebook"].isfinite() and result.statistics["counts"].sum() == 11
    (total(quantizer, result.losses) + result.quantized.sum()).backward()
    assert quantizer.codebook.grad.isfinite().all()
    others = torch.ones(2, 6, dtype=torch.bool)
    others[0, 2] = False
    expected = quantizer(z.detach(), others).losses["codebook"]
    torch.testing.assert_close(result.losses["codebook"], expected, rtol=1e-12, atol=0)


# ---- containers, precision, state


def test_inside_a_container_every_part_keeps_its_own_gradient():
    torch.manual_seed(0)
    grouped = Grouped(IndexBackpropQuantizer(5, 2, entropy_temperature=None), 2).double()
    z, upstream = numbers(2, 6, 4).requires_grad_(), numbers(2, 6, 4, seed=2)
    (grouped(z).quantized * upstream).sum().backward()
    gradient, z.grad = z.grad, None
    for i, part in enumerate(grouped.quantizers):
        columns = slice(2 * i, 2 * i + 2)
        (part(z[..., columns]).quantized * upstream[..., columns]).sum().backward()
        torch.testing.assert_close(z.grad[..., columns], gradient[..., columns])


def test_assigned_codes_carry_the_gradient_of_the_lookup_alone():
    quantizer, z, upstream = make(), numbers(2, 6, 4).requires_grad_(), numbers(2, 6, 4, seed=2)
    assigned = quantizer.assign(z)
    to_z, to_codebook = torch.autograd.grad(
        (assigned.quantized * upstream).sum(), [z, quantizer.codebook], allow_unused=True
    )
    expected = torch.zeros(13, 4, dtype=torch.float64).index_add_(0, assigned.indices.flatten(), upstream.view(-1, 4))
    assert to_z is None
    torch.testing.assert_close(to_codebook, expected)


def test_autocast_changes_nothing():
    quantizer, z = make(dtype=torch.float32), numbers(2, 50, 4, dtype=torch.float32)
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z)
        assert torch.equal(quantizer.encode(z), plain.indices)
    assert torch.equal(plain.indices, mixed.indices) and torch.equal(plain.quantized, mixed.quantized)
    assert all(torch.equal(plain.losses[name], mixed.losses[name]) for name in LOSSES)


def test_training_compiles_without_a_graph_break():
    quantizer, z, mask = make(), numbers(2, 7, 4), torch.arange(14).view(2, 7) % 5 > 0
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (quantizer, compiled):
        quantizer.zero_grad()
        result = function(z, mask)
        (total(quantizer, result.losses) + result.quantized.sum()).backward()
        gradients.append(quantizer.codebook.grad.clone())
    torch.testing.assert_close(*gradients)


def test_it_copies_pickles_and_loads():
    quantizer, z = make(), numbers(1, 9, 4)
    expected = quantizer(z).quantized
    fresh = IndexBackpropQuantizer(13, 4)
    fresh.double().load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh):
        assert torch.equal(other(z).quantized, expected)


def test_neighbours_are_the_nearest_codes():
    quantizer = make()
    found, distances = quantizer.neighbour_distances(torch.arange(13).view(1, 13, 1), 3)
    expected = (quantizer.codebook[:, None] - quantizer.codebook).square().sum(-1).topk(3, largest=False)
    assert torch.equal(found[0, ..., 0], expected.indices)
    torch.testing.assert_close(distances[0], expected.values)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="positive; got 0 and 4"):
        IndexBackpropQuantizer(0, 4)
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        IndexBackpropQuantizer(4, 4, temperature=0)
    with pytest.raises(ValueError, match="entropy_temperature must be positive, or None; got -1"):
        IndexBackpropQuantizer(4, 4, entropy_temperature=-1)
    with pytest.raises(ValueError, match="entropy_eps must be at least 0; got -1"):
        IndexBackpropQuantizer(4, 4, entropy_eps=-1)
