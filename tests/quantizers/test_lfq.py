"""Lookup-free quantization: fixture, closed forms, masks, ranks, and neighbours against brute force."""

import copy
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import torch

from vistok.layers.configurable import build
from vistok.quantizers.lfq import LookupFreeQuantizer


def _load(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity, ranks = _load("parity"), _load("ranks")
BOTH = pytest.mark.parametrize("l2_normalize", [False, True])


def latents(*shape, dtype=torch.float64, seed=1, scale=0.02):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def all_codes(quantizer):
    return quantizer.decode(torch.arange(quantizer.codebook_sizes[0]).view(1, -1, 1))[0]  # (2^D, D)


# ---- published numbers


@pytest.mark.parametrize("size", ["", "_wide"])
def test_equals_open_magvit2(size):
    config, _, io = parity.fixture("openmagvit2-lfq")
    quantizer = LookupFreeQuantizer(config["dim"], entropy_eps=1e-5)
    z = parity.channel_last(io["latents" + size]).clone().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io["indices" + size])
    assert torch.equal(result.quantized, parity.channel_last(io["quantized" + size]))
    assert torch.equal(quantizer.decode(io["indices"].view(2, 4, 5, 1)), parity.channel_last(io["entry_full"]))
    assert torch.equal(all_codes(quantizer)[:64], io["codebook_first_64"])
    parity.assert_close(result.statistics["sample_entropy"], io["per_sample_entropy" + size])
    parity.assert_close(result.statistics["batch_entropy"], io["codebook_entropy" + size])
    parity.assert_close(result.losses["entropy"], io["entropy_aux_loss" + size])
    parity.assert_close(result.losses["commitment"], io["commit_loss" + size])
    ste = (result.quantized * parity.channel_last(io["upstream"])).sum()
    for name, value in (("entropy", result.losses["entropy"]), ("commit", result.losses["commitment"]), ("ste", ste)):
        gradient = torch.autograd.grad(value, z, retain_graph=True)[0]
        # The published float32 gradient is 2.5e-5 off its own float64 value where bits are certain.
        tolerance = 3e-5 if (name, size) == ("entropy", "_wide") else 1e-5
        parity.assert_close(gradient, parity.channel_last(io[f"grad_latents__{name}{size}"]), tolerance)


def test_equals_the_softmax_of_lucidrains_with_the_other_bit_order():
    peer = pytest.importorskip("vector_quantize_pytorch").LFQ(
        codebook_size=64, dim=6, commitment_loss_weight=1.0, codebook_scale=0.5, spherical=True
    )
    quantizer = LookupFreeQuantizer(6, scale=0.5, l2_normalize=True, bit_order="most_significant_first")
    z = latents(2, 30, 6, dtype=torch.float32).requires_grad_()
    result = quantizer(z)
    (expected, indices, _), losses = peer(z, return_loss_breakdown=True)
    assert torch.equal(result.indices[..., 0], indices)
    torch.testing.assert_close(result.quantized, expected)
    torch.testing.assert_close(result.losses["commitment"], losses.commitment)
    torch.testing.assert_close(result.statistics["sample_entropy"], losses.per_sample_entropy, atol=1e-4, rtol=1e-4)
    upstream = latents(2, 30, 6, dtype=torch.float32, seed=3)
    gradients = [torch.autograd.grad((value * upstream).sum(), z)[0] for value in (result.quantized, expected)]
    torch.testing.assert_close(*gradients)


def test_zero_becomes_minus_one():
    quantizer = LookupFreeQuantizer(3)
    result = quantizer(torch.tensor([[[0.0, -0.0, 1e-45]]]))
    assert result.quantized.tolist() == [[[-1, -1, 1]]] and result.indices.item() == 4


# ---- codes and gradients


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_is_bit_equal_to_forward_and_encode_gives_its_indices(l2_normalize, dtype):
    quantizer = LookupFreeQuantizer(7, scale=0.3, l2_normalize=l2_normalize).eval()
    z = latents(2, 3, 4, 7, dtype=dtype)
    result = quantizer(z)
    assert result.quantized.shape == (2, 3, 4, 7) and result.indices.shape == (2, 3, 4, 1)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.encode(z), result.indices)
    assert torch.equal(quantizer.decode(result.indices) > 0, z > 0)


