"""Post-training scalar quantization against SciPy, brute force and the original's numbers."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from vistok.layers.configurable import build
from vistok.quantizers.scalar import ScalarQuantizer, normal_bins

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

RANGES = pytest.mark.parametrize("low,high", [(-5.0, 5.0), ([-5.0, -1.0, 0.0], [5.0, 3.0, 0.5])], ids=["one", "each"])


def latents(*shape, dtype=torch.float64, seed=1, std=2.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (std * values).to(dtype)


# ---- bins and values


@pytest.mark.parametrize("bits,std_range", [(1, 3.0), (3, 3.0), (6, 3.0), (8, 3.0), (4, 2.0), (12, 4.0)])
def test_bins_equal_scipy(bits, std_range):
    stats = pytest.importorskip("scipy.stats")
    boundaries, means = normal_bins(bits, std_range)
    number = 1 << bits
    expected = [min(std_range, max(-std_range, stats.norm.ppf(i / number))) for i in range(number + 1)]
    assert torch.allclose(boundaries, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    every = max(1, number // 64)
    for i in range(0, number, every):
        bin_mean = stats.truncnorm(boundaries[i].item(), boundaries[i + 1].item()).mean()
        assert abs(means[i].item() - bin_mean) < 1e-9
    assert (means.diff() > 0).all() and torch.equal(means, -means.flip(0))
    assert ((boundaries[:-1] < means) & (means < boundaries[1:])).all()


@RANGES
@pytest.mark.parametrize("bits", [1, 2, 6])
def test_every_channel_takes_the_nearest_value(bits, low, high):
    quantizer = ScalarQuantizer(3, bits, low, high).double()
    z = latents(4, 100, 3)
    result = quantizer(z)
    every = torch.arange(1 << bits).view(-1, 1, 1).expand(-1, 1, 3)
    values = quantizer.decode(every)[:, 0]  # (K, 3)
    expected = (z.unsqueeze(-2) - values).abs().argmin(-2)
    assert torch.equal(result.indices, expected)
    assert torch.equal(result.quantized, values.T[torch.arange(3), expected])
    _, means = normal_bins(bits)
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    # The buffers were float32 before .double().
    assert torch.allclose(values, (means.unsqueeze(1) + 3) / 6 * (high - low) + low, atol=1e-6)


def test_the_lower_of_two_equally_near_values_wins():
    quantizer = ScalarQuantizer(1, 1, -3.0, 3.0)
    assert quantizer.encode(torch.zeros(1, 1, 1)).item() == 0


@RANGES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quantizing_twice_changes_nothing(dtype, low, high):
    quantizer = ScalarQuantizer(3, 8, low, high)
    once = quantizer(latents(2, 500, 3, dtype=dtype))
    twice = quantizer(once.quantized)
    assert torch.equal(once.indices, twice.indices) and torch.equal(once.quantized, twice.quantized)


def test_values_rise_with_the_latent_and_stop_at_the_range():
    quantizer = ScalarQuantizer(1)
    result = quantizer(torch.linspace(-9, 9, 20001).view(1, -1, 1))
    assert (result.indices.flatten().diff() >= 0).all() and (result.quantized.flatten().diff() >= 0).all()
    assert torch.equal(result.indices.unique(), torch.arange(64))
    assert result.quantized.abs().max() < 5
    far = torch.tensor([[[1e30], [torch.inf], [-1e30], [-torch.inf]]])
    assert quantizer(far).indices.flatten().tolist() == [63, 63, 0, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_error_on_latents_of_unit_variance_is_below_that_of_even_steps(bits):
    """In the published range of 5; a normal that fills the whole range is better off with even steps from 3 bits on."""
    z = latents(1, 20000, 1, std=1.0)
    error = (ScalarQuantizer(1, bits).double()(z).quantized - z).square().mean()
    step = 10 / (1 << bits)
    even = (((z + 5) / step).floor().clamp(0, (1 << bits) - 1) + 0.5) * step - 5
    assert error < 0.35 * (even - z).square().mean()


# ---- the contract


@RANGES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_decoded_indices_are_bit_equal_to_the_quantized_latents(dtype, low, high):
    quantizer = ScalarQuantizer(3, 6, low, high).eval()
    z = latents(2, 4, 5, 3, dtype=dtype)
    result = quantizer(z)
    assert result.indices.shape == z.shape and result.indices.dtype == torch.int64 and result.losses == {}
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.encode(z), result.indices)
    assert quantizer.codebook_sizes == (64, 64, 64) and quantizer.bits == 18
    counts = result.statistics["counts"].view(3, 64)
    assert all(torch.equal(counts[d], torch.bincount(result.indices[..., d].flatten(), minlength=64)) for d in range(3))


def test_gradient_passes_straight_through():
    z, g = latents(2, 7, 3, dtype=torch.bfloat16).requires_grad_(), latents(2, 7, 3, dtype=torch.bfloat16, seed=3)
    (ScalarQuantizer(3)(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g)


def test_dropped_positions_count_for_nothing_whatever_they_held():
    quantizer, mask = ScalarQuantizer(3), torch.arange(12).view(2, 6) % 3 != 1
    z = latents(2, 6, 3, dtype=torch.float32)
    plain = quantizer(z)
    junk = torch.where(mask[..., None], z, torch.tensor([torch.nan, 1e4, torch.inf])).requires_grad_()
    result = quantizer(junk, mask)
    assert torch.equal(result.quantized, plain.quantized * mask[..., None])
    assert torch.equal(result.indices, torch.where(mask[..., None], plain.indices, -1))
    assert torch.equal(quantizer.encode(junk, mask), result.indices)
    assert torch.equal(quantizer.decode(result.indices), result.quantized) and (result.latents[~mask] == 0).all()
    assert int(result.statistics["counts"].sum()) == 3 * int(mask.sum())
    result.quantized.sum().backward()
    assert torch.equal(junk.grad, mask[..., None].expand(2, 6, 3).float())
    empty = quantizer(junk, torch.zeros_like(mask))
    assert (empty.quantized == 0).all() and (empty.indices == -1).all()


def test_not_a_number_gets_a_valid_index():
    found = ScalarQuantizer(2).encode(torch.full((1, 3, 2), torch.nan))
    assert ((found >= 0) & (found < 64)).all()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_result_is_the_same_under_autocast_and_in_a_cast_module(autocast):
    quantizer, z = ScalarQuantizer(3), latents(2, 500, 3, dtype=torch.float32)
    plain = quantizer(z)
    with torch.autocast("cpu", autocast):
        mixed, encoded = quantizer(z), quantizer.encode(z)
    cast = quantizer.to(autocast)(z)
    for other in (mixed, cast):
        assert torch.equal(plain.indices, other.indices) and torch.equal(plain.quantized, other.quantized)
    assert torch.equal(plain.indices, encoded)


def test_module_copies_pickles_and_rebuilds_without_state():
    quantizer = ScalarQuantizer(2, 5, [-1.0, -2.0], 3.0)
    z = latents(2, 9, 2)
    assert quantizer.state_dict() == {}
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), build(quantizer.config)):
        assert torch.equal(other(z).quantized, quantizer(z).quantized)


def test_training_compiles_without_graph_breaks():
    quantizer, z = ScalarQuantizer(3), latents(2, 7, 3, dtype=torch.float32).requires_grad_()
    result = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(z)
    result.quantized.sum().backward()
    assert torch.equal(result.indices, quantizer(z).indices) and (z.grad == 1).all()


def test_fit_takes_mean_and_deviation_of_every_channel():
    spread, centre = torch.tensor([1.0, 0.1, 7.0]), torch.tensor([0.0, 5.0, -2.0])
    z = latents(4, 5000, 3, std=1.0) * spread + centre
    z[0, 0] = torch.nan
    quantizer = ScalarQuantizer.fit(z, bits=4)
    assert torch.allclose((quantizer.high + quantizer.low) / 2, centre, atol=0.2)
    assert torch.allclose((quantizer.high - quantizer.low) / 6, spread, rtol=0.03)
    counts = quantizer(z[1:]).statistics["counts"].view(3, 16) / (3 * 5000)
    means = normal_bins(4)[1]
    below = torch.special.ndtr((means[1:] + means[:-1]) / 2)  # the nearest mean decides, not the bin
    expected = torch.cat([below, torch.ones(1)]) - torch.cat([torch.zeros(1), below])
    assert torch.allclose(counts.double(), expected.expand(3, 16).double(), atol=0.006)
    assert torch.equal(build(quantizer.config).encode(z), quantizer.encode(z))
    with pytest.raises(ValueError, match="two finite latents; got 0"):
        ScalarQuantizer.fit(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="low must lie below high"):
        ScalarQuantizer.fit(torch.ones(3, 2))


# ---- neighbours


@pytest.mark.parametrize("k", [1, 5, 64])
def test_neighbours_equal_a_full_sort(k):
    quantizer = ScalarQuantizer(3, 2, [-5.0, -1.0, 0.0], [5.0, 3.0, 4.0]).double()
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    codes = quantizer.decode(every)
    found, distances = quantizer.neighbour_distances(every[None, ::5], k)
    for place, index in enumerate(range(0, 64, 5)):
        expected = (codes - codes[index]).square().sum(1)
        keys = [round(distance, 6) for distance in expected.tolist()]
        order = sorted(range(64), key=lambda i: (i != index, keys[i], i))[:k]
        assert torch.equal(found[0, place], every[order])
        assert torch.allclose(distances[0, place], expected[order], atol=1e-6)


def test_neighbours_of_a_token_of_the_published_size():
    quantizer = ScalarQuantizer(16)
    indices = torch.randint(64, (2, 3, 16))
    indices[0, 0] = -1
    found, distances = quantizer.neighbour_distances(indices, 20)
    assert (found[0, 0] == -1).all() and (distances[0, 0] == 0).all()
    assert torch.equal(found[:, :, 0], indices) and (distances.diff() >= 0).all()
    apart = (quantizer.decode(found[1]) - quantizer.decode(indices[1]).unsqueeze(1)).square().sum(-1)
    assert torch.allclose(apart, distances[1], rtol=1e-4)
    with pytest.raises(ValueError, match="number of codes, 4; got 5"):
        ScalarQuantizer(2, 1).neighbours(torch.zeros(1, 1, 2, dtype=torch.int64), 5)


# ---- bad arguments, published numbers


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"dim": 0}, "dim must be positive; got 0"),
        ({"dim": 2, "bits": 0}, "between 1 and 16; got 0"),
        ({"dim": 2, "bits": 17}, "between 1 and 16; got 17"),
        ({"dim": 2, "bits": 10}, r"above 3.097, where the outermost of 2\^10 bins begins; got 3.0"),
        ({"dim": 2, "bits": 1, "std_range": 0.0}, "std_range must be finite and above 0.000"),
        ({"dim": 2, "low": 5.0, "high": 5.0}, "low must lie below high"),
        ({"dim": 2, "low": [0.0]}, r"low must be a finite number, or one per channel \(2\)"),
        ({"dim": 2, "high": float("inf")}, "high must be a finite number"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScalarQuantizer(**arguments)


# The original computes the 8-bit values in float32 and differs from float64 by 5.0e-5, that is 1.07e-5 of the largest.
@pytest.mark.parametrize("bits,tolerance", [(1, 1e-5), (3, 1e-5), (6, 1e-5), (8, 1.1e-5)])
def test_fixture(bits, tolerance):
    config, _, io = parity.fixture("tokenbridge-ptq")
    suffix = "" if bits == config["bits"] else f"_bits{bits}"
    quantizer = ScalarQuantizer(16, bits, config["min_range"], config["max_range"], config["std_range"])
    result = quantizer(parity.channel_last(io["latents"]))
    assert torch.equal(result.indices, parity.channel_last(io["indices" + suffix]))
    parity.assert_close(result.quantized, parity.channel_last(io["quantized" + suffix]), tolerance)
    if not suffix:
        parity.assert_close(normal_bins(bits)[0].float(), io["boundaries"], 1e-6)
        every = torch.arange(64).view(-1, 1, 1).expand(-1, 1, 16)
        parity.assert_close(quantizer.decode(every)[:, 0, 0], io["levels"])
