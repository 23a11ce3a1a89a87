"""Finite scalar quantization: levels, gradients, packing and options, against formulas and lucidrains' code."""

import copy
import importlib.util
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch

from vistok.layers.configurable import build
from vistok.quantizers.fsq import FiniteScalarQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FORMS = pytest.mark.parametrize("symmetric", [False, True])
LEVELS = [8, 5, 7, 4, 3]
PUBLISHED = [[8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5]]


def latents(*shape, dtype=torch.float64, seed=1, std=1.5):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (std * values).to(dtype)


def values_of(number, symmetric):
    """The values of one channel, by hand."""
    if symmetric:
        return [2 * i / (number - 1) - 1 for i in range(number)]
    return [(i - number // 2) / (number // 2) for i in range(number)]


# ---- values


@FORMS
@pytest.mark.parametrize("number", [3, 4, 5, 6, 7, 8, 16, 999])
def test_a_channel_has_its_levels_in_a_rising_staircase(number, symmetric):
    quantizer = FiniteScalarQuantizer([number], symmetric).double()
    z = torch.linspace(-12, 12, 40001, dtype=torch.float64).view(1, -1, 1)
    result = quantizer(z)
    steps = result.quantized.flatten()
    assert (steps.diff() >= 0).all() and (result.indices.flatten().diff() >= 0).all()
    assert torch.allclose(steps.unique(), torch.tensor(values_of(number, symmetric), dtype=torch.float64), atol=1e-15)
    assert torch.equal(result.indices.unique(), torch.arange(number))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_stays_zero(dtype):
    levels = list(range(3, 40))[:15]
    quantizer = FiniteScalarQuantizer(levels)
    for z in (torch.zeros(1, 4, 15, dtype=dtype), -torch.zeros(1, 4, 15, dtype=dtype)):
        assert (quantizer(z).quantized == 0).all() and not quantizer(z).quantized.signbit().any()


def test_two_levels_are_signs():
    result = FiniteScalarQuantizer([2, 2], symmetric=True)(torch.tensor([[[0.3, -0.2], [-9.0, 9.0]]]))
    assert result.quantized.tolist() == [[[1, -1], [-1, 1]]] and result.indices.flatten().tolist() == [1, 2]


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_latents_saturate_inside_the_range(dtype, symmetric):
    quantizer = FiniteScalarQuantizer([3, 4, 5, 8, 999], symmetric)
    large = torch.tensor([1e2, 6e4, torch.finfo(dtype).max, torch.inf], dtype=dtype)
    for z, expected in ((large, [2, 3, 4, 7, 998]), (-large, [0] * 5)):
        result = quantizer(z.view(1, 4, 1).expand(1, 4, 5).contiguous())
        digits = torch.stack([result.indices[..., 0] // math.prod(quantizer.levels[:d]) for d in range(5)], -1)
        assert (digits % torch.tensor(quantizer.levels) == torch.tensor(expected)).all()


@FORMS
def test_not_a_number_gets_a_valid_code_and_its_gradient_says_so(symmetric):
    quantizer, z = FiniteScalarQuantizer(LEVELS, symmetric), latents(1, 3, 5, dtype=torch.float32)
    z[0, 1, 2] = torch.nan
    z.requires_grad_()
    result = quantizer(z)
    assert ((result.indices >= 0) & (result.indices < math.prod(LEVELS))).all()
    assert torch.equal(result.quantized, quantizer.decode(result.indices))
    result.quantized.sum().backward()
    assert z.grad[0, 1, 2].isnan() and z.grad.isnan().sum() == 1


# ---- indices


@FORMS
def test_every_index_is_a_code_of_its_own(symmetric):
    quantizer = FiniteScalarQuantizer([4, 3, 5], symmetric).double()
    indices = torch.arange(60).view(3, 20, 1)
    codes = quantizer.decode(indices)
    values = [values_of(number, symmetric) for number in (4, 3, 5)]
    expected = [combination[::-1] for combination in itertools.product(*values[::-1])]  # the first channel runs fastest
    assert torch.allclose(codes.view(60, 3), torch.tensor(expected, dtype=torch.float64), atol=1e-15)
    # Back through the bound: the codes themselves are no fixed points of the tanh.
    inside = codes.clamp(-0.98, 0.98)
    if symmetric:
        z = torch.atanh(inside)
    else:
        counts = torch.tensor([4, 3, 5])
        reach, offset = (counts - 1) * 1.001 / 2, 0.5 - counts % 2 / 2
        z = torch.atanh((codes * (counts // 2) + offset) / reach) - torch.atanh(offset / reach)
    assert torch.equal(quantizer.encode(z), indices)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, [0.5, 1.0, 0.3, 2.0, 0.1]])
def test_decoded_indices_are_bit_equal_to_the_quantized_latents(scale, dtype, symmetric):
    quantizer = FiniteScalarQuantizer(LEVELS, symmetric, scale=scale).eval()
    z = latents(2, 6, 7, 5, dtype=dtype)
    result = quantizer(z)
    assert result.quantized.shape == z.shape and result.indices.shape == (2, 6, 7, 1)
    assert result.indices.dtype == torch.int64 and result.quantized.dtype == torch.float32
    decoded = quantizer.decode(result.indices)
    assert torch.equal(decoded.view(torch.int32), result.quantized.view(torch.int32))
    assert torch.equal(quantizer.encode(z), result.indices)
    assert result.losses == {} and quantizer.default_loss_weights == {}


def test_huge_codebooks_are_never_stored():
    quantizer = FiniteScalarQuantizer([16] * 9)
    result = quantizer(latents(1, 50, 9))
    assert quantizer.codebook_sizes == (16**9,) and quantizer.bits == 36 and "counts" not in result.statistics
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    largest = FiniteScalarQuantizer([4] * 31)
    assert largest.encode(torch.full((1, 1, 31), 9.0)).item() == 4**31 - 1
    assert torch.equal(largest.decode(torch.tensor([[[4**31 - 1]]])), torch.full((1, 1, 31), 0.5))
    with pytest.raises(ValueError, match="64.0 bits, more than the 62"):
        FiniteScalarQuantizer([4] * 32)


def test_counts_count_the_codes_used():
    quantizer = FiniteScalarQuantizer([4, 3])
    result = quantizer(latents(3, 40, 2))
    assert torch.equal(result.statistics["counts"], torch.bincount(result.indices.flatten(), minlength=12))


# ---- gradients


@pytest.mark.parametrize("levels", PUBLISHED)
def test_gradient_is_that_of_the_bounded_latent(levels):
    quantizer = FiniteScalarQuantizer(levels).double()
    z, g = latents(2, 30, len(levels)).requires_grad_(), latents(2, 30, len(levels), seed=3)
    (quantizer(z).quantized * g).sum().backward()
    counts = torch.tensor(levels, dtype=torch.float64)
    reach, offset = (counts - 1) * 1.001 / 2, (counts % 2 == 0) * 0.5
    slope = 1 - torch.tanh(z.detach() + torch.atanh(offset / reach)) ** 2
    expected = g * slope * reach / (counts // 2)
    assert torch.allclose(z.grad, expected, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_symmetric_form():
    z, g = latents(2, 30, 3).requires_grad_(), latents(2, 30, 3, seed=3)
    (FiniteScalarQuantizer([8, 5, 2], True).double()(z).quantized * g).sum().backward()
    assert torch.allclose(z.grad, g * (1 - torch.tanh(z.detach()) ** 2), rtol=1e-9, atol=1e-12)
    z.grad = None
    (FiniteScalarQuantizer([8, 5, 2], True, bound="clamp").double()(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g * (z.detach().abs() <= 1))


@FORMS
def test_bounded_latents_match_finite_differences_and_round_to_the_codes(symmetric):
    quantizer = FiniteScalarQuantizer([8, 5, 6], symmetric, scale=[1.0, 0.5, 2.0]).double()
    z = latents(1, 6, 3).requires_grad_()
    torch.autograd.gradcheck(lambda z: quantizer.assign(z).latents, z)
    result = quantizer(z)
    half_step = torch.tensor([(b - a) / 2 for a, b in (values_of(n, symmetric)[:2] for n in (8, 5, 6))])
    half_step = half_step * torch.tensor([1.0, 0.5, 2.0])
    assert ((result.latents - result.quantized).abs() <= half_step * 1.01).all()


def test_half_precision_latents_get_their_gradient_in_half_precision():
    z = latents(2, 3, 5, dtype=torch.bfloat16).requires_grad_()
    FiniteScalarQuantizer(LEVELS)(z).quantized.sum().backward()
    assert z.grad.dtype == torch.bfloat16 and (z.grad > 0).all()


# ---- masks, precision, state


@FORMS
def test_dropped_positions_count_for_nothing_whatever_they_held(symmetric):
    quantizer, mask = FiniteScalarQuantizer(LEVELS, symmetric), torch.arange(12).view(2, 6) % 3 != 1
    z = latents(2, 6, 5, dtype=torch.float32)
    plain = quantizer(z)
    junk = torch.where(mask[..., None], z, torch.tensor([torch.nan, 1e4, torch.inf, -1e4, torch.nan])).requires_grad_()
    result = quantizer(junk, mask)
    assert torch.equal(result.quantized, plain.quantized * mask[..., None])
    assert torch.equal(result.indices, torch.where(mask[..., None], plain.indices, -1))
    assert torch.equal(quantizer.encode(junk, mask), result.indices)
    assert (result.latents[~mask] == 0).all() and torch.equal(quantizer.decode(result.indices), result.quantized)
    assert int(result.statistics["counts"].sum()) == int(mask.sum())
    result.quantized.sum().backward()
    assert (junk.grad[~mask] == 0).all() and (junk.grad[mask] != 0).all()


def test_an_empty_mask_gives_zeros():
    result = FiniteScalarQuantizer([4, 3]).train()(
        torch.full((2, 3, 2), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    )
    assert (result.quantized == 0).all() and (result.indices == -1).all() and result.losses == {}


@FORMS
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_result_is_the_same_under_autocast_and_in_a_cast_module(autocast, symmetric):
    quantizer, z = FiniteScalarQuantizer(LEVELS, symmetric, scale=0.3), latents(2, 500, 5, dtype=torch.float32)
    plain = quantizer(z)
    with torch.autocast("cpu", autocast):
        mixed, encoded = quantizer(z), quantizer.encode(z)
    cast = quantizer.to(autocast)(z)
    for other in (mixed, cast):
        assert torch.equal(plain.indices, other.indices) and torch.equal(plain.quantized, other.quantized)
    assert torch.equal(plain.indices, encoded)


def test_module_copies_pickles_and_rebuilds_without_state():
    quantizer = FiniteScalarQuantizer((8, 5), scale=[1.0, 0.5], corrupt=0.1)
    z = latents(2, 9, 2)
    expected = quantizer.eval()(z)
    assert quantizer.state_dict() == {}
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), build(quantizer.config).eval()):
        assert torch.equal(other(z).indices, expected.indices) and torch.equal(other(z).quantized, expected.quantized)


@FORMS
def test_training_compiles_without_graph_breaks(symmetric):
    quantizer = FiniteScalarQuantizer([8, 5, 6], symmetric)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    z, mask = latents(2, 7, 3, dtype=torch.float32), torch.arange(14).view(2, 7) % 4 != 0
    results = []
    for module in (quantizer, compiled):
        own = z.clone().requires_grad_()
        result = module(own, mask)
        result.quantized.square().sum().backward()
        results.append((result.quantized, result.indices, own.grad))
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*results, strict=True))


def test_the_robustness_options_compile_without_graph_breaks():
    quantizer = FiniteScalarQuantizer([8, 5, 6], bypass=0.5, corrupt=1.0)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch in (4, 5):  # the second size is traced with symbolic shapes
        z = latents(batch, 7, 3, dtype=torch.float32).requires_grad_()
        compiled(z).quantized.sum().backward()
        assert z.grad.isfinite().all()


# ---- robustness options


def test_bypass_passes_whole_samples_unrounded_in_training_only():
    quantizer, z = FiniteScalarQuantizer(LEVELS, bypass=0.3), latents(400, 3, 5, dtype=torch.float32).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    result, plain = quantizer(z, generator=generator), FiniteScalarQuantizer(LEVELS)(z)
    unrounded = (result.quantized == result.latents).all(-1).all(-1)
    assert 0.2 < unrounded.float().mean() < 0.4
    assert torch.equal(result.quantized[~unrounded], plain.quantized[~unrounded])
    assert torch.equal(result.indices, plain.indices)
    again = quantizer(z, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.quantized, result.quantized)
    gradient = [torch.autograd.grad(one.quantized.sum(), z)[0] for one in (result, plain)]
    assert torch.equal(*gradient)
    assert torch.equal(quantizer.eval()(z).quantized, plain.quantized)


def test_corruption_replaces_tokens_by_uniform_random_codes_in_training_only():
    quantizer = FiniteScalarQuantizer([4, 3, 5], corrupt=1.0, corrupt_share=(0.25, 0.25))
    z = torch.zeros(50, 200, 3, requires_grad=True)  # every clean token has the same code
    result, clean = quantizer(z, generator=torch.Generator().manual_seed(0)), quantizer.eval()(z)
    replaced = result.indices != clean.indices
    assert abs(replaced.double().mean().item() - 0.25 * 59 / 60) < 0.02
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    counts = torch.bincount(result.indices[replaced], minlength=60).double()
    others = counts[torch.arange(60) != clean.indices[0, 0]]
    assert ((others - others.mean()).square() / others.mean()).sum() < 58 + 5 * math.sqrt(2 * 58)  # chi squared
    result.quantized.sum().backward()
    assert (z.grad[replaced[..., 0]] == 0).all() and (z.grad[~replaced[..., 0]] > 0).double().mean() > 0.99


def test_corruption_happens_in_a_share_of_the_calls_and_to_a_share_of_the_tokens():
    quantizer, z = FiniteScalarQuantizer([8] * 6, corrupt=0.4, corrupt_share=(0.2, 0.6)), torch.zeros(1, 500, 6)
    generator = torch.Generator().manual_seed(0)
    shares = [(quantizer(z, generator=generator).quantized != 0).any(-1).double().mean() for _ in range(300)]
    changed = torch.stack([share for share in shares if share > 0])
    assert abs(len(changed) / 300 - 0.4) < 0.1
    assert changed.min() > 0.1 and changed.max() < 0.7 and abs(changed.mean() - 0.4) < 0.04
    assert changed.std() > 0.08


def test_dropped_positions_stay_dropped_under_corruption():
    quantizer = FiniteScalarQuantizer([4, 3], corrupt=1.0, corrupt_share=(1.0, 1.0), bypass=0.5)
    mask = torch.arange(10).view(2, 5) % 2 == 0
    result = quantizer(latents(2, 5, 2), mask)
    assert (result.quantized[~mask] == 0).all() and (result.indices[~mask] == -1).all()


# ---- neighbours


@FORMS
@pytest.mark.parametrize("k", [1, 2, 9, 60])
@pytest.mark.parametrize("levels,scale", [([4, 3, 5], 1.0), ([3, 4, 5], [1.0, 0.5, 0.7]), ([6, 2, 5], 1.0)])
def test_neighbours_equal_a_full_sort(levels, scale, k, symmetric):
    levels = levels if symmetric else [max(number, 3) for number in levels]
    quantizer = FiniteScalarQuantizer(levels, symmetric, scale=scale)
    total = math.prod(levels)
    indices = torch.arange(total).view(1, total, 1)[:, ::3]
    found, distances = quantizer.neighbour_distances(indices, k)
    codes = quantizer.double().decode(torch.arange(total).unsqueeze(1))
    for place, index in enumerate(indices.flatten().tolist()):
        # Rounded, so that distances that are equal on paper are equal here.
        expected = (codes - codes[index]).square().sum(1)
        keys = [round(distance, 9) for distance in expected.tolist()]
        order = sorted(range(total), key=lambda i: (i != index, keys[i], i))[:k]
        assert found[0, place, :, 0].tolist() == order
        assert torch.allclose(distances[0, place].double(), expected[order], rtol=1e-5, atol=1e-6)


def test_neighbours_of_a_codebook_too_large_to_list():
    quantizer = FiniteScalarQuantizer([8] * 20)
    index = quantizer.encode(torch.zeros(1, 1, 20))
    found, distances = quantizer.neighbour_distances(index, 41)
    assert found[0, 0, 0, 0] == index[0, 0, 0] and (distances[0, 0, 1:] == 1 / 16).all()
    expected = sorted(index.item() + sign * 8**d for d in range(20) for sign in (-1, 1))
    assert found[0, 0, 1:, 0].tolist() == expected
    dropped, zero = quantizer.neighbour_distances(torch.full((1, 1, 1), -1), 5)
    assert (dropped == -1).all() and (zero == 0).all()
    with pytest.raises(ValueError, match="k must lie between 1 and the number of codes, 12; got 13"):
        FiniteScalarQuantizer([4, 3]).neighbours(torch.zeros(1, 1, 1, dtype=torch.int64), 13)


# ---- bad arguments


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"levels": []}, r"from 2 to 65536; got \[\]"),
        ({"levels": [8, 1]}, r"from 2 to 65536; got \[8, 1\]"),
        ({"levels": [8, 2]}, "two levels cannot be centred.*use symmetric=True"),
        ({"levels": [8, 1002]}, "margin 0.001 is too large for 1002 levels"),
        ({"levels": [8], "bound": "relu"}, "'tanh' or 'clamp'; got 'relu'"),
        ({"levels": [8], "bound": "clamp"}, "needs symmetric=True"),
        ({"levels": [8, 5], "scale": [1.0]}, r"one per channel \(2\)"),
        ({"levels": [8, 5], "scale": 0.0}, "scale must be one positive number"),
        ({"levels": [8], "bypass": 1.5}, r"bypass must lie in \[0, 1\]; got 1.5"),
        ({"levels": [8], "corrupt": -0.1}, r"corrupt must lie in \[0, 1\]; got -0.1"),
        ({"levels": [8], "corrupt_share": (0.9, 0.1)}, "smallest, largest"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer(**arguments)


# ---- published code


@FORMS
@pytest.mark.parametrize("levels", PUBLISHED)
def test_codes_indices_and_gradients_equal_lucidrains(levels, symmetric):
    peer_package = pytest.importorskip("vector_quantize_pytorch")
    peer = peer_package.FSQ(levels, preserve_symmetry=symmetric)
    quantizer = FiniteScalarQuantizer(levels, symmetric)
    z, g = (
        latents(1, 5000, len(levels), dtype=torch.float32),
        latents(1, 5000, len(levels), dtype=torch.float32, seed=3),
    )
    own, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    result = quantizer(own)
    (codes, indices) = peer(other)
    assert torch.equal(result.indices[..., 0], indices.long())
    parity.assert_close(result.quantized.detach(), codes.detach(), 1e-6)
    (result.quantized * g).sum().backward()
    (codes * g).sum().backward()
    parity.assert_close(own.grad, other.grad, 1e-6)


def test_stages_add_up_to_lucidrains_residual_fsq():
    peer_package = pytest.importorskip("vector_quantize_pytorch")
    levels, depth = [8, 5, 6], 3
    peer = peer_package.ResidualFSQ(levels=levels, num_quantizers=depth).eval()
    z = latents(1, 2000, 3, dtype=torch.float32)
    expected, expected_indices = peer(z)
    counts = torch.tensor(levels, dtype=torch.float32)
    limit = 1 + 1 / (counts - 1)
    residual, total, indices = torch.tanh(z / limit) * limit, torch.zeros_like(z), []
    for depth_index in range(depth):
        stage = FiniteScalarQuantizer(levels, symmetric=True, bound="clamp", scale=(counts**-depth_index).tolist())
        result = stage(residual)
        residual, total = residual - result.quantized, total + result.quantized
        indices.append(result.indices)
    assert torch.equal(torch.cat(indices, -1), expected_indices)
    parity.assert_close(total, expected, 1e-6)


@pytest.mark.parametrize("name,latent_name", [("cosmos-di", "latents"), ("flextok-full", "registers")])
def test_fixture(name, latent_name):
    _, _, io = parity.fixture(name)
    z, quantized, indices = io[latent_name], io["quantized"], io["indices"]
    if name == "cosmos-di":
        z, quantized = parity.channel_last(z), parity.channel_last(quantized)
    quantizer = FiniteScalarQuantizer([8, 8, 8, 5, 5, 5])
    result = quantizer(z)
    assert torch.equal(result.indices[..., 0], indices)
    parity.assert_close(result.quantized, quantized, 1e-6)
    parity.assert_close(quantizer.decode(indices.unsqueeze(-1)), quantized, 1e-6)
