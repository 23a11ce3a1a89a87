"""One index for two codebooks: weighted nearest codes, losses, restarts, several ranks; and containers on ranks."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.search import nearest_codes
from vistok.quantizers.shared_index import SharedIndex


def _helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity, ranks = _helper("parity"), _helper("ranks")

BOTH = pytest.mark.parametrize("l2_normalize", [False, True])


def make(codes=23, dims=(3, 2), dtype=torch.float64, **options):
    torch.manual_seed(0)
    quantizer = SharedIndex(codes, dims, **options).to(dtype)
    with torch.no_grad():
        for codebook in quantizer.codebooks:
            codebook.normal_()
    return quantizer


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts_of(z, quantizer):
    """Parts of latents and codes as they are compared, and their weighted squared distances (n, K)."""
    latent_parts = z.reshape(-1, quantizer.dim).split(quantizer.dims, 1)
    code_parts = list(quantizer.codebooks)
    if quantizer.l2_normalize:
        latent_parts = [F.normalize(part, dim=1) for part in latent_parts]
        code_parts = [F.normalize(part, dim=1) for part in code_parts]
    distances = sum(
        weight * (a[:, None] - b).square().sum(-1)
        for weight, a, b in zip(quantizer.distance_weights, latent_parts, code_parts, strict=True)
    )
    return torch.cat(latent_parts, 1), torch.cat(code_parts, 1), distances


# ---- assignment and losses


@BOTH
@pytest.mark.parametrize("weights", [None, (1.0, 0.3), (0.2, 4.0)])
def test_the_index_minimises_the_weighted_sum_of_distances(weights, l2_normalize):
    quantizer, z = make(distance_weights=weights, l2_normalize=l2_normalize), latents(4, 30, 5)
    result = quantizer(z)
    _, codes, distances = parts_of(z, quantizer)
    assert torch.equal(result.indices.flatten(), distances.argmin(1))
    assert torch.equal(result.quantized.flatten(0, 1), codes[distances.argmin(1)])
    assert torch.equal(quantizer.encode(z), result.indices)
    assert torch.equal(quantizer.eval().decode(result.indices), result.quantized)
    assert torch.equal(result.statistics["counts"], torch.bincount(result.indices.flatten(), minlength=23))


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_weight_zero_has_no_say(part):
    """What is left is plain vector quantization of the other part."""
    quantizer = make(distance_weights=(0.0, 1.0) if part else (1.0, 0.0), l2_normalize=False)
    z = latents(4, 30, 5)
    own = z.flatten(0, 1).split((3, 2), 1)[part]
    assert torch.equal(quantizer.encode(z).flatten(), nearest_codes(own, quantizer.codebooks[part]))


@BOTH
def test_losses_and_gradients_equal_the_formulas(l2_normalize):
    quantizer, z = make(l2_normalize=l2_normalize, distance_weights=(1.0, 0.5)), latents(3, 8, 5).requires_grad_()
    keep = latents(3, 8, seed=3) > -0.4
    result = quantizer(z, keep)
    compared, table, distances = parts_of(z, quantizer)
    rows = keep.flatten()
    codes = table[distances.argmin(1)]
    expected = {
        "commitment": (compared - codes.detach())[rows].square().mean(),
        "codebook": (compared.detach() - codes)[rows].square().mean(),
    }
    for name, loss in expected.items():
        torch.testing.assert_close(result.losses[name], loss)
        inputs = [z] if name == "commitment" else list(quantizer.codebooks)
        own = torch.autograd.grad(result.losses[name], inputs)
        torch.testing.assert_close(own, torch.autograd.grad(loss, inputs, retain_graph=True))
    assert quantizer.default_loss_weights == {"commitment": 0.25, "codebook": 1.0}


def test_the_gradient_passes_straight_through_to_what_is_compared():
    quantizer, z, upstream = make(l2_normalize=False), latents(3, 8, 5).requires_grad_(), latents(3, 8, 5, seed=2)
    (quantizer(z).quantized * upstream).sum().backward()
    assert torch.equal(z.grad, upstream) and all(codebook.grad is None for codebook in quantizer.codebooks)
    unit, z = make(), latents(3, 8, 5).requires_grad_()
    result = unit(z)
    (result.quantized * upstream).sum().backward()
    for part, grad, code in zip(*(x.split((3, 2), -1) for x in (z.detach(), z.grad, result.quantized)), strict=True):
        assert torch.allclose((part * grad).sum(-1), torch.zeros(3, 8, dtype=torch.float64), atol=1e-12)  # no radius
        assert torch.allclose(code.norm(dim=-1), torch.ones(3, 8, dtype=torch.float64))


@BOTH
def test_entropy_equals_the_dense_softmax(l2_normalize):
    quantizer = make(
        l2_normalize=l2_normalize,
        distance_weights=(1.0, 0.5),
        entropy_temperature=0.3,
        batch_entropy_weight=0.7,
        entropy_eps=1e-5,
    )
    z = latents(2, 9, 5).requires_grad_()
    result = quantizer(z)
    logits = -parts_of(z, quantizer)[2] / 0.3
    p = logits.softmax(1)
    sample, mean = -(p * logits.log_softmax(1)).sum(1).mean(), p.mean(0)
    batch = -(mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(result.losses["entropy"], sample - 0.7 * batch)
    torch.testing.assert_close(result.statistics["batch_entropy"], batch.detach())
    inputs = [z, *quantizer.codebooks]
    own = torch.autograd.grad(result.losses["entropy"], inputs)
    torch.testing.assert_close(own, torch.autograd.grad(sample - 0.7 * batch, inputs))
    assert set(quantizer.default_loss_weights) == {"commitment", "codebook", "entropy"}


def test_neighbours_are_ordered_by_the_weighted_distance():
    quantizer = make(distance_weights=(0.2, 3.0))
    indices = quantizer.encode(latents(2, 6, 5))
    found, distances = quantizer.neighbour_distances(indices, 23)
    weight = torch.tensor([0.2] * 3 + [3.0] * 2, dtype=torch.float64)
    table = quantizer.all_codes().detach()
    expected = ((table[indices[..., 0]].unsqueeze(-2) - table).square() * weight).sum(-1).sort(-1)
    assert torch.equal(found[..., 0], expected.indices)
    torch.testing.assert_close(distances, expected.values)


# ---- robustness


def test_masked_and_broken_latents_train_no_codebook():
    keep = torch.tensor([[True, False, True, True]])
    grads, losses = [], []
    for filling, mask in ((0.0, keep), (torch.nan, keep), (1e4, keep), (torch.nan, None)):
        quantizer = make(restart_after=1, entropy_temperature=0.3)
        z = latents(1, 4, 5).masked_fill(~keep.unsqueeze(-1), filling).requires_grad_()
        result = quantizer(z, mask)
        sum(result.losses.values()).backward()
        grads.append(torch.cat([codebook.grad.flatten() for codebook in quantizer.codebooks]))
        losses.append(result.losses)
        if mask is not None:
            assert (z.grad[0, 1] == 0).all() and (result.indices[0, 1] == -1).all() and not result.quantized[0, 1].any()
        quantizer.commit_update()
        assert all(codebook.isfinite().all() for codebook in quantizer.codebooks)
        assert int(result.statistics["counts"].sum()) == 3
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2]) and grads[3].isfinite().all()
    assert losses[0] == losses[1] == losses[2] and losses[3]["commitment"].isnan()


# A second batch size makes the shapes symbolic.
@pytest.mark.parametrize("options,batches", [(dict(entropy_temperature=0.3), (2, 3)), (dict(restart_after=2), (2, 3))])
def test_training_compiles_without_graph_breaks(options, batches):
    torch._dynamo.reset()
    quantizer = make(**options)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch in batches:
        z = latents(batch, 5, 5).requires_grad_()
        expected, found = quantizer(z), compiled(z)
        assert torch.equal(found.indices, expected.indices)
        inputs = [z, *quantizer.codebooks]
        own, other = (
            torch.autograd.grad(result.quantized.square().sum() + sum(result.losses.values()), inputs)
            for result in (expected, found)
        )
        torch.testing.assert_close(own, other)
        quantizer.commit_update()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(codebook_size=0), "must be positive; got 0"),
        (dict(dims=[]), "must be positive"),
        (dict(dims=[3, 0]), r"must be positive; got 4 and \[3, 0\]"),
        (dict(distance_weights=[1.0]), r"one number per part \(2\)"),
        (dict(distance_weights=[0.0, 0.0]), "not all zero"),
        (dict(distance_weights=[-1.0, 1.0]), "none negative"),
        (dict(restart_after=0), "restart_after must be at least 1"),
        (dict(entropy_temperature=0.0), "entropy_temperature must be positive"),
        (dict(batch_entropy_weight=-1.0), "must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharedIndex(**{"codebook_size": 4, "dims": [3, 2], **arguments})


# ---- restart


def test_an_unused_code_moves_in_all_parts_to_one_latent():
    quantizer, z = make(restart_after=2, codes=40), latents(2, 15, 5)
    before = quantizer.all_codes().detach()
    used = torch.zeros(40, dtype=torch.bool)
    for _ in range(2):
        used[quantizer(z).indices.flatten()] = True
        assert torch.equal(quantizer.all_codes().detach(), before)  # until the optimizer step is over
        quantizer.commit_update()
    after = quantizer.all_codes().detach()
    assert torch.equal(after[used], before[used])
    rows = quantizer.latents_of(z)
    nearest = (after[~used][:, None] - rows).abs().amax(-1).min(1)
    moved = nearest.values < 1e-12
    assert int(moved.sum()) == min(30, int((~used).sum())) and len(nearest.indices[moved].unique()) == int(moved.sum())
    assert (quantizer.idle_steps[~used][moved] == 0).all()
    quantizer.commit_update()
    assert torch.equal(quantizer.all_codes().detach(), after)  # nothing pending


def test_evaluation_and_copies_hold_no_pending_state():
    quantizer, z = make(restart_after=1), latents(2, 15, 5)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(z)
    with torch.no_grad():
        quantizer.train()(z)
    quantizer.commit_update()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert list(before) == ["idle_steps", "codebooks.0", "codebooks.1"]
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(z).indices, quantizer(z).indices)


# ---- several ranks


SOURCE = """
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.product import Product
from vistok.quantizers.shared_index import SharedIndex
from vistok.quantizers.vq import VectorQuantizer

