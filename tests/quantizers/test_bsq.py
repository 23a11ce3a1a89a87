"""Binary spherical quantization: fixture, unit codes, gradients, packing."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.bsq import BinarySphericalQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

BITS = 12
# "analytical" is a way of computing the sample entropy, and groups of one bit for the batch entropy.
VARIANTS = {
    "": {"entropy_group": 6},
    "__group": {"entropy_group": 6},
    "__analytical": {"entropy_group": 1},
    "__g1": {"entropy_group": 1},
    "__temp": {"entropy_group": 6, "temperature": 1 / 20},
    "__nol2": {"entropy_group": 6},
}


def published(variant, **arguments):
    """The published quantizer leaves the normalisation to the encoder."""
    arguments = {"entropy_eps": 1e-8, **VARIANTS[variant], **arguments}
    if variant == "__nol2":
        return LookupFreeQuantizer(BITS, temperature=1.0, bit_order="most_significant_first", **arguments)
    return BinarySphericalQuantizer(BITS, l2_normalize=False, **arguments)


def published_loss(quantizer, result, beta=0.25):
    return quantizer.temperature * result.losses["entropy"] + beta * BITS * result.losses["commitment"]


def latents(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_equals_the_published_code(variant):
    _, _, io = parity.fixture("bsq-quantizer")
    quantizer = published(variant)
    z = parity.channel_last(io["latents"]).clone().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices[..., 0], io["indices"])
    parity.assert_close(result.quantized, parity.channel_last(io["quantized" + variant]), 1e-7)
    parity.assert_close(result.statistics["sample_entropy"], io["per_sample_entropy" + variant])
    parity.assert_close(result.statistics["batch_entropy"], io["codebook_entropy" + variant])
    loss = published_loss(quantizer, result)
    parity.assert_close(loss, io["loss" + variant])
    gradient = torch.autograd.grad(loss, z)[0]
    parity.assert_close(gradient, parity.channel_last(io["grad_latents_loss" + variant]), 1e-6)


def test_normalising_inside_equals_normalising_in_the_encoder():
    _, _, io = parity.fixture("bsq-quantizer")
    raw = 3 * parity.channel_last(io["latents"]).double() * (1 + torch.rand(2, 4, 4, 1, dtype=torch.float64))
    raw.requires_grad_()
    inside = BinarySphericalQuantizer(BITS, entropy_group=6)
    outside = BinarySphericalQuantizer(BITS, entropy_group=6, l2_normalize=False)
    results = inside(raw), outside(F.normalize(raw, dim=-1))
    assert torch.equal(results[0].indices[..., 0], io["indices"])
    upstream = parity.channel_last(io["upstream"])
    totals = [(result.quantized * upstream).sum() + published_loss(inside, result) for result in results]
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(total, raw)[0] for total in totals]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert (gradients[0] * raw).sum(-1).abs().max() < 1e-12


def test_groups_of_bits_have_the_published_indices_and_look_up():
    _, _, io = parity.fixture("bsq-quantizer")
    z = parity.channel_last(io["latents"])
    for bits, name in ((6, "group_indices"), (1, "group_indices__g1")):
        quantizer = published("", subcode_bits=bits)
        indices = quantizer.encode(z)
        assert torch.equal(indices, io[name]) and quantizer.codebook_sizes == (2**bits,) * (BITS // bits)
        codes = quantizer.decode(indices).flatten(1, 2)
        parity.assert_close(codes, io["quantized_from_group_indices"], 1e-7)
    parity.assert_close(codes, io["quantized_from_indices"], 1e-7)


@pytest.mark.parametrize("scaled", [False, True])
def test_straight_through_gradient_is_the_identity_or_the_published_scale(scaled):
    _, _, io = parity.fixture("bsq-quantizer")
    quantizer = BinarySphericalQuantizer(BITS, l2_normalize=False, scaled_gradient=scaled)
    z, g = parity.channel_last(io["latents"]).clone().requires_grad_(), parity.channel_last(io["upstream"])
    result = quantizer(z)
    (result.quantized * g).sum().backward()
    if scaled:
        parity.assert_close(z.grad, parity.channel_last(io["grad_latents_ste"]), 1e-7)
        torch.testing.assert_close(z.grad, g / math.sqrt(BITS))
    else:
        assert torch.equal(z.grad, g)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)


def test_default_weights_restore_the_published_objective():
    _, _, io = parity.fixture("bsq-quantizer")
    for variant in ("", "__temp"):
        quantizer = published(variant)
        result = quantizer(parity.channel_last(io["latents"]))
        assert set(result.losses) == set(quantizer.default_loss_weights)
        total = sum(quantizer.default_loss_weights[name] * loss for name, loss in result.losses.items())
        parity.assert_close(total, 0.1 * io["loss" + variant], 1e-6)


def test_codes_have_unit_length_and_latents_no_scale():
    quantizer, z = BinarySphericalQuantizer(7).double(), latents(2, 9, 7)
    result = quantizer(z)
    assert torch.allclose(result.quantized.norm(dim=-1), torch.ones(2, 9, dtype=torch.float64), atol=1e-14)
    assert torch.equal(result.quantized > 0, z > 0)
    for name, loss in quantizer(100 * z).losses.items():
        torch.testing.assert_close(loss, result.losses[name], rtol=1e-12, atol=0)
    # On the sphere no latent is further from its code than sqrt(2 - 2 / sqrt(D)), the published bound.
    assert (result.latents - result.quantized).norm(dim=-1).max() < math.sqrt(2 - 2 / math.sqrt(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_bits_are_packed_in_integers(dtype):
    """Packed in floats, 18 bits go wrong in bfloat16 and 36 bits in float32."""
    for bits in (18, 36, 62):
        z = latents(1, 50, bits, dtype=dtype)
        indices = BinarySphericalQuantizer(bits, entropy_group=1).encode(z)
        expected = [int("".join("1" if x > 0 else "0" for x in row), 2) for row in z[0].tolist()]
        assert indices.flatten().tolist() == expected


def test_sum_of_group_entropies_bounds_the_joint_entropy():
    z = latents(4, 16, 12)
    entropies = [
        BinarySphericalQuantizer(12, temperature=0.05, entropy_group=group)(z).statistics["batch_entropy"]
        for group in (None, 6, 1)
    ]
    assert entropies[0] < entropies[1] < entropies[2] <= 12 * math.log(2)


def test_neighbours_have_the_distance_of_their_codes():
    quantizer = BinarySphericalQuantizer(36, entropy_group=9)
    indices = quantizer.encode(latents(1, 4, 36))
    found, squared = quantizer.neighbour_distances(indices, 300)
    codes, own = quantizer.decode(found).double(), quantizer.decode(indices).double().unsqueeze(2)
    torch.testing.assert_close((codes - own).square().sum(-1), squared.double(), rtol=1e-5, atol=1e-7)
    assert (squared.diff(dim=-1) >= 0).all()


def test_a_mask_equals_truncation_whatever_the_padding_holds():
    quantizer, z = BinarySphericalQuantizer(6, entropy_group=3), latents(2, 6, 6)
    z[:, 4], z[:, 5] = math.nan, 1e4
    mask = torch.arange(6).expand(2, 6) < 4
    padded, short = z.clone().requires_grad_(), z[:, :4].clone().requires_grad_()
    masked, truncated = quantizer(padded, mask), quantizer(short)
    assert torch.equal(masked.indices[:, :4], truncated.indices) and (masked.indices[:, 4:] == -1).all()
    for result in (masked, truncated):
        (sum(result.losses.values()) + result.quantized.sum()).backward()
    torch.testing.assert_close(padded.grad[:, :4], short.grad, rtol=1e-11, atol=1e-15)
    assert (padded.grad[:, 4:] == 0).all()
    nothing = quantizer(padded, torch.zeros_like(mask))
    assert all(loss == 0 for loss in nothing.losses.values())
