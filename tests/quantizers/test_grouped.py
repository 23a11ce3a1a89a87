"""Grouped quantization: the same as separate quantizers on slices, or as one quantizer on more tokens."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.layers.configurable import build
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.product import Product
from vistok.quantizers.vq import VectorQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def make(groups=3, shared=False, codes=7, dim=2, **options):
    torch.manual_seed(0)
    quantizer = Grouped(VectorQuantizer(codes, dim, **options), groups, shared).double()
    with torch.no_grad():
        for part in quantizer.quantizers:
            part.codebook.normal_()
    return quantizer


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- independent groups


def test_independent_groups_equal_quantizers_on_slices():
    quantizer, z, upstream = make(), latents(2, 4, 5, 6).requires_grad_(), latents(2, 4, 5, 6, seed=2)
    keep = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)) > 0.3
    result = quantizer(z, keep)
    loss = (result.quantized * upstream).sum() + result.losses["commitment"] + 2 * result.losses["codebook"]
    grad, *codebook_grads = torch.autograd.grad(loss, [z, *quantizer.parameters()])

    slices = [part.detach().clone().requires_grad_() for part in z.split(2, -1)]
    results = [part(own, keep) for part, own in zip(quantizer.quantizers, slices, strict=True)]
    means = {name: sum(r.losses[name] for r in results) / 3 for name in ("commitment", "codebook")}
    loss = sum((r.quantized * u).sum() for r, u in zip(results, upstream.split(2, -1), strict=True))
    loss = loss + means["commitment"] + 2 * means["codebook"]
    expected = torch.autograd.grad(loss, [*slices, *quantizer.parameters()])

    assert torch.equal(result.quantized, torch.cat([r.quantized for r in results], -1))
    assert torch.equal(result.indices, torch.cat([r.indices for r in results], -1))
    assert torch.equal(result.latents, torch.cat([r.latents for r in results], -1))
    assert torch.equal(result.statistics["counts"], torch.cat([r.statistics["counts"] for r in results]))
    for name, mean in means.items():
        torch.testing.assert_close(result.losses[name], mean)
    torch.testing.assert_close(grad, torch.cat(expected[:3], -1))
    torch.testing.assert_close(torch.stack(codebook_grads), torch.stack(expected[3:]))
    assert quantizer.dim == 6 and quantizer.codebook_sizes == (7, 7, 7)


def test_permuting_the_groups_permutes_the_indices():
    quantizer, z, order = make(), latents(3, 8, 6), [2, 0, 1]
    expected = quantizer(z)
    quantizer.quantizers = torch.nn.ModuleList(quantizer.quantizers[i] for i in order)
    parts = z.split(2, -1)
    found = quantizer(torch.cat([parts[i] for i in order], -1))
    assert torch.equal(found.indices, expected.indices[..., order])


def test_groups_start_with_codebooks_of_their_own():
    quantizer = Grouped(VectorQuantizer(7, 2), 3)
    tables = [part.codebook for part in quantizer.quantizers]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tables, 2))
    rebuilt = build(json.loads(json.dumps(quantizer.config)))
    assert set(rebuilt.state_dict()) == {f"quantizers.{i}.codebook" for i in range(3)}


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_arrives_once_through_containers_in_containers(shared):
    torch.manual_seed(0)
    inner = Product([VectorQuantizer(5, 1), LookupFreeQuantizer(2)])
    quantizer = Grouped(Grouped(inner, 2, shared=True), 2, shared).double()
    z, upstream = latents(2, 3, 12).requires_grad_(), latents(2, 3, 12, seed=2)
    result = quantizer(z)
    (grad,) = torch.autograd.grad((result.quantized * upstream).sum(), z)
    assert torch.equal(grad, upstream)
    assert quantizer.codebook_sizes == (5, 4) * 4
    assert torch.equal(quantizer.eval().decode(result.indices), result.quantized)


def test_the_estimator_of_the_groups_is_used():
    quantizer, z, upstream = make(estimator="rotation"), latents(2, 3, 6).requires_grad_(), latents(2, 3, 6, seed=2)
    (grad,) = torch.autograd.grad((quantizer(z).quantized * upstream).sum(), z)
    expected = []
    for part, own, up in zip(quantizer.quantizers, z.split(2, -1), upstream.split(2, -1), strict=True):
        own = own.detach().requires_grad_()
        expected += torch.autograd.grad((part(own).quantized * up).sum(), own)
    assert torch.equal(grad, torch.cat(expected, -1)) and not torch.equal(grad, upstream)


# ---- one quantizer for all groups


def test_shared_groups_are_further_tokens():
    quantizer, z, upstream = make(shared=True), latents(2, 4, 6).requires_grad_(), latents(2, 4, 6, seed=2)
    keep = torch.tensor([[True, True, False, True], [False, True, True, True]])
    result = quantizer(z, keep)
    tokens = z.view(2, 12, 2)
    expected = quantizer.quantizers[0](tokens, keep.repeat_interleave(3, 1))
    assert torch.equal(result.quantized, expected.quantized.view(2, 4, 6))
    assert torch.equal(result.indices, expected.indices.view(2, 4, 3))
    assert all(torch.equal(result.losses[name], expected.losses[name]) for name in expected.losses)
    own = torch.autograd.grad((result.quantized * upstream).sum() + sum(result.losses.values()), z)
    other = torch.autograd.grad((expected.quantized.view(2, 4, 6) * upstream).sum() + sum(expected.losses.values()), z)
    assert torch.equal(own[0], other[0])
    assert list(quantizer.state_dict()) == ["quantizers.0.codebook"]


def test_shared_groups_count_codes_group_by_group():
    quantizer, z = make(shared=True), latents(2, 40, 6)
    z[0, 3, 2:4] = torch.nan  # group 1 of one token
    result = quantizer(z)
    countable = result.indices.masked_fill(z.unflatten(-1, (3, 2)).isnan().any(-1), -1)
    expected = [torch.bincount(column[column >= 0], minlength=7) for column in countable.flatten(0, 1).unbind(1)]
    assert torch.equal(result.statistics["counts"], torch.cat(expected))


def test_shared_entropy_is_that_of_the_mixture_of_groups():
    """Group 0 always uses one code and group 1 the other: together both are used, each group alone wastes one."""
    z = torch.tensor([1.0, -1.0]).expand(1, 8, 2)
    mixed = Grouped(LookupFreeQuantizer(1), 2, shared=True)(z).losses["entropy"]
    apart = Grouped(LookupFreeQuantizer(1), 2)(z).losses["entropy"]
    assert float(mixed) == pytest.approx(-math.log(2), abs=1e-5) and float(apart) == pytest.approx(0, abs=1e-5)


# ---- both


@pytest.mark.parametrize("shared", [False, True])
def test_dropped_positions_reach_no_group(shared):
    keep = torch.tensor([[True, False, True, True]])
    results = []
    for filling in (0.0, 1e4, torch.nan):
        quantizer = make(shared=shared, codebook_update="ema")
        z = latents(1, 4, 6).masked_fill(~keep.unsqueeze(-1), filling).requires_grad_()
        result = quantizer(z, keep)
        (grad,) = torch.autograd.grad(result.quantized.square().sum() + result.losses["commitment"], z)
        quantizer.commit_update()
        codes = torch.cat([part.codebook for part in quantizer.quantizers])
        assert (result.indices[0, 1] == -1).all() and (result.quantized[0, 1] == 0).all() and (grad[0, 1] == 0).all()
        results.append((result.quantized, result.losses["commitment"], grad, codes))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_neighbours_equal_a_search_of_all_combinations(shared):
    quantizer = make(groups=2, shared=shared, codes=5)
    indices = quantizer.encode(latents(2, 6, 4))
    found, distances = quantizer.neighbour_distances(indices, 25)
    everything = torch.tensor(list(itertools.product(range(5), repeat=2))).view(1, 25, 2)
    vectors, own = quantizer.decode(everything)[0], quantizer.decode(indices).unsqueeze(-2)
    torch.testing.assert_close(distances, (own - vectors).square().sum(-1).sort(-1).values)
    torch.testing.assert_close((own - quantizer.decode(found)).square().sum(-1), distances)
    assert all(len(set(map(tuple, token))) == 25 for token in found.flatten(0, 1).tolist())
    assert torch.equal(quantizer.neighbours(indices, 3), found[:, :, :3])
    with pytest.raises(ValueError, match="k must lie between 1 and the number of codes, 25"):
        quantizer.neighbours(indices, 26)


@pytest.mark.parametrize("shared", [False, True])
def test_random_numbers_come_from_the_generator(shared):
    """EMA codebooks whose dead codes move to random latents."""

    def trained(seed):
        quantizer = make(shared=shared, codes=300, codebook_update="ema", restart_after=1)
        generator = torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        quantizer(latents(2, 20, 6), generator=generator)
        assert torch.equal(before, torch.get_rng_state())
        quantizer.commit_update()
        return torch.cat([part.codebook for part in quantizer.quantizers])

    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("shared", [False, True])
def test_training_compiles_without_graph_breaks(shared):
    torch._dynamo.reset()
    quantizer = make(shared=shared)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second one makes the shapes symbolic
        z, keep = latents(batch, 3, 6).requires_grad_(), torch.ones(batch, 3, dtype=torch.bool)
        expected, found = quantizer(z, keep), compiled(z, keep)
        assert torch.equal(found.indices, expected.indices)
        grads = []
        for result in (expected, found):
            (grad,) = torch.autograd.grad(result.quantized.square().sum() + sum(result.losses.values()), z)
            grads.append(grad)
        torch.testing.assert_close(*grads)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="groups must be at least 1; got 0"):
        Grouped(VectorQuantizer(4, 2), 0)


# ---- published systems


@pytest.mark.parametrize("suffix", ["", "_wide"])
def test_shared_groups_equal_wetok(suffix):
    config, _, io = parity.fixture("wetok-gfq")
    groups, bits = config["num_codebooks"], config["dim"] // config["num_codebooks"]
    quantizer = Grouped(LookupFreeQuantizer(bits, entropy_eps=1e-5), groups, shared=True)
    z = parity.channel_last(io[f"latents{suffix}"]).contiguous().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices, io[f"indices{suffix}"].view(result.indices.shape))
    assert torch.equal(result.quantized, parity.channel_last(io[f"quantized{suffix}"]))
    if not suffix:
        assert torch.equal(result.indices.flatten(0, -2).T, io["indices_per_group"])
        expected = parity.channel_last(io["quantized_from_group_indices"])
        assert torch.equal(quantizer.decode(result.indices), expected)
    parity.assert_close(result.losses["commitment"], io[f"commit_loss{suffix}"])
    parity.assert_close(result.losses["entropy"], io[f"entropy_aux_loss{suffix}"])
    parity.assert_close(result.statistics["sample_entropy"], io[f"per_sample_entropy{suffix}"])
    parity.assert_close(result.statistics["batch_entropy"], io[f"codebook_entropy{suffix}"])
    upstream = parity.channel_last(io["upstream"])
    terms = {"ste": (result.quantized * upstream).sum()}
    terms |= {"commit": result.losses["commitment"], "entropy": result.losses["entropy"]}
    for name, term in terms.items():
        (grad,) = torch.autograd.grad(term, z, retain_graph=True)
        # The entropy of latents this far from zero cancels in float32 in the original.
        tolerance = 3e-4 if name + suffix == "entropy_wide" else 1e-5
        parity.assert_close(grad, parity.channel_last(io[f"grad_latents__{name}{suffix}"]), tolerance)


def test_independent_groups_equal_unitok():
    config, weights, io = parity.fixture("unitok-quantizer")
    groups = config["num_codebooks"]
    dim, codes = config["vocab_width"] // groups, config["vocab_size"] // groups
    inner = VectorQuantizer(codes, dim, l2_normalize=True, entropy_temperature=config["entropy_temp"])
    quantizer = Grouped(inner, groups)
    names = {f"quantizers.{i}.codebook": f"codebooks.{i}.codebook.weight" for i in range(groups)}
    quantizer.load_state_dict({own: weights[theirs] for own, theirs in names.items()})
    z = io["latents"].clone().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices, io["indices"].movedim(1, -1))
    parity.assert_close(result.quantized, io["quantized"])
    parity.assert_close(quantizer.decode(result.indices), io["quantized_from_indices"])
    weighted = 0.25 * result.losses["commitment"] + result.losses["codebook"]
    parity.assert_close(weighted, io["vq_loss"])
    parity.assert_close(result.losses["entropy"], io["entropy_loss"])
    ste = (result.quantized * io["upstream"]).sum()
    for name, term in {"ste": ste, "vq": weighted, "entropy": result.losses["entropy"]}.items():
        inputs = [z] if name == "ste" else [z, *quantizer.parameters()]
        grad, *tables = torch.autograd.grad(term, inputs, retain_graph=True)
        parity.assert_close(grad, io[f"grad_latents__{name}"])
        for i, table in enumerate(tables):
            parity.assert_close(table, io[f"grad_param_{name}/codebooks.{i}.codebook.weight"])


def test_unit_codes_have_unit_length_in_every_group():
    quantizer = Grouped(VectorQuantizer(9, 4, l2_normalize=True), 2)
    codes = quantizer(latents(2, 5, 8).float()).quantized.unflatten(-1, (2, 4))
    torch.testing.assert_close(codes, F.normalize(codes, dim=-1))
