"""Residual quantization against a greedy search written out here, closed forms, and other processes."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from vistok.layers.configurable import build
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.residual import Residual
from vistok.quantizers.vq import VectorQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_ranks", Path(__file__).with_name("ranks.py"))
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)

DEPTH, CODES, DIM = 3, 16, 4


def spread(quantizer, std=0.7):
    """Codebooks with codes of the size of the latents."""
    with torch.no_grad():
        for name, tensor in [*quantizer.named_parameters(), *quantizer.named_buffers()]:
            if name.endswith("codebook"):
                tensor.normal_(std=std, generator=torch.Generator().manual_seed(len(name) + tensor.shape[0]))
                if len(name) > 8 and name.split(".")[1].isdigit():
                    tensor.mul_(0.6 ** int(name.split(".")[1]))  # finer from level to level
    return quantizer


def make(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return spread(Residual(VectorQuantizer(CODES, DIM), DEPTH, **options).to(dtype))


def latents(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def greedy(z, codebooks):
    """Indices ``(..., levels)`` and the list of codes, by listing all distances."""
    rest, indices, codes = z.clone(), [], []
    for codebook in codebooks:
        indices.append((rest.unsqueeze(-2) - codebook).square().sum(-1).argmin(-1))
        codes.append(codebook[indices[-1]])
        rest = rest - codes[-1]
    return torch.stack(indices, -1), codes


KINDS = {
    "vector": lambda: VectorQuantizer(CODES, DIM),
    "unit vector": lambda: VectorQuantizer(CODES, DIM, l2_normalize=True),
    "moving averages": lambda: VectorQuantizer(CODES, DIM, codebook_update="ema"),
    "binary": lambda: LookupFreeQuantizer(DIM),
    "scalar": lambda: FiniteScalarQuantizer([5, 4, 3, 8]),
    "factorized": lambda: Factorized(VectorQuantizer(CODES, 2), DIM),
}


# ---- codes


def test_codes_equal_a_greedy_search_over_all_distances():
    quantizer, z = make(), latents(2, 3, 5, DIM)
    indices, codes = greedy(z, [level.codebook for level in quantizer.quantizers])
    result = quantizer(z)
    assert result.indices.shape == (2, 3, 5, DEPTH) and torch.equal(result.indices, indices)
    assert torch.equal(result.quantized, codes[0] + codes[1] + codes[2])
    assert quantizer.codebook_sizes == (CODES,) * DEPTH and quantizer.dim == DIM


def test_a_level_with_a_zero_code_never_makes_the_error_larger():
    quantizer, z = make(), latents(50, DIM).unsqueeze(0)
    with torch.no_grad():
        for level in quantizer.quantizers:
            level.codebook[0] = 0
    indices = quantizer.encode(z)
    errors = [(z - quantizer.decode(indices[..., :k])).square().sum(-1) for k in range(1, DEPTH + 1)]
    assert (errors[0] <= z.square().sum(-1)).all()
    assert (errors[1] <= errors[0] + 1e-12).all() and (errors[2] <= errors[1] + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_encode_equal_forward_bit_for_bit(kind, dtype):
    torch.manual_seed(0)
    quantizer = spread(Residual(KINDS[kind](), DEPTH)).eval()
    z = latents(2, 9, DIM, dtype=dtype)
    result = quantizer(z)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.encode(z), result.indices)
    assert torch.equal(quantizer(z).quantized, result.quantized)


def test_a_prefix_of_the_levels_decodes_to_the_sum_of_their_codes():
    quantizer, z = make().eval(), latents(2, 9, DIM)
    indices, codes = greedy(z, [level.codebook for level in quantizer.quantizers])
    for k, total in enumerate([codes[0], codes[0] + codes[1]], 1):
        cut = indices.clone()
        cut[..., k:] = -1
        assert torch.equal(quantizer.decode(indices[..., :k]), total)
        assert torch.equal(quantizer.decode(cut), total)
    assert torch.equal(quantizer.decode(torch.full_like(indices, -1)), torch.zeros_like(z))


def test_levels_may_have_codebooks_of_different_sizes():
    torch.manual_seed(0)
    quantizer = spread(Residual([VectorQuantizer(8, DIM), VectorQuantizer(32, DIM), VectorQuantizer(5, DIM)]).double())
    z = latents(2, 30, DIM)
    result = quantizer(z)
    assert quantizer.codebook_sizes == (8, 32, 5)
    assert torch.equal(result.indices, greedy(z, [level.codebook for level in quantizer.quantizers])[0])
    expected = [result.indices[..., i].flatten().bincount(minlength=size) for i, size in enumerate((8, 32, 5))]
    assert torch.equal(result.statistics["counts"], torch.cat(expected))


def test_a_level_may_carry_several_sub_codes():
    quantizer = Residual(LookupFreeQuantizer(DIM, subcode_bits=2), 2).eval()
    result = quantizer(latents(2, 5, DIM))
    assert result.indices.shape == (2, 5, 4) and quantizer.codebook_sizes == (4, 4, 4, 4)
    first = quantizer.quantizers[0].decode(result.indices[..., :2])
    assert torch.equal(quantizer.decode(result.indices[..., :2]), first)
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        quantizer.decode(result.indices[..., :3])


@pytest.mark.parametrize("levels", [[5, 5, 5, 5], [8, 5, 4, 3]])
def test_finer_scalar_levels_equal_the_residual_fsq_of_vector_quantize_pytorch(levels):
    from vector_quantize_pytorch import ResidualFSQ

    other = ResidualFSQ(levels=levels, num_quantizers=DEPTH, dim=DIM).eval()
    units = [[size**-level for size in levels] for level in range(DEPTH)]
    ours = Residual([FiniteScalarQuantizer(levels, symmetric=True, bound="clamp", scale=unit) for unit in units]).eval()
    z, limit = latents(2, 40, DIM, dtype=torch.float32), 1 + 1 / (torch.tensor(levels) - 1)
    expected, indices = other(z)
    result = ours(torch.tanh(z / limit) * limit)  # there part of the quantizer, here a matter of the encoder's head
    assert torch.equal(result.indices, indices.long())
    torch.testing.assert_close(result.quantized, expected, rtol=0, atol=1e-6)


# ---- gradients and losses


def test_gradient_of_the_sum_is_the_identity_and_not_depth_times_it():
    quantizer, z, g = make(), latents(2, 9, DIM).requires_grad_(), latents(2, 9, DIM, seed=3)
    result = quantizer(z)
    (result.quantized * g).sum().backward()
    assert torch.equal(z.grad, g)
    assert all(level.codebook.grad is None for level in quantizer.quantizers)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_identity_for_every_kind_of_level(kind):
    torch.manual_seed(0)
    quantizer = spread(Residual(KINDS[kind](), DEPTH))
    z, g = latents(2, 9, DIM, dtype=torch.float32).requires_grad_(), latents(2, 9, DIM, dtype=torch.float32, seed=3)
    (quantizer(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g)


def test_rotation_acts_once_between_the_latent_and_the_sum():
    quantizer, z, g = make(estimator="rotation"), latents(2, 9, DIM).requires_grad_(), latents(2, 9, DIM, seed=3)
    result = quantizer(z)
    (result.quantized * g).sum().backward()
    ratio = result.quantized.detach().norm(dim=-1) / z.detach().norm(dim=-1)
    torch.testing.assert_close(z.grad.norm(dim=-1), g.norm(dim=-1) * ratio)
    assert torch.equal(result.quantized, make().eval()(z).quantized)


def test_without_an_estimator_no_gradient_reaches_the_latents():
    quantizer, z = make(estimator="none"), latents(2, 9, DIM).requires_grad_()
    assert not quantizer(z).quantized.requires_grad


def test_every_level_trains_the_encoder_and_its_own_codebook():
    quantizer, z = make(), latents(2, 9, DIM).requires_grad_()
    result = quantizer(z)
    _, codes = greedy(z.detach(), [level.codebook.detach() for level in quantizer.quantizers])
    rest, errors = z.detach(), []
    for code in codes:
        errors.append(rest - code)
        rest = rest - code
    expected = torch.stack([error.square().mean() for error in errors]).mean()
    assert set(result.losses) == {"commitment", "codebook"}
    torch.testing.assert_close(result.losses["commitment"], expected)
    torch.testing.assert_close(result.losses["codebook"], expected)
    (gradient,) = torch.autograd.grad(result.losses["commitment"], z, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * sum(errors) / (DEPTH * z.numel()))
    result.losses["codebook"].backward()
    assert z.grad is None
    for i, level in enumerate(quantizer.quantizers):
        wanted = torch.zeros_like(level.codebook)
        wanted.index_add_(0, result.indices[..., i].flatten(), -2 * errors[i].reshape(-1, DIM) / (DEPTH * z.numel()))
        torch.testing.assert_close(level.codebook.grad, wanted)


def test_commitment_gradient_equals_finite_differences():
    quantizer, z = make(), latents(1, 4, DIM).requires_grad_()
    codes = quantizer.decode(quantizer.encode(z))
    assert torch.equal(codes, quantizer.decode(quantizer.encode(z + 1e-5)))  # no index changes on the way
    assert torch.autograd.gradcheck(lambda x: quantizer(x).losses["commitment"], (z,), eps=1e-6)


def test_projections_of_the_levels_are_trained_by_what_follows():
    torch.manual_seed(0)
    quantizer = Residual(Factorized(VectorQuantizer(CODES, 2), DIM), DEPTH)
    z = latents(2, 9, DIM, dtype=torch.float32).requires_grad_()
    quantizer(z).quantized.square().sum().backward()
    reached = [name for name, p in quantizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) == 2 * DEPTH and all("out" in name for name in reached), reached
    outward = [level.project_out.weight for level in quantizer.quantizers]
    result = quantizer(z)  # ... but not by the losses of the levels after them, whose residuals are detached
    later = torch.autograd.grad(result.losses["commitment"], outward, allow_unused=True)
    assert all(gradient is None or (gradient == 0).all() for gradient in later)


def test_losses_whose_weights_differ_between_levels_stay_apart():
    quantizer = Residual([VectorQuantizer(CODES, DIM), LookupFreeQuantizer(DIM), LookupFreeQuantizer(DIM)])
    assert quantizer.default_loss_weights == {"commitment": 0.25, "codebook": 1.0, "entropy": 0.1}
    assert set(quantizer(latents(2, 5, DIM)).losses) == set(quantizer.default_loss_weights)
    quantizer.quantizers[1].default_loss_weights = {"commitment": 0.5, "entropy": 0.1}
    mixed = Residual(list(quantizer.quantizers))
    names = {"level_0_commitment", "level_1_commitment", "level_2_commitment", "codebook", "entropy"}
    assert set(mixed.default_loss_weights) == names == set(mixed(latents(2, 5, DIM)).losses)
    assert mixed.default_loss_weights["level_1_commitment"] == pytest.approx(0.5 / 3)


# ---- quantizer dropout


def test_a_sample_with_dropped_levels_equals_that_sample_with_fewer_levels():
    quantizer, z = make(dropout=0.7), latents(12, 5, DIM).requires_grad_()
    result = quantizer(z, generator=torch.Generator().manual_seed(0))
    kept = (result.indices >= 0).sum(-1)
    assert (kept == kept[:, :1]).all() and len(kept[:, 0].unique()) == DEPTH  # one cut per sample, all cuts occur
    indices, codes = greedy(z.detach(), [level.codebook.detach() for level in quantizer.quantizers])
    errors, losses = z.detach(), []
    for level in range(DEPTH):
        has = kept[:, 0] > level
        assert torch.equal(result.indices[has, :, level], indices[has, :, level])
        assert (result.indices[~has, :, level] == -1).all()
        errors = errors - codes[level]
        losses.append(errors[has].square().mean())
    torch.testing.assert_close(result.losses["commitment"], torch.stack(losses).mean())
    for sample in range(len(z)):
        total = sum(codes[level][sample] for level in range(int(kept[sample, 0])))
        assert torch.equal(result.quantized[sample], total)
    only_first = [i for i in range(len(z)) if int(kept[i, 0]) == 1]
    last = torch.autograd.grad(result.losses["codebook"], quantizer.quantizers[-1].codebook, retain_graph=True)[0]
    unused = torch.ones(CODES, dtype=torch.bool)
    unused[result.indices[..., -1][result.indices[..., -1] >= 0]] = False
    assert (last[unused] == 0).all() and only_first
    counts = torch.stack([(result.indices[..., -1] == code).sum() for code in range(CODES)])
    assert torch.equal(result.statistics["counts"][-CODES:], counts)


def test_the_number_of_kept_levels_is_uniform_from_the_least_one():
    quantizer = Residual(LookupFreeQuantizer(1), 5, dropout=0.8, dropout_min_depth=3)
    indices = quantizer(torch.ones(20000, 1, 1), generator=torch.Generator().manual_seed(0)).indices
    kept = (indices[:, 0] >= 0).sum(1)
    shares = kept.bincount(minlength=6) / len(kept)
    expected = torch.tensor([0, 0, 0, 0.8 / 3, 0.8 / 3, 0.2 + 0.8 / 3])
    assert (shares - expected).abs().max() < 0.015


def test_one_cut_for_the_whole_batch():
    quantizer = make(dropout=1.0, dropout_per_sample=False)
    cuts = set()
    for seed in range(12):
        indices = quantizer(latents(6, 2, DIM), generator=torch.Generator().manual_seed(seed)).indices
        kept = (indices >= 0).sum(-1)
        assert (kept == kept[0, 0]).all()
        cuts.add(int(kept[0, 0]))
    assert cuts == {1, 2, 3}


def test_dropout_is_for_training_only_and_follows_the_generator():
    quantizer, z = make(dropout=1.0), latents(8, 2, DIM)
    first, again = (quantizer(z, generator=torch.Generator().manual_seed(5)).indices for _ in range(2))
    assert torch.equal(first, again) and (first < 0).any()
    assert (quantizer.eval()(z).indices >= 0).all()


def test_a_level_that_no_sample_keeps_leaves_finite_losses_and_no_state():
    torch.manual_seed(0)
    quantizer = Residual(VectorQuantizer(CODES, DIM, codebook_update="ema"), 2, dropout=1.0)
    quantizer._kept_levels = lambda batch, device, generator: torch.ones(batch, dtype=torch.int64)
    before = copy.deepcopy(quantizer.quantizers[1].state_dict())
    result = quantizer(latents(4, 3, DIM, dtype=torch.float32))
    quantizer.commit_update()
    assert result.losses["commitment"].isfinite()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.quantizers[1].state_dict().items())


# ---- sharing and state


def test_levels_are_independent_copies_unless_shared():
    apart, one = Residual(VectorQuantizer(CODES, DIM), DEPTH), Residual(VectorQuantizer(CODES, DIM), DEPTH, shared=True)
    assert len(list(apart.parameters())) == DEPTH and len(list(one.parameters())) == len(one.state_dict()) == 1
    assert not torch.equal(apart.quantizers[0].codebook, apart.quantizers[1].codebook)
    assert one.codebook_sizes == (CODES,) * DEPTH
    rebuilt = build(one.config)
    assert rebuilt.config == one.config and len(list(rebuilt.parameters())) == 1
    assert build(Residual([VectorQuantizer(8, 2), VectorQuantizer(4, 2)]).config).codebook_sizes == (8, 4)


def test_a_shared_moving_average_sees_all_levels_and_commits_once():
    torch.manual_seed(0)
    one = spread(Residual(VectorQuantizer(CODES, DIM, codebook_update="ema"), DEPTH, shared=True).double())
    alone = copy.deepcopy(one.quantizers[0])
    z = latents(3, 7, DIM)
    indices, codes = greedy(z, [one.quantizers[0].codebook] * DEPTH)
    residuals = torch.stack([z, z - codes[0], z - codes[0] - codes[1]])
    result = one(z)
    one.commit_update()
    alone(residuals)
    alone.commit_update()
    assert torch.equal(result.indices, indices)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(one.quantizers[0].state_dict()[name], value)
    state = copy.deepcopy(one.state_dict())
    one.commit_update()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_copies_pickles_and_state_dicts_behave_alike():
    quantizer, z = make(dropout=0.5), latents(4, 3, DIM)
    quantizer(z)
    other = make(seed=7)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(quantizer.state_dict(), strict=True)
    expected = quantizer.eval()(z)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), other.eval()):
        assert torch.equal(twin(z).quantized, expected.quantized)


# ---- masks and values that are not finite


def test_dropped_positions_count_for_nothing_whatever_they_hold():
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    results = []
    for junk in (0.0, 1e4, float("nan")):
        torch.manual_seed(0)
        quantizer = spread(Residual(VectorQuantizer(CODES, DIM, codebook_update="ema"), DEPTH).double())
        z = latents(2, 5, DIM)
        z[~mask] = junk
        z.requires_grad_()
        result = quantizer(z, mask)
        (result.quantized.sum() + result.losses["commitment"]).backward()
        quantizer.commit_update()
        assert (result.indices[~mask] == -1).all() and (result.quantized[~mask] == 0).all()
        assert (z.grad[~mask] == 0).all() and (z.grad[mask] != 0).any()
        assert torch.equal(quantizer.encode(z, mask), quantizer.eval()(z, mask).indices)
        results.append(
            (result.losses["commitment"], z.grad, result.statistics["counts"], *quantizer.state_dict().values())
        )
    torch.manual_seed(0)
    truncated = spread(Residual(VectorQuantizer(CODES, DIM, codebook_update="ema"), DEPTH).double())
    torch.testing.assert_close(truncated(latents(2, 5, DIM)[mask][None]).losses["commitment"], results[0][0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_batch_without_a_kept_position_has_finite_zero_losses():
    quantizer, z = make(), latents(2, 5, DIM).requires_grad_()
    result = quantizer(z * torch.nan, torch.zeros(2, 5, dtype=torch.bool))
    assert all(loss == 0 for loss in result.losses.values())
    sum(result.losses.values()).backward()
    assert (quantizer.quantizers[0].codebook.grad == 0).all()


def test_a_latent_that_is_not_finite_changes_no_codebook_at_any_level():
    torch.manual_seed(0)
    quantizer = spread(Residual(VectorQuantizer(CODES, DIM, codebook_update="ema"), DEPTH).double())
    alone = copy.deepcopy(quantizer)
    z = latents(1, 6, DIM)
    z[0, 2, 1], z[0, 4, 0] = torch.nan, torch.inf
    result = quantizer(z)
    quantizer.commit_update()
    alone(z[:, [0, 1, 3, 5]])
    alone.commit_update()
    assert not result.losses["commitment"].isfinite() and result.quantized.isfinite().all()
    assert ((result.indices >= 0) & (result.indices < CODES)).all()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(quantizer.state_dict()[name], value)


# ---- neighbours


def test_neighbours_are_those_of_the_product_of_the_levels():
    torch.manual_seed(0)
    quantizer = spread(Residual([VectorQuantizer(4, 2), VectorQuantizer(3, 2)]).double())
    indices = torch.tensor([[[1, 2], [3, 0]]])
    found, distances = quantizer.neighbour_distances(indices, 12)
    first, second = (level.codebook.detach() for level in quantizer.quantizers)
    for token in range(2):
        a, b = indices[0, token]
        table = (
            torch.cdist(first, first[a : a + 1]).square() + torch.cdist(second, second[b : b + 1]).square().T
        )  # (4, 3)
        torch.testing.assert_close(distances[0, token], table.flatten().sort().values)
        torch.testing.assert_close(table[found[0, token, :, 0], found[0, token, :, 1]], distances[0, token])
        assert len(found[0, token].unique(dim=0)) == 12 and torch.equal(found[0, token, 0], indices[0, token])
    with pytest.raises(ValueError, match="k must"):
        quantizer.neighbours(indices, 13)


def test_neighbours_of_a_token_with_dropped_levels_keep_them_dropped():
    torch.manual_seed(0)
    quantizer = spread(Residual([VectorQuantizer(4, 2), VectorQuantizer(3, 2)]).double())
    found, distances = quantizer.neighbour_distances(torch.tensor([[[1, -1], [-1, -1]]]), 6)
    alone, far = quantizer.quantizers[0].neighbour_distances(torch.tensor([[[1]]]), 4)
    assert torch.equal(found[0, 0, :4, 0], alone[0, 0, :, 0]) and (found[0, 0, :, 1] == -1).all()
    torch.testing.assert_close(distances[0, 0, :4], far[0, 0])
    assert (found[0, 0, 4:] == -1).all() and distances[0, 0, 4:].isinf().all()
    assert (found[0, 1] == -1).all() and (distances[0, 1] == 0).all()


# ---- arguments, precision, compilation, ranks


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"quantizer": VectorQuantizer(4, 2)}, "depth must be at least 1"),
        ({"quantizer": VectorQuantizer(4, 2), "depth": 0}, "depth must be at least 1"),
        ({"quantizer": []}, "one for each level"),
        ({"quantizer": [VectorQuantizer(4, 2)], "depth": 2}, "one for each level"),
        ({"quantizer": [VectorQuantizer(4, 2)], "shared": True}, "shared=True"),
        ({"quantizer": [VectorQuantizer(4, 2)] * 2}, "occurs twice"),
        ({"quantizer": [VectorQuantizer(4, 2), VectorQuantizer(4, 3)]}, "one size"),
        ({"quantizer": VectorQuantizer(4, 2), "depth": 2, "dropout": 1.5}, "dropout"),
        ({"quantizer": VectorQuantizer(4, 2), "depth": 2, "dropout_min_depth": 3}, "dropout_min_depth"),
        ({"quantizer": VectorQuantizer(4, 2), "depth": 2, "dropout_min_depth": 0}, "dropout_min_depth"),
        ({"quantizer": VectorQuantizer(4, 2), "depth": 2, "estimator": "stages"}, "estimator"),
    ],
)
def test_impossible_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Residual(**arguments)


def test_wrong_indices_are_refused():
    quantizer = make()
    with pytest.raises(TypeError, match="int64"):
        quantizer.decode(torch.zeros(1, 2, DEPTH))
    with pytest.raises(ValueError, match="first levels"):
        quantizer.decode(torch.zeros(1, 2, DEPTH + 1, dtype=torch.int64))


def test_autocast_changes_nothing():
    quantizer, z = make(torch.float32), latents(2, 50, DIM, dtype=torch.float32)
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z)
        assert torch.equal(quantizer.decode(result.indices), expected.quantized)
    assert torch.equal(result.indices, expected.indices) and torch.equal(result.quantized, expected.quantized)
    assert torch.equal(result.losses["commitment"], expected.losses["commitment"])


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"dropout": 0.5, "dropout_per_sample": False, "shared": True}])
def test_training_compiles_into_one_graph(options):
    torch.manual_seed(0)
    quantizer = Residual(VectorQuantizer(CODES, DIM, codebook_update="ema"), 2, **options)
    z = latents(3, 5, DIM, dtype=torch.float32).requires_grad_()
    result = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(z)
    (result.quantized.sum() + result.losses["commitment"]).backward()
    assert z.grad.isfinite().all()


RANKS = """
import torch
from vistok.quantizers.residual import Residual
from vistok.quantizers.vq import VectorQuantizer

