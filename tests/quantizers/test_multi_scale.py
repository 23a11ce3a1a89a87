"""Multi-scale residual quantization against the originals' numbers, and its parts written out one scale at a time."""

import copy
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vistok.layers.configurable import build
from vistok.quantizers.base import IndexBlock
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import DirectionVectorQuantizer, MultiScaleResidual, _phi_of_scale
from vistok.quantizers.product import Product
from vistok.quantizers.shared_index import SharedIndex
from vistok.quantizers.vq import VectorQuantizer


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity, ranks = helper("parity"), helper("ranks")
SCALES, CODES, DIM = (1, 2, 3, 5), 16, 4
TOKENS = sum(side**2 for side in SCALES)


def make(quantizer=None, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    options = {"scales": SCALES, "phi_sharing": 2} | options
    quantizer = MultiScaleResidual(quantizer or VectorQuantizer(CODES, DIM), **options).to(dtype)
    with torch.no_grad():
        for name, tensor in [*quantizer.named_parameters(), *quantizer.named_buffers()]:
            if "codebook" in name:
                tensor.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
            if name.endswith("sums"):  # of an untouched moving average
                tensor.copy_(quantizer.get_submodule(name[: -len(".sums")]).codebook / CODES)
    return quantizer


def latents(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(quantizer, z):
    """Indices and what each scale adds, for a vector quantizer, one scale at a time and by listing all distances."""
    rest, indices, parts = z.detach().movedim(-1, 1), [], []
    (codes,) = quantizer.quantizers
    for scale, side in enumerate(SCALES):
        last = scale == len(SCALES) - 1
        tokens = rest if last else F.adaptive_avg_pool2d(rest, side)
        found = (tokens.movedim(1, -1).unsqueeze(-2) - codes.codebook.detach()).square().sum(-1).argmin(-1)
        h = codes.codebook[found].movedim(-1, 1)
        if not last:
            h = F.interpolate(h, size=(SCALES[-1],) * 2, mode="bicubic", align_corners=False)
        if quantizer.phi is not None:
            phi = quantizer.phi[quantizer._phi_of_scale[scale]]
            h = (1 - phi.ratio) * h + phi.ratio * phi.convolution(h)
        rest = rest - h.detach()
        indices.append(found.flatten(1))
        parts.append(h.movedim(1, -1))
    return torch.cat(indices, 1).unsqueeze(-1), parts


# ---- originals


def imagefolder_weights(branch, weights, number):
    """Load one branch of an ImageFolder fixture."""
    for i, phi in enumerate(branch.phi):
        for name in ("weight", "bias"):
            getattr(phi.convolution, name).data.copy_(weights[f"quantizes.{number}.quant_resi.qresi_ls.{i}.{name}"])
    if isinstance(branch.quantizers[0], VectorQuantizer):
        branch.quantizers[0].codebook.data.copy_(weights[f"quantizes.{number}.embedding.weight"])


def imagefolder(name, make_branch):
    config, weights, io = parity.fixture(name)
    side = config["v_patch_nums"][-1]
    branches = [make_branch(config) for _ in range(config["product_quant"])]
    for number, branch in enumerate(branches):
        imagefolder_weights(branch, weights, number)
        branch._draw_scales = lambda batch, device, generator: io["dropout_scales"]
    quantizer = Product(branches, lengths=[(side, side)] * len(branches))
    z = io["latents"].squeeze(-1).movedim(1, -1).requires_grad_()  # (B, 2 * side^2, C)
    return quantizer, z, io, side


def as_maps(quantized, side):
    """``(B, 2 * side^2, C)`` -> ``(B, 2 C, side, side)``, the branches after one another, as ImageFolder has them."""
    return torch.cat([part.unflatten(1, (side, side)).movedim(-1, 1) for part in quantized.chunk(2, 1)], 1)


def as_latents(gradient):
    """Gradient ``(B, N, C)`` in the fixture's layout ``(B, C, N, 1)``."""
    return gradient.movedim(-1, 1).unsqueeze(-1)


def check_phi_gradients(quantizer, io):
    for number, branch in enumerate(quantizer.branches):
        for i, phi in enumerate(branch.phi):
            for name in ("weight", "bias"):
                expected = io[f"grad_vq_loss/quantizes.{number}.quant_resi.qresi_ls.{i}.{name}"]
                parity.assert_close(getattr(phi.convolution, name).grad, expected)


def check_scales(quantizer, indices, io):
    """Indices of both branches, and the sum after every scale."""
    columns = [indices[:, : indices.shape[1] // 2, 0], indices[:, indices.shape[1] // 2 :, 1]]
    for number, (branch, own) in enumerate(zip(quantizer.branches, columns, strict=True)):
        assert torch.equal(own, io[f"indices_branch{number}"])
        stop = 0
        for scale, shape in enumerate(branch.scales):
            stop += shape[0] * shape[1]
            total = branch.decode(own[:, :stop].unsqueeze(-1))
            parity.assert_close(total.movedim(-1, 1), io[f"quantized_per_scale_branch{number}"][scale])


def vector_branch(config):
    return MultiScaleResidual(
        DirectionVectorQuantizer(config["codebook_size"], config["codebook_embed_dim"]),
        config["v_patch_nums"],
        phi_sharing=config["share_quant_resi"],
        dropout=config["codebook_drop"],
        dropout_start=config["start_drop"],
        dropout_leading=True,
    )


def test_vector_quantizer_of_imagefolder():
    quantizer, z, io, side = imagefolder("imagefolder-msvq", vector_branch)
    num_scales = len(quantizer.branches[0].scales)
    quantizer.eval()
    result = quantizer(z)
    check_scales(quantizer, quantizer.encode(z), io)
    parity.assert_close(as_maps(result.quantized, side), io["quantized__eval"])
    parity.assert_close(result.losses["codebook"], io["vq_loss__eval"])
    # The original multiplies by beta = 0.25 and does not divide by the number of scales.
    parity.assert_close(0.25 * num_scales * result.losses["commitment"], io["commit_loss__eval"])

    result = quantizer.train()(z)
    parity.assert_close(as_maps(result.quantized, side), io["quantized__train"])
    parity.assert_close(result.losses["codebook"], io["vq_loss__train"])
    commitment = 0.25 * num_scales * result.losses["commitment"]
    parity.assert_close(commitment, io["commit_loss__train"])
    for loss, name in (
        (commitment, "vq_none_commit"),
        ((as_maps(result.quantized, side) * io["upstream"]).sum(), "ste"),
    ):
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        parity.assert_close(as_latents(gradient), io[f"grad_latents__{name}"])
    result.losses["codebook"].backward()
    check_phi_gradients(quantizer, io)
    for number, branch in enumerate(quantizer.branches):
        expected = io[f"grad_vq_loss/quantizes.{number}.embedding.weight"]
        parity.assert_close(branch.quantizers[0].codebook.grad, expected)


def binary_branch(config):
    dim, sides = config["codebook_embed_dim"], config["v_patch_nums"]
    levels = [
        LookupFreeQuantizer(
            dim, scale=config["scale"] ** i / dim**0.5, temperature=1.0, entropy_group=1, entropy_eps=1e-8
        )
        for i in range(len(sides))
    ]
    return MultiScaleResidual(
        levels,
        sides,
        phi_sharing=config["share_quant_resi"],
        l2_normalize=config["codebook_l2_norm"],
        dropout=config["codebook_drop"],
        dropout_leading=True,
    )


def test_binary_quantizer_of_imagefolder():
    quantizer, z, io, side = imagefolder("imagefolder-mslfq", binary_branch)
    check_scales(quantizer, quantizer.encode(z), io)
    result = quantizer.train()(z)
    parity.assert_close(as_maps(result.quantized, side), io["quantized"])
    parity.assert_close(result.losses["codebook"], io["vq_loss"])
    parity.assert_close(0.25 * result.losses["commitment"], io["commit_loss"])
    for loss, name in (
        (0.25 * result.losses["commitment"], "commit"),
        ((as_maps(result.quantized, side) * io["upstream"]).sum(), "ste"),
    ):
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        parity.assert_close(as_latents(gradient), io[f"grad_latents__{name}"])
    result.losses["codebook"].backward()
    check_phi_gradients(quantizer, io)


def test_entropy_of_imagefolder_on_the_rows_that_it_looked_at():
    """The original indexes samples with an integer mask: it sees sample 1 where it means kept, sample 0 elsewhere.

    It also looks at the residual in full resolution. Ours is an entropy of the tokens of the kept samples, so the
    original's number is put together here, from our quantizers on its rows; this fixes the meaning of its options.
    """
    quantizer, z, io, side = imagefolder("imagefolder-mslfq", binary_branch)
    result = quantizer.train()(z)
    total = 0
    columns = [result.indices[:, :30, :1], result.indices[:, 30:, 1:]]
    for branch, own, part in zip(quantizer.branches, columns, z.chunk(2, 1), strict=True):
        unit, stop = F.normalize(part, dim=-1).unflatten(1, (side, side)), 0
        before = torch.zeros_like(unit)
        for level, shape in zip(branch.quantizers, branch.scales, strict=True):
            kept = own[:, stop, 0] >= 0
            rows = (unit - before.detach())[kept.long()]
            total = total + level.assign(rows).losses["entropy"] * 0.1 / kept.float().mean() / len(branch.scales) / 2
            stop += shape[0] * shape[1]
            before = branch.decode(own[:, :stop])
    parity.assert_close(total, io["entropy_loss"])
    (gradient,) = torch.autograd.grad(total, z)
    parity.assert_close(as_latents(gradient), io["grad_latents__entropy"])


def tokenflow(config, **options):
    dims = (config["semantic_code_dim"], config["codebook_embed_dim"])
    shared = SharedIndex(config["codebook_size"], dims, entropy_temperature=0.01, entropy_eps=1e-5)
    return MultiScaleResidual(
        shared, config["scale_rq_layers"], phi_ratio=0, losses="scales", estimator="per_scale", **options
    )


def test_tokenflow():
    config, weights, io = parity.fixture("tokenflow-quantizer")
    quantizer = tokenflow(config)
    codebooks = quantizer.quantizers[0].codebooks
    codebooks[0].data.copy_(weights["quantize.embedding_vqkd.weight"])
    codebooks[1].data.copy_(weights["quantize.embedding_vqgan.weight"])
    features = [io["features_semantic"].requires_grad_(), io["features_pixel"].requires_grad_()]
    z = parity.channel_last(torch.cat(features, 1))
    result = quantizer(z)
    assert torch.equal(result.indices[..., 0], io["indices"])
    parity.assert_close(result.quantized.movedim(-1, 1), io["quantized"])
    parity.assert_close(quantizer.decode(result.indices).movedim(-1, 1), io["quantized_from_indices"])
    without_last = quantizer.decode(result.indices[:, : -(config["scale_rq_layers"][-1] ** 2)])
    parity.assert_close(without_last.movedim(-1, 1), io["quantized_from_indices_without_last_scale"])
    losses = {
        "vq": result.losses["codebook"],
        "commit": config["commit_loss_beta"] * result.losses["commitment"],
        "entropy": config["entropy_loss_ratio"] * result.losses["entropy"],
    }
    for name, loss in losses.items():
        parity.assert_close(loss, io[f"{name}_loss"])
    upstream = (result.quantized.movedim(-1, 1) * io["upstream"]).sum()
    for name, loss in (("ste", upstream), ("commit", losses["commit"])):
        for gradient, branch in zip(
            torch.autograd.grad(loss, features, retain_graph=True), ("semantic", "pixel"), strict=True
        ):
            parity.assert_close(gradient, io[f"grad_features_{branch}__{name}"])
    for gradient, branch in zip(torch.autograd.grad(losses["vq"], list(codebooks)), ("semantic", "pixel"), strict=True):
        parity.assert_close(gradient, io[f"grad_codebook_{branch}__vq"])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_scales_share_convolutions_as_in_var(count):
    low = 1 / 3 / count if count == 4 else 1 / 2 / count
    places = np.linspace(low, 1 - low, count)
    for num_scales in range(max(count, 2), 15):
        expected = tuple(int(np.argmin(np.abs(places - scale / (num_scales - 1)))) for scale in range(num_scales))
        assert _phi_of_scale(count, num_scales) == expected
        assert set(expected) == set(range(count))
        assert _phi_of_scale(None, num_scales) == tuple(range(num_scales)) == _phi_of_scale(num_scales + 1, num_scales)


# ---- codes

KINDS = {
    "vector": lambda: VectorQuantizer(CODES, DIM),
    "direction": lambda: DirectionVectorQuantizer(CODES, DIM),
    "moving averages": lambda: VectorQuantizer(CODES, DIM, codebook_update="ema"),
    "binary": lambda: LookupFreeQuantizer(DIM),
    "scalar": lambda: FiniteScalarQuantizer([5, 4, 3, 8]),
}
STYLES = {
    "running": {},
    "per scale": {"losses": "scales", "estimator": "per_scale", "phi_ratio": 0},
    "without phi": {"phi_ratio": 0},
}


@pytest.mark.parametrize("phi_ratio", [0, 0.5])
def test_codes_and_residuals_equal_the_scales_written_out(phi_ratio):
    quantizer, z = make(phi_ratio=phi_ratio), latents(2, 5, 5, DIM)
    indices, parts = by_hand(quantizer, z)
    result = quantizer(z)
    assert result.indices.shape == (2, TOKENS, 1) and torch.equal(result.indices, indices)
    torch.testing.assert_close(result.quantized, sum(parts).detach(), rtol=0, atol=1e-12)
    stop, rest = 0, z
    for scale, side in enumerate(SCALES):  # what is left of z is z minus the sum so far, at every scale
        stop += side**2
        rest = rest - parts[scale]
        torch.testing.assert_close(z - quantizer.decode(indices[:, :stop]), rest, rtol=0, atol=1e-12)


def test_the_last_scale_is_the_grid_itself_without_any_resampling():
    quantizer, z = make(phi_ratio=0).eval(), latents(2, 5, 5, DIM)
    indices = quantizer.encode(z)
    codebook, before = quantizer.quantizers[0].codebook.detach(), TOKENS - 25
    rest = (z - quantizer.decode(indices[:, :before])).flatten(1, 2)
    found = (rest.unsqueeze(-2) - codebook).square().sum(-1).argmin(-1)
    assert torch.equal(indices[:, before:, 0], found)
    indices[:, :before] = -1
    assert torch.equal(quantizer.decode(indices).flatten(1, 2), codebook[found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_encode_equal_forward_bit_for_bit(kind, style, dtype):
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    quantizer = make(KINDS[kind](), weights, **STYLES[style]).eval()
    z = latents(2, 5, 5, DIM, dtype=dtype)
    result = quantizer(z)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.encode(z), result.indices)
    assert torch.equal(quantizer(z).quantized, result.quantized)


def test_scales_that_are_missing_or_dropped_add_nothing():
    quantizer, z = make().eval(), latents(2, 5, 5, DIM)
    indices, parts = by_hand(quantizer, z)
    stop = 0
    for scale, side in enumerate(SCALES):
        stop += side**2
        cut = indices.clone()
        cut[:, stop:] = -1
        expected = sum(parts[: scale + 1]).detach()
        torch.testing.assert_close(quantizer.decode(indices[:, :stop]), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(quantizer.decode(cut), expected, rtol=0, atol=1e-12)
    assert torch.equal(quantizer.decode(torch.full_like(indices, -1)), torch.zeros_like(z))


def test_index_blocks_name_the_scales():
    quantizer = make()
    blocks = quantizer.index_blocks((5, 5))
    assert blocks[0] == IndexBlock("scale_0", (1, 1), (0, 1)) and blocks[-1] == IndexBlock("scale_3", (5, 5), (0, 1))
    assert sum(block.length for block in blocks) == TOKENS and quantizer.codebook_sizes == (CODES,)
    with pytest.raises(ValueError, match=r"\(5, 5\).*\(4, 4\)"):
        quantizer.index_blocks((4, 4))
    result = quantizer(latents(2, 5, 5, DIM))
    assert torch.equal(result.statistics["counts"], result.indices.flatten().bincount(minlength=CODES))
    statistics = make(LookupFreeQuantizer(DIM), torch.float32)(latents(2, 5, 5, DIM, dtype=torch.float32)).statistics
    assert set(statistics) == {"counts", "sample_entropy", "batch_entropy"}


def test_scales_need_not_be_square():
    quantizer = make(scales=((1, 1), (2, 3), (4, 6))).eval()
    result = quantizer(latents(2, 4, 6, DIM))
    assert result.indices.shape == (2, 1 + 6 + 24, 1)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)


def test_sequences_are_averaged_and_interpolated_along_one_axis():
    quantizer, z = make(scales=(1, 3, 7), axes=1, phi_ratio=0).eval(), latents(2, 7, DIM)
    result = quantizer(z)
    assert result.indices.shape == (2, 11, 1)
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    codebook = quantizer.quantizers[0].codebook
    first = codebook[torch.cdist(z.mean(1), codebook).argmin(1)].unsqueeze(1).expand(-1, 7, -1)
    torch.testing.assert_close(quantizer.decode(result.indices[:, :1]), first)
    cells = F.adaptive_avg_pool1d((z - first).movedim(-1, 1), 3).movedim(1, -1)
    codes = codebook[torch.cdist(cells, codebook).argmin(2)].detach()
    assert torch.equal(quantizer.quantizers[0].decode(result.indices[:, 1:4]), codes)
    places = ((torch.arange(7, dtype=torch.float64) + 0.5) * 3 / 7 - 0.5).clamp(0, 2)  # linear, cell centres aligned
    low = places.floor().long().clamp(max=1)
    share = (places - low).view(-1, 1)
    second = (1 - share) * codes[:, low] + share * codes[:, low + 1]
    torch.testing.assert_close(quantizer.decode(result.indices[:, :4]), first + second)


def test_direction_search_adds_codes_of_any_length():
    torch.manual_seed(0)
    quantizer = DirectionVectorQuantizer(CODES, DIM).double()
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(CODES, dtype=torch.float64))
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(CODES, 1) + 0.1)
    z = latents(2, 9, DIM)
    found = (F.normalize(z, dim=-1) @ F.normalize(quantizer.codebook, dim=1).T).argmax(-1)
    result = quantizer(z)
    assert torch.equal(result.indices[..., 0], found) and torch.equal(result.quantized, quantizer.codebook[found])
    assert torch.equal(quantizer.encode(3 * z), result.indices)


# ---- gradients and losses


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_sum_is_the_identity(kind):
    quantizer = make(KINDS[kind](), torch.float32)
    z, g = (
        latents(2, 5, 5, DIM, dtype=torch.float32).requires_grad_(),
        latents(2, 5, 5, DIM, dtype=torch.float32, seed=3),
    )
    (quantizer(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g)
    assert all(p.grad is None for p in quantizer.parameters())  # codes and Phi learn from the running losses only


def test_running_losses_compare_the_sum_so_far_with_the_whole_latents():
    quantizer, z = make(), latents(2, 5, 5, DIM).requires_grad_()
    result = quantizer(z)
    _, parts = by_hand(quantizer, z)
    totals = [sum(parts[: scale + 1]) for scale in range(len(SCALES))]
    expected = torch.stack([(total - z.detach()).square().mean() for total in totals]).mean()
    assert set(result.losses) == {"commitment", "codebook"} == set(quantizer.default_loss_weights)
    for loss in result.losses.values():
        torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(result.losses["commitment"], z, retain_graph=True)
    torch.testing.assert_close(gradient, sum(2 * (z - total) for total in totals).detach() / (len(SCALES) * z.numel()))
    learners = list(quantizer.parameters())
    untrained = torch.autograd.grad(result.losses["commitment"], learners, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in untrained)
    assert torch.autograd.grad(result.losses["codebook"], z, allow_unused=True, retain_graph=True) == (None,)
    ours = torch.autograd.grad(result.losses["codebook"], learners)
    theirs = torch.autograd.grad(expected, learners)
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(got, wanted)


def test_losses_of_the_quantizer_beyond_those_two_are_kept():
    quantizer = make(LookupFreeQuantizer(DIM), torch.float32)
    assert quantizer.default_loss_weights == {"entropy": 0.1, "commitment": 0.25, "codebook": 1.0}
    losses = quantizer(latents(2, 5, 5, DIM, dtype=torch.float32)).losses
    assert set(losses) == set(quantizer.default_loss_weights) == set(quantizer.eval()(latents(2, 5, 5, DIM)).losses)


def test_losses_per_scale_train_phi_through_what_follows():
    quantizer = make(losses="scales")
    z = latents(2, 5, 5, DIM).requires_grad_()
    result = quantizer(z)
    _, parts = by_hand(quantizer, z)
    assert quantizer.default_loss_weights == VectorQuantizer(4, 2).default_loss_weights
    learners = list(quantizer.phi.parameters())
    ours = torch.autograd.grad((result.quantized**2).sum(), learners, retain_graph=True)
    theirs = torch.autograd.grad((sum(parts) ** 2).sum(), learners)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)
    (result.losses["commitment"] + result.losses["codebook"]).backward()
    assert z.grad.abs().sum() > 0 and quantizer.quantizers[0].codebook.grad.abs().sum() > 0


def test_rotation_and_no_estimator():
    z, g = latents(2, 5, 5, DIM).requires_grad_(), latents(2, 5, 5, DIM, seed=3)
    result = make(estimator="rotation")(z)
    (gradient,) = torch.autograd.grad((result.quantized * g).sum(), z)
    ratio = result.quantized.detach().norm(dim=-1) / z.detach().norm(dim=-1)
    torch.testing.assert_close(gradient.norm(dim=-1), g.norm(dim=-1) * ratio)
    assert not make(estimator="none")(z).quantized.requires_grad


def test_unit_latents_are_what_the_sum_stands_for():
    quantizer, z = make(l2_normalize=True), latents(2, 5, 5, DIM).requires_grad_()
    (quantizer(z).quantized * latents(2, 5, 5, DIM, seed=3)).sum().backward()
    assert torch.equal(quantizer.encode(7 * z), quantizer.encode(z))
    assert (z.grad * z).sum(-1).abs().max() < 1e-12  # no gradient along the length


# ---- dropping scales


def test_a_sample_with_dropped_scales_equals_that_sample_with_fewer_scales():
    quantizer, z = make(dropout=0.7, dropout_start=2), latents(12, 5, 5, DIM).requires_grad_()
    result = quantizer(z, generator=torch.Generator().manual_seed(0))
    indices, parts = by_hand(quantizer, z)
    starts = [sum(side**2 for side in SCALES[:scale]) for scale in range(len(SCALES) + 1)]
    kept = sum((result.indices[:, start, 0] >= 0).long() for start in starts[:-1])
    assert set(kept.tolist()) == {2, 3, 4}
    losses = []
    for sample in range(len(z)):
        stop = starts[kept[sample]]
        assert torch.equal(result.indices[sample, :stop], indices[sample, :stop])
        assert (result.indices[sample, stop:] == -1).all()
        total = sum(part[sample] for part in parts[: kept[sample]])
        torch.testing.assert_close(result.quantized[sample], total.detach(), rtol=0, atol=1e-12)
    for scale in range(len(SCALES)):
        total = sum(parts[: scale + 1])
        losses.append((total - z.detach())[kept > scale].square().mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(result.losses["commitment"], expected)
    torch.testing.assert_close(result.losses["codebook"], expected)
    learners = list(quantizer.parameters())
    ours, theirs = torch.autograd.grad(result.losses["codebook"], learners), torch.autograd.grad(expected, learners)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)
    assert (quantizer.eval()(z).indices >= 0).all()
    torch.testing.assert_close(quantizer.decode(result.indices), result.quantized.detach(), rtol=0, atol=1e-12)


def test_a_skipped_scale_leaves_the_others_to_do_its_work():
    quantizer, z = make(skip=1.0, phi_ratio=0), latents(9, 5, 5, DIM)
    result = quantizer(z, generator=torch.Generator().manual_seed(0))
    starts = [sum(side**2 for side in SCALES[:scale]) for scale in range(len(SCALES))]
    kept = result.indices[:, starts, 0] >= 0  # (B, scales)
    assert kept[:, 0].all() and (kept.sum(1) == len(SCALES) - 1).all() and not kept[:, 1:].all(0).any()
    for sample in range(len(z)):
        (skipped,) = (~kept[sample]).nonzero()[0].tolist()
        rest = [side for scale, side in enumerate(SCALES) if scale != skipped]
        if rest[-1] == SCALES[-1]:
            fewer = make(scales=rest, phi_ratio=0)(z[sample : sample + 1])
            own = result.indices[sample]
            assert torch.equal(own[own >= 0], fewer.indices.flatten())
            torch.testing.assert_close(result.quantized[sample : sample + 1], fewer.quantized, rtol=0, atol=1e-12)


def test_the_number_of_kept_scales_is_uniform_and_leading_samples_can_be_chosen():
    quantizer = make(dropout=0.6, dropout_start=2)
    kept = quantizer._kept_scales(30000, torch.device("cpu"), torch.Generator().manual_seed(0)).sum(0)
    shares = kept.bincount(minlength=5) / len(kept)
    assert (shares - torch.tensor([0, 0, 0.2, 0.2, 0.4 + 0.2])).abs().max() < 0.015
    leading = make(dropout=0.34, dropout_leading=True)
    kept = torch.stack([leading._kept_scales(7, torch.device("cpu"), None).sum(0) for _ in range(40)])
    assert (kept[:, 2:] == len(SCALES)).all() and kept[:, :2].min() == 1


def test_a_scale_that_no_sample_keeps_leaves_finite_losses():
    quantizer = make(dropout=1.0)
    quantizer._draw_scales = lambda batch, device, generator: torch.ones(batch, dtype=torch.int64)
    result = quantizer(latents(3, 5, 5, DIM).requires_grad_())
    assert all(loss.isfinite() for loss in result.losses.values())
    sum(result.losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters())  # every parameter took part


# ---- masks and values that are not finite


@pytest.mark.parametrize("style", STYLES)
def test_dropped_positions_count_for_nothing_whatever_they_hold(style):
    mask = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False
    results = []
    for junk in (0.0, 1e4, float("nan")):
        quantizer = make(VectorQuantizer(CODES, DIM, codebook_update="ema"), **STYLES[style])
        z = latents(3, 5, 5, DIM)
        z[~mask] = junk
        z.requires_grad_()
        result = quantizer(z, mask)
        (result.quantized.square().sum() + sum(result.losses.values())).backward()
        gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
        quantizer.commit_update()
        assert (result.indices[2] == -1).all() and (result.quantized[~mask] == 0).all()
        assert torch.equal(result.indices[:, -25:, 0] == -1, ~mask.flatten(1))
        assert (z.grad[~mask] == 0).all() and (z.grad[mask] != 0).any()
        quantizer.eval()
        again = quantizer(z, mask)
        assert torch.equal(quantizer.encode(z, mask), again.indices)
        assert torch.equal(quantizer.decode(again.indices), again.quantized)
        results.append((*result.losses.values(), z.grad, *gradients, *quantizer.state_dict().values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_token_is_the_mean_of_the_kept_positions_of_its_cell():
    quantizer, z = make(scales=(1, 5)), latents(1, 5, 5, DIM)
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, :2] = True
    tokens, kept = quantizer._tokens(z, mask, 0)
    torch.testing.assert_close(tokens[0, 0, 0], z[0, :2].reshape(-1, DIM).mean(0))
    assert kept.all()


def test_whole_masked_samples_equal_a_smaller_batch():
    quantizer, z = make(), latents(3, 5, 5, DIM)
    mask = torch.ones(3, 5, 5, dtype=torch.bool)
    mask[1] = False
    result, alone = quantizer(z, mask), quantizer(z[[0, 2]])
    assert torch.equal(result.indices[[0, 2]], alone.indices)
    for name, loss in alone.losses.items():
        torch.testing.assert_close(result.losses[name], loss)
    nothing = quantizer(z * torch.nan, torch.zeros_like(mask))
    assert all(loss == 0 for loss in nothing.losses.values())


@pytest.mark.parametrize("style", STYLES)
def test_a_sample_with_a_value_that_is_not_finite_trains_nothing(style):
    for value in (torch.nan, torch.inf):
        quantizer = make(VectorQuantizer(CODES, DIM, codebook_update="ema"), **STYLES[style])
        alone = copy.deepcopy(quantizer)
        z = latents(3, 5, 5, DIM)
        z[1, 2, 3, 0] = value
        for one, batch in ((quantizer, z), (alone, z[[0, 2]])):
            result = one(batch)
            if "codebook" in result.losses and result.losses["codebook"].requires_grad:
                result.losses["codebook"].backward()
            one.commit_update()
            if one is quantizer:
                assert not result.losses["commitment"].isfinite() and result.quantized.isfinite().all()
                assert ((result.indices >= 0) & (result.indices < CODES)).all()
        for (name, ours), theirs in zip(quantizer.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
        for ours, theirs in zip(quantizer.parameters(), alone.parameters(), strict=True):
            assert ours.grad is None or torch.allclose(ours.grad, theirs.grad)


# ---- state, neighbours, arguments, precision, compilation, ranks


def test_one_moving_average_sees_the_tokens_of_all_scales():
    quantizer = make(VectorQuantizer(CODES, DIM, codebook_update="ema"), phi_ratio=0)
    alone, z = copy.deepcopy(quantizer.quantizers[0]), latents(2, 5, 5, DIM)
    _, parts = by_hand(quantizer, z)
    rest, tokens = z.movedim(-1, 1), []
    for side, part in zip(SCALES, parts, strict=True):
        tokens.append(F.adaptive_avg_pool2d(rest, side).flatten(2).movedim(1, -1).reshape(-1, DIM))
        rest = rest - part.movedim(-1, 1)
    quantizer(z)
    quantizer.commit_update()
    alone(torch.cat(tokens).unsqueeze(0))
    alone.commit_update()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(quantizer.quantizers[0].state_dict()[name], value)


def test_copies_pickles_and_state_dicts_behave_alike():
    quantizer, z = make(dropout=0.5), latents(4, 5, 5, DIM)
    quantizer(z)
    other = MultiScaleResidual(VectorQuantizer(CODES, DIM), SCALES, phi_sharing=2).double()
    other.load_state_dict(quantizer.state_dict(), strict=True)
    expected = quantizer.eval()(z)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), other.eval()):
        assert torch.equal(twin(z).quantized, expected.quantized)
    assert build(quantizer.config).config == quantizer.config
    several = MultiScaleResidual([LookupFreeQuantizer(2, scale=0.9**i) for i in range(2)], (1, 3), phi_sharing=2)
    assert build(several.config).config == several.config
    directions = MultiScaleResidual(DirectionVectorQuantizer(8, 2), (1, 3), phi_ratio=0)
    assert type(build(directions.config).quantizers[0]) is DirectionVectorQuantizer


def test_neighbours_are_those_of_each_token():
    quantizer = make()
    indices = quantizer.encode(latents(2, 5, 5, DIM))
    found, distances = quantizer.neighbour_distances(indices, 3)
    expected, far = quantizer.quantizers[0].neighbour_distances(indices, 3)
    assert found.shape == (2, TOKENS, 3, 1) and torch.equal(found, expected) and torch.equal(distances, far)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"scales": (5,)}, "two sizes or more"),
        ({"scales": (1, 6, 5)}, "from 1 to those of the last"),
        ({"scales": (0, 5)}, "from 1"),
        ({"scales": ((1, 1, 1), 5)}, "2 sizes each"),
        ({"axes": 3}, "axes"),
        ({"phi_sharing": 0}, "phi_sharing"),
        ({"quantizer": Factorized(VectorQuantizer(4, 2), 3)}, "project around"),
        ({"phi_ratio": 1.5}, "phi_ratio"),
        ({"losses": "all"}, "losses"),
        ({"estimator": "stages"}, "estimator"),
        ({"estimator": "per_scale"}, "phi_ratio=0"),
        ({"dropout": -0.1}, "dropout"),
        ({"skip": 2.0}, "skip"),
        ({"dropout_start": 0}, "dropout_start"),
        ({"dropout_start": 5}, "dropout_start"),
        ({"quantizer": [VectorQuantizer(4, 2)] * 4}, "different ones"),
        ({"quantizer": [VectorQuantizer(4, 2), VectorQuantizer(4, 2)]}, "as many as scales"),
        ({"quantizer": [VectorQuantizer(4 + i, 2) for i in range(4)]}, "one codebook_sizes"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MultiScaleResidual(**{"quantizer": VectorQuantizer(4, 2), "scales": SCALES, "phi_sharing": 2} | options)


def test_latents_on_another_grid_and_wrong_indices_are_refused():
    quantizer = make()
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=r"\(5, 5\).*\(4, 6\)"):
            call(latents(1, 4, 6, DIM))
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        quantizer(latents(1, 25, DIM))
    with pytest.raises(TypeError, match="int64"):
        quantizer.decode(torch.zeros(1, TOKENS, 1))
    with pytest.raises(ValueError, match=r"\[1, 5, 14, 39\]"):
        quantizer.decode(torch.zeros(1, 6, 1, dtype=torch.int64))


def test_autocast_and_half_precision_weights_keep_the_arithmetic_in_float32():
    quantizer, z = make(dtype=torch.float32), latents(2, 5, 5, DIM, dtype=torch.float32)
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(z)
        assert torch.equal(quantizer.decode(result.indices), expected.quantized)
        assert torch.equal(quantizer.encode(z), expected.indices)
    assert torch.equal(result.indices, expected.indices) and torch.equal(result.quantized, expected.quantized)
    assert quantizer.bfloat16()(z.bfloat16()).quantized.dtype == torch.float32


@pytest.mark.parametrize("options", [{"dropout": 0.5, "skip": 0.5}, STYLES["per scale"]])
def test_training_compiles_into_one_graph(options):
    quantizer = make(VectorQuantizer(CODES, DIM), torch.float32, scales=(1, 3), **options)
    z = latents(3, 3, 3, DIM, dtype=torch.float32).requires_grad_()
    result = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(z)
    (result.quantized.sum() + sum(result.losses.values())).backward()
    assert z.grad.isfinite().all()


RANKS = """
import torch
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.vq import VectorQuantizer

def build():
    torch.manual_seed(0)
    codes = VectorQuantizer(8, 3, codebook_update="ema")
    return MultiScaleResidual(codes, (1, 2, 4), phi_sharing=2, dropout=0.5).double()

def work(quantizer, rank, world):
    model = torch.nn.parallel.DistributedDataParallel(quantizer) if world > 1 else quantizer
    quantizer._draw_scales = lambda batch, device, generator: torch.full((batch,), 2, device=device)
    for step in range(2):
        z = torch.randn(6, 4, 4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        own = (z if world == 1 else z[3 * rank : 3 * rank + 3]).requires_grad_()
        with torch.no_grad():
            quantizer.dropout = 0.0 if step == 0 else 1.0
        quantizer.zero_grad()
        result = model(own)
        (result.quantized.square().sum() / len(own) + sum(result.losses.values())).backward()
        quantizer.commit_update()
    return quantizer.state_dict(), [p.grad for p in quantizer.parameters()]
"""


def test_ranks_hold_the_state_and_the_gradients_of_one_process(tmp_path):
    here = {}
    exec(RANKS, here)
    single, gradients = here["work"](here["build"](), 0, 1)
    (first, first_gradients), (second, _) = ranks.run_ranks(tmp_path, RANKS, 2)
    for name, value in single.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10)
    for ours, theirs in zip(first_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