def build():
    torch.manual_seed(0)
    ema = dict(codebook_update="ema", ema_decay=0.8)
    branches = [Grouped(VectorQuantizer(7, 2, **ema), 2), Grouped(LookupFreeQuantizer(2), 2, shared=True)]
    return [
        SharedIndex(9, [3, 1], entropy_temperature=0.2).double(),
        SharedIndex(64, [3, 1], restart_after=1).double(),
        Product(branches, [4, 6]).double(),
    ]

def work(built, rank, world):
    everything = torch.randn(5, 10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = everything if world == 1 else everything[:2] if rank == 0 else everything[2:]
    result = {"samples": len(own)}
    for step in range(2):
        for number, quantizer in enumerate(built):
            z = own.clone().requires_grad_()
            losses = quantizer(z).losses
            loss = losses["entropy"] if "entropy" in losses else sum(losses.values())
            quantizer.zero_grad()
            loss.backward()
            result[f"entropy{number}"] = loss.detach()
            result[f"grad{number}"] = z.grad
            result[f"tables{number}"] = [p.grad for p in quantizer.parameters() if p.grad is not None]
            quantizer.commit_update()
    result["state"] = [quantizer.state_dict() for quantizer in built]
    return result
"""


def test_ranks_agree_with_one_process_also_with_unequal_shares(tmp_path):
    here = {"torch": torch}
    exec(SOURCE, here)
    single, (first, second) = here["work"](here["build"](), 0, 1), ranks.run_ranks(tmp_path, SOURCE, 2)
    assert (first["samples"], second["samples"]) == (2, 3)
    for mine, theirs in zip(first["state"], second["state"], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    for number in (0, 2):  # the entropies; data-parallel training averages the gradients of the ranks
        torch.testing.assert_close(first[f"entropy{number}"], single[f"entropy{number}"])
        own = torch.cat([first[f"grad{number}"], second[f"grad{number}"]]) / 2
        torch.testing.assert_close(own, single[f"grad{number}"])
    for one, mine, theirs in zip(single["tables0"], first["tables0"], second["tables0"], strict=True):
        torch.testing.assert_close((mine + theirs) / 2, one)
    for name, value in single["state"][2].items():  # averaged codebooks
        torch.testing.assert_close(first["state"][2][name], value)
    assert (first["state"][1]["idle_steps"] == 0).all()  # 50 tokens of both ranks are enough to move every unused code


# ---- published system


def test_single_scale_equals_tokenflow():
    config, weights, io = parity.fixture("tokenflow-quantizer")
    dims = (config["semantic_code_dim"], config["codebook_embed_dim"])
    quantizer = SharedIndex(config["codebook_size"], dims, entropy_temperature=0.01, entropy_eps=1e-5)
    names = ("semantic", "pixel")
    tables = ("quantize.embedding_vqkd.weight", "quantize.embedding_vqgan.weight")
    quantizer.load_state_dict({f"codebooks.{i}": weights[name] for i, name in enumerate(tables)})
    z = torch.cat([parity.channel_last(io[f"features_{name}"]) for name in names], -1).requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io["single_indices"])
    parity.assert_close(result.quantized, parity.channel_last(io["single_quantized"]))
    commitment = config["commit_loss_beta"] * result.losses["commitment"]
    entropy = config["entropy_loss_ratio"] * result.losses["entropy"]
    terms = {"vq": result.losses["codebook"], "commit": commitment, "entropy": entropy}
    for name, term in terms.items():
        parity.assert_close(term, io[f"single_{name}_loss"])
    terms["ste"] = (result.quantized * parity.channel_last(io["upstream"])).sum()
    for name in ("commit", "entropy", "ste"):
        (grad,) = torch.autograd.grad(terms[name], z, retain_graph=True)
        for part, own in zip(grad.split(dims, -1), names, strict=True):
            parity.assert_close(part, parity.channel_last(io[f"grad_features_{own}__single_{name}"]))
    for name in ("vq", "entropy"):
        grads = torch.autograd.grad(terms[name], list(quantizer.codebooks), retain_graph=True)
        for grad, own in zip(grads, names, strict=True):
            parity.assert_close(grad, io[f"grad_codebook_{own}__single_{name}"])