def test_double_modules_decode_in_double():
    quantizer = LookupFreeQuantizer(7, scale=0.3).double().eval()
    result = quantizer(latents(1, 5, 7))
    assert torch.equal(quantizer.decode(result.indices), result.quantized) and result.quantized.dtype == torch.float64
    assert not quantizer.state_dict()


def test_straight_through_is_the_identity():
    z, g = latents(2, 7, 5, dtype=torch.bfloat16).requires_grad_(), latents(2, 7, 5, seed=3, dtype=torch.bfloat16)
    (LookupFreeQuantizer(5)(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g)


def test_normalised_latents_have_no_radial_gradient_and_no_scale():
    quantizer, z, g = LookupFreeQuantizer(5, l2_normalize=True), latents(2, 7, 5), latents(2, 7, 5, seed=3)
    small, large = (quantizer(factor * z) for factor in (1e-2, 1e2))
    for name in small.losses:
        torch.testing.assert_close(small.losses[name], large.losses[name], rtol=1e-9, atol=0)
    z.requires_grad_()
    result = quantizer(z)
    assert torch.allclose(result.quantized.norm(dim=-1), torch.ones(2, 7, dtype=torch.float64), atol=1e-12)
    total = (result.quantized * g).sum() + sum(result.losses.values())
    gradient = torch.autograd.grad(total, z)[0]
    assert gradient.norm() > 0.1 and (gradient * z).sum(-1).abs().max() < 1e-12


def test_entropy_gradients_equal_closed_forms():
    """Sample: -l s(1 - s) dl/dz / n. Both: the softmax over all codes that the loss is defined by."""
    quantizer = LookupFreeQuantizer(5, scale=0.7, temperature=0.05, batch_entropy_weight=0.5)
    z = latents(3, 8, 5).requires_grad_()
    result = quantizer(z)
    log_p = (2 * z.flatten(0, 1) @ all_codes(quantizer).double().T / 0.05).log_softmax(1)
    mean = log_p.exp().mean(0)
    sample, batch = -(log_p.exp() * log_p).sum(1).mean(), -(mean * mean.log()).sum()
    expected = sample - 0.5 * batch
    torch.testing.assert_close(result.losses["entropy"], expected, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (result.losses["entropy"], expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)
    only_sample = LookupFreeQuantizer(5, scale=0.7, temperature=0.05, batch_entropy_weight=0.0)(z).losses["entropy"]
    slope = 4 * 0.7 / 0.05
    s = torch.sigmoid(slope * z)
    torch.testing.assert_close(torch.autograd.grad(only_sample, z)[0], -slope * slope * z * s * (1 - s) / 24)


def test_commitment_gradient_equals_closed_form_with_a_mask():
    quantizer, z = LookupFreeQuantizer(5, scale=0.7), latents(2, 6, 5).requires_grad_()
    mask = torch.arange(6).expand(2, 6) < 4
    result = quantizer(z, mask)
    gradient = torch.autograd.grad(result.losses["commitment"], z)[0]
    expected = 2 * (z - 0.7 * z.sign()) / (8 * 5) * mask.unsqueeze(-1)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_training_and_evaluation_return_the_same_losses():
    quantizer, z = LookupFreeQuantizer(4), latents(1, 9, 4)
    trained, evaluated = quantizer(z), quantizer.eval()(z)
    assert set(trained.losses) == set(quantizer.default_loss_weights) == {"entropy", "commitment"}
    assert all(torch.equal(trained.losses[name], evaluated.losses[name]) for name in trained.losses)
    assert set(trained.statistics) == {"counts", "sample_entropy", "batch_entropy"}


# ---- precision


def test_result_is_the_same_under_autocast():
    quantizer, z = LookupFreeQuantizer(6), latents(2, 50, 6, dtype=torch.float32).requires_grad_()
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, encoded = quantizer(z), quantizer.encode(z)
    assert torch.equal(plain.indices, mixed.indices) and torch.equal(plain.indices, encoded)
    gradients = [torch.autograd.grad(sum(result.losses.values()), z)[0] for result in (plain, mixed)]
    assert torch.equal(*gradients) and plain.losses["entropy"].dtype == torch.float32


def test_half_precision_latents_lose_nothing_but_their_own_rounding():
    z = latents(2, 50, 6, dtype=torch.bfloat16)
    low, high = z.clone().requires_grad_(), z.double().requires_grad_()
    quantizer = LookupFreeQuantizer(6).bfloat16()
    results = [quantizer(low), quantizer(high)]
    assert torch.equal(results[0].indices, results[1].indices)
    gradients = [
        torch.autograd.grad(r.losses["entropy"], x)[0].double() for r, x in zip(results, (low, high), strict=True)
    ]
    assert (gradients[0] - gradients[1]).norm() < 3e-3 * gradients[1].norm()  # bfloat16 has 8 bits


# ---- masks and bad latents


@BOTH
def test_a_mask_equals_truncation_whatever_the_padding_holds(l2_normalize):
    quantizer, g = LookupFreeQuantizer(5, l2_normalize=l2_normalize), latents(2, 6, 5, seed=3)
    z = latents(2, 6, 5)
    z[:, 4], z[:, 5] = math.nan, 1e4
    mask = torch.arange(6).expand(2, 6) < 4
    padded, short = z.clone().requires_grad_(), z[:, :4].clone().requires_grad_()
    masked, truncated = quantizer(padded, mask), quantizer(short)
    assert torch.equal(masked.indices[:, :4], truncated.indices) and (masked.indices[:, 4:] == -1).all()
    assert torch.equal(masked.quantized[:, :4], truncated.quantized) and (masked.quantized[:, 4:] == 0).all()
    assert torch.equal(quantizer.encode(z, mask), masked.indices)
    assert torch.equal(quantizer.decode(masked.indices), masked.quantized.float())
    for ours, expected in ((masked.losses, truncated.losses), (masked.statistics, truncated.statistics)):
        assert all(torch.allclose(ours[name], expected[name], rtol=1e-12) for name in expected)
    for result, weight in ((masked, g), (truncated, g[:, :4])):
        (sum(result.losses.values()) + (result.quantized * weight).sum()).backward()
    torch.testing.assert_close(padded.grad[:, :4], short.grad, rtol=1e-11, atol=1e-15)
    assert (padded.grad[:, 4:] == 0).all()


def test_an_empty_mask_gives_zero_losses_and_gradients():
    quantizer, z = LookupFreeQuantizer(5), torch.full((2, 3, 5), math.nan, requires_grad=True)
    result = quantizer(z, torch.zeros(2, 3, dtype=torch.bool))
    (sum(result.losses.values()) + result.quantized.sum()).backward()
    assert all(loss == 0 for loss in result.losses.values()) and (z.grad == 0).all()
    assert (result.indices == -1).all() and result.statistics["counts"].sum() == 0


def test_a_latent_that_is_not_finite_shows_in_the_losses_and_not_in_the_counts():
    quantizer, z = LookupFreeQuantizer(3), latents(1, 4, 3)
    for bad in (math.nan, math.inf):
        z[0, 1, 2] = bad
        result = quantizer(z)
        assert all(not loss.isfinite() for loss in result.losses.values())
        assert result.statistics["counts"].sum() == 3 and 0 <= result.indices.min() <= result.indices.max() < 8


def test_counts_count_the_codes_used():
    result = LookupFreeQuantizer(4)(latents(3, 40, 4))
    assert torch.equal(result.statistics["counts"], torch.bincount(result.indices.flatten(), minlength=16))
    large = LookupFreeQuantizer(22, entropy_group=11)(latents(1, 4, 22))
    assert "counts" not in large.statistics and large.indices.max() > 2**16


# ---- neighbours


def brute_force(quantizer, indices, k):
    codes = all_codes(quantizer)
    distances = torch.cdist(codes[indices.flatten()].double(), codes.double()).square().mul(1e6).round()
    order = distances.sort(dim=1, stable=True)
    return order.indices[:, :k], order.values[:, :k] / 1e6


@pytest.mark.parametrize("order", ["least_significant_first", "most_significant_first"])
def test_neighbours_equal_brute_force(order):
    quantizer = LookupFreeQuantizer(7, scale=0.5, bit_order=order)
    indices = torch.tensor([[[0], [127], [85]], [[3], [64], [99]]])
    for k in (1, 2, 8, 20, 128):
        found, distances = quantizer.neighbour_distances(indices, k)
        expected, squared = brute_force(quantizer, indices, k)
        assert found.shape == (2, 3, k, 1) and torch.equal(found.view(6, k), expected)
        torch.testing.assert_close(distances.view(6, k).double(), squared)
    for k in (0, 129):
        with pytest.raises(ValueError, match=f"between 1 and the number of codes, 128; got {k}"):
            quantizer.neighbours(indices, k)


def test_neighbours_of_a_dropped_token_are_dropped():
    found, distances = LookupFreeQuantizer(5).neighbour_distances(torch.tensor([[[-1], [3]]]), 4)
    assert (found[0, 0] == -1).all() and (distances[0, 0] == 0).all() and found[0, 1, 0] == 3


@pytest.mark.parametrize("subcode_bits,dim", [(None, 36), (None, 62), (16, 80), (1, 64)])
def test_neighbours_without_listing_the_codes(subcode_bits, dim, monkeypatch):
    monkeypatch.setattr("vistok.quantizers.binary.NEIGHBOUR_BLOCK", 1000)
    quantizer = LookupFreeQuantizer(dim, entropy_group=1, subcode_bits=subcode_bits)
    indices = quantizer.encode(latents(2, 3, dim))
    k = 1 + dim + 200
    found, squared = quantizer.neighbour_distances(indices, k)
    bits = quantizer.decode(found) > 0  # (2, 3, k, dim)
    different = (bits ^ (quantizer.decode(indices) > 0).unsqueeze(2)).sum(-1)
    expected = torch.cat([torch.zeros(1), torch.ones(dim), torch.full((200,), 2.0)])
    assert torch.equal(different, expected.long().expand(2, 3, k)) and torch.equal(squared, 4.0 * different)
    rows = [[tuple(code) for code in token] for token in found.view(6, k, -1).tolist()]
    for token in rows:
        assert len(set(token)) == k
        assert token[1 : dim + 1] == sorted(token[1 : dim + 1]) and token[dim + 1 :] == sorted(token[dim + 1 :])
    own = [int("".join(str(int(b)) for b in reversed(row)), 2) for row in (quantizer.decode(indices) > 0).view(6, -1)]
    if subcode_bits is None:  # the 200 smallest of all codes two bits away, in Python's integers
        for value, token in zip(own, rows, strict=True):
            pairs = sorted(value ^ (1 << i) ^ (1 << j) for i in range(dim) for j in range(i))
            assert [code for (code,) in token[dim + 1 :]] == pairs[:200]


# ---- sub-codes, construction, copies


def test_sub_codes_are_the_bits_of_one_index():
    z = latents(2, 5, 12)
    one, three = LookupFreeQuantizer(12), LookupFreeQuantizer(12, subcode_bits=4)
    indices = three.encode(z)
    assert three.codebook_sizes == (16,) * 3 and three.bits == one.bits == 12
    assert torch.equal((indices << torch.tensor([0, 4, 8])).sum(-1, keepdim=True), one.encode(z))
    indices[0, 0, 1] = -1
    assert (three.decode(indices)[0, 0] == 0).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_impossible_settings_are_refused():
    for arguments, message in (
        ({"dim": 0}, "dim must be positive"),
        ({"dim": 10, "subcode_bits": 4}, "subcode_bits divide it; got 10 and 4"),
        ({"dim": 64, "entropy_group": 8}, "at most 62 bits; got 64.*subcode_bits.*Grouped"),
        ({"dim": 36}, "set entropy_group to a divisor of 36"),
        ({"dim": 9, "entropy_group": 2}, "divide the number of bits, 9; got 2"),
        ({"dim": 4, "scale": 0.0}, "scale and temperature must be positive"),
        ({"dim": 4, "temperature": -1.0}, "scale and temperature must be positive; got 1.0 and -1.0"),
        ({"dim": 4, "batch_entropy_weight": -1.0}, "must not be negative; got -1.0"),
        ({"dim": 4, "bit_order": "big"}, "bit order must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            LookupFreeQuantizer(**arguments)


def test_copies_and_its_configuration_give_the_same_module():
    quantizer, z = LookupFreeQuantizer(6, scale=0.5, entropy_group=3), latents(1, 8, 6)
    expected = quantizer(z)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), build(quantizer.config)):
        actual = other(z)
        assert torch.equal(actual.indices, expected.indices)
        assert torch.equal(actual.losses["entropy"], expected.losses["entropy"])


def test_training_forward_compiles_without_a_graph_break():
    quantizer = LookupFreeQuantizer(6, l2_normalize=True)

    def step(z):
        result = quantizer(z, torch.arange(10).expand(z.shape[:2]) < 7)
        return sum(result.losses.values()) + result.quantized.square().sum(), result.indices

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        z = latents(batch, 10, 6, dtype=torch.float32).requires_grad_()
        (value, indices), (expected, wanted) = compiled(z), step(z)
        assert torch.equal(indices, wanted)
        torch.testing.assert_close(torch.autograd.grad(value, z)[0], torch.autograd.grad(expected, z)[0])


# ---- ranks

TWO_RANKS = """
from vistok.quantizers.bsq import BinarySphericalQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer

def build():
    return LookupFreeQuantizer(6), BinarySphericalQuantizer(6, temperature=0.1, entropy_group=2)

def work(built, rank, world):
    data = 0.02 * torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = slice(0, 20) if world == 1 else (slice(0, 13), slice(13, 20))[rank]
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, 11] = mask[:, 15] = False
    out = []
    for quantizer in built:
        for shift in (0, 1):
            z = (data + 0.01 * shift)[:, rows].clone().requires_grad_()
            keep = mask[:, rows] if shift else None
            result = quantizer(z, keep)
            result.losses["entropy"].backward()
            out.append((result.losses["entropy"].detach(), result.statistics["batch_entropy"], z.grad / world))
        # No rank may wait for another one in evaluation.
        local = quantizer.eval()(z[:, : 3 + rank]).losses["entropy"].detach()
        quantizer.train()
        with torch.no_grad():
            assert torch.equal(quantizer(z[:, : 3 + rank]).losses["entropy"], local)
        if rank == 0:
            assert quantizer.eval()(z).losses["entropy"].isfinite()
    # A rank without a single kept token takes part.
    quantizer.train()
    z = data[:, rows].clone().requires_grad_()
    keep = torch.full(z.shape[:2], rank == 0)
    quantizer(z, keep).losses["entropy"].backward()
    out.append((keep.sum(), torch.tensor(0.0), z.grad / world))
    return out
"""


def test_entropy_of_two_ranks_equals_one_process(tmp_path):
    """Value and averaged gradient, with different numbers of tokens, and modules built before the process group."""
    namespace = {"torch": torch}
    exec(TWO_RANKS, namespace)
    single = namespace["work"](namespace["build"](), 0, 1)
    first, second = ranks.run_ranks(tmp_path, TWO_RANKS, 2)
    for one, two, expected in zip(first[:-1], second[:-1], single[:-1], strict=True):
        for part in (one, two):
            torch.testing.assert_close(part[:2], expected[:2], rtol=1e-12, atol=0)
        # Every loss is averaged over ranks by data-parallel training: the gradients add up to one process's.
        torch.testing.assert_close(torch.cat([one[2], two[2]], 1), expected[2], rtol=1e-9, atol=1e-14)
    assert first[-1][2].abs().sum() > 0 and (second[-1][2] == 0).all()