def build():
    torch.manual_seed(0)
    quantizer = Residual(VectorQuantizer(16, 4, codebook_update="ema"), 3).double()
    cut = Residual(VectorQuantizer(16, 4), 3, dropout=1.0, dropout_per_sample=False)
    return quantizer, cut

def work(built, rank, world):
    quantizer, cut = built
    for step in range(2):
        z = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        own = z if world == 1 else (z[:5] if rank == 0 else z[5:])
        quantizer(own)
        quantizer.commit_update()
    kept = []
    torch.manual_seed(100 + rank)
    for step in range(8):
        indices = cut(torch.randn(2 + rank, 3, 4)).indices
        kept.append((indices >= 0).sum(-1))
    return quantizer.state_dict(), [cuts.unique().tolist() for cuts in kept]
"""


def test_ranks_drop_the_same_levels_and_hold_the_state_of_one_process(tmp_path):
    here = {}
    exec(RANKS, here)
    single, _ = here["work"](here["build"](), 0, 1)
    (first, first_cuts), (second, second_cuts) = ranks.run_ranks(tmp_path, RANKS, 2)
    assert first_cuts == second_cuts and all(len(cuts) == 1 for cuts in first_cuts)
    assert len({cuts[0] for cuts in first_cuts}) > 1
    for name, value in single.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10)
