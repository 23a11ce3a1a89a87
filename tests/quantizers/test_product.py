"""Products: the same as each branch on its own slice or range; penalties between branches."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok import TiTok
from vistok.layers.configurable import build
from vistok.quantizers.base import Quantized, Quantizer
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.product import Product
from vistok.quantizers.residual import Residual
from vistok.quantizers.vq import VectorQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


class Unquantized(Quantizer):
    """Returns the latents themselves as codes, so that a penalty can be given any codes."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.codebook_sizes = dim, (1,)

    def assign(self, z, mask=None, *, generator=None):
        return Quantized(z.detach().clone(), torch.zeros(*z.shape[:-1], 1, dtype=torch.int64), latents=z)

    def encode(self, z, mask=None):
        return self.assign(z, mask).indices

    def decode(self, indices):
        raise AssertionError("a loss needs no decoding")

    def neighbour_distances(self, indices, k):
        raise AssertionError("a loss needs no neighbours")


def vector_quantizer(codes, dim, **options):
    quantizer = VectorQuantizer(codes, dim, **options).double()
    with torch.no_grad():
        quantizer.codebook.normal_()
    return quantizer


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels(**options):
    torch.manual_seed(0)
    return Product([vector_quantizer(7, 3), vector_quantizer(5, 3)], **options)


def ranges(**options):
    torch.manual_seed(0)
    return Product([vector_quantizer(7, 3), Grouped(vector_quantizer(5, 1), 3, shared=True)], [4, (2, 3)], **options)


# ---- slices of the channels


def test_channel_slices_equal_separate_quantizers():
    torch.manual_seed(0)
    branches = [vector_quantizer(7, 3), LookupFreeQuantizer(2), vector_quantizer(5, 1, estimator="rotation")]
    quantizer, z = Product(branches), latents(2, 4, 5, 6).requires_grad_()
    upstream, keep = latents(2, 4, 5, 6, seed=2), latents(2, 4, 5, seed=3) > -0.5
    result = quantizer(z, keep)
    slices = [part.detach().clone().requires_grad_() for part in z.split([3, 2, 1], -1)]
    results = [branch(own, keep) for branch, own in zip(branches, slices, strict=True)]
    assert torch.equal(result.quantized, torch.cat([r.quantized for r in results], -1))
    assert torch.equal(result.indices, torch.cat([r.indices for r in results], -1))
    assert torch.equal(result.statistics["counts"], torch.cat([r.statistics["counts"] for r in results]))
    assert torch.equal(result.statistics["batch_entropy"], results[1].statistics["batch_entropy"])
    commitment = sum(r.losses["commitment"] for r in results) / 3
    codebook = (results[0].losses["codebook"] + results[2].losses["codebook"]) / 2
    torch.testing.assert_close(result.losses["commitment"], commitment)
    torch.testing.assert_close(result.losses["codebook"], codebook)
    torch.testing.assert_close(result.losses["entropy"], results[1].losses["entropy"])
    assert set(result.losses) == set(quantizer.default_loss_weights) == {"commitment", "codebook", "entropy"}
    (grad,) = torch.autograd.grad((result.quantized * upstream).sum() + result.losses["commitment"], z)
    total = sum((r.quantized * u).sum() for r, u in zip(results, upstream.split([3, 2, 1], -1), strict=True))
    torch.testing.assert_close(grad, torch.cat(torch.autograd.grad(total + commitment, slices), -1))
    assert quantizer.dim == 6 and quantizer.codebook_sizes == (7, 4, 5)
    assert torch.equal(quantizer.encode(z, keep), result.indices)
    assert torch.equal(quantizer.eval().decode(result.indices), result.quantized)


def test_losses_with_different_weights_stay_apart():
    class Light(VectorQuantizer):
        def __init__(self):
            super().__init__(5, 2)
            self.default_loss_weights = {"commitment": 0.1, "codebook": 1.0}

    quantizer = Product([VectorQuantizer(5, 2), Light()])
    assert quantizer.default_loss_weights == {
        "branch_0_commitment": 0.125,
        "branch_1_commitment": 0.05,
        "codebook": 1.0,
    }
    z = latents(2, 3, 4).float()
    result = quantizer(z)
    separate = [branch(own) for branch, own in zip(quantizer.branches, z.split(2, -1), strict=True)]
    total = sum(quantizer.default_loss_weights[name] * loss for name, loss in result.losses.items())
    parts = zip(quantizer.branches, separate, strict=True)
    each = [sum(part.default_loss_weights[name] * loss for name, loss in r.losses.items()) for part, r in parts]
    torch.testing.assert_close(total, sum(each) / 2)


def test_counts_are_left_out_where_a_branch_has_none():
    result = Product([VectorQuantizer(5, 2), LookupFreeQuantizer(21, entropy_group=7)])(torch.randn(1, 2, 23))
    assert "counts" not in result.statistics and "sample_entropy" in result.statistics
    assert "counts" not in Product([VectorQuantizer(5, 2), Unquantized(2)])(torch.randn(1, 2, 4)).statistics


def test_neighbours_add_up_squared_distances():
    quantizer = channels()
    indices = quantizer.encode(latents(2, 6, 6))
    found, distances = quantizer.neighbour_distances(indices, 35)
    everything = torch.cartesian_prod(torch.arange(7), torch.arange(5)).unsqueeze(0)
    own = quantizer.decode(indices).unsqueeze(-2)
    expected = (own - quantizer.decode(everything)[0]).square().sum(-1).sort(-1)
    torch.testing.assert_close(distances, expected.values)
    assert torch.equal(found, everything[0][expected.indices])


def test_blocks_of_branches_that_are_alike_are_joined():
    def scales():
        return MultiScaleResidual(VectorQuantizer(5, 2), (1, 3), phi_ratio=0.0)

    quantizer, z = Product([scales(), scales()]).eval(), torch.randn(2, 3, 3, 4)
    result = quantizer(z)
    assert [(b.name, b.shape, b.columns) for b in quantizer.index_blocks((3, 3))] == [
        ("scale_0", (1, 1), (0, 2)),
        ("scale_1", (3, 3), (0, 2)),
    ]
    assert result.indices.shape == (2, 10, 2) and torch.equal(quantizer.decode(result.indices), result.quantized)
    with pytest.raises(ValueError, match="must arrange their indices alike"):
        Product([scales(), VectorQuantizer(5, 2)]).index_blocks((3, 3))


# ---- ranges of the tokens


def test_token_ranges_equal_separate_quantizers():
    quantizer, z, upstream = ranges(), latents(2, 10, 3).requires_grad_(), latents(2, 10, 3, seed=2)
    keep = latents(2, 10, seed=3) > -0.5
    result = quantizer(z, keep)
    first, second = z.detach()[:, :4].requires_grad_(), z.detach()[:, 4:].requires_grad_()
    results = [
        quantizer.branches[0](first, keep[:, :4]),
        quantizer.branches[1](second.view(2, 2, 3, 3), keep[:, 4:].view(2, 2, 3)),
    ]
    assert torch.equal(result.quantized, torch.cat([r.quantized.flatten(1, -2) for r in results], 1))
    assert torch.equal(result.indices[:, :4, :1], results[0].indices) and (result.indices[:, :4, 1:] == -1).all()
    assert torch.equal(result.indices[:, 4:, 1:], results[1].indices.flatten(1, 2))
    assert (result.indices[:, 4:, 0] == -1).all()
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(result.losses[name], sum(r.losses[name] for r in results) / 2)
    assert torch.equal(result.statistics["counts"], torch.cat([r.statistics["counts"] for r in results]))
    (grad,) = torch.autograd.grad((result.quantized * upstream).sum(), z)
    assert torch.equal(grad, upstream.masked_fill(~keep.unsqueeze(-1), 0))
    assert quantizer.dim == 3 and quantizer.codebook_sizes == (7, 5, 5, 5)
    assert torch.equal(quantizer.encode(z, keep), result.indices)
    assert torch.equal(quantizer.eval().decode(result.indices), result.quantized)


def test_ranges_are_blocks_with_columns_of_their_own():
    blocks = ranges().index_blocks((10,))
    assert [(b.name, b.shape, b.columns) for b in blocks] == [
        ("branch_0", (4,), (0, 1)),
        ("branch_1", (2, 3), (1, 4)),
    ]
    with pytest.raises(ValueError, match="must have 10 tokens"):
        ranges().index_blocks((9,))


def test_neighbours_of_a_range_are_those_of_its_branch():
    quantizer = ranges()
    indices = quantizer.encode(latents(2, 10, 3))
    found, distances = quantizer.neighbour_distances(indices, 3)
    for rows, columns, branch, own in (
        (slice(0, 4), slice(0, 1), quantizer.branches[0], indices[:, :4, :1]),
        (slice(4, 10), slice(1, 4), quantizer.branches[1], indices[:, 4:, 1:]),
    ):
        codes, far = branch.neighbour_distances(own, 3)
        assert torch.equal(found[:, rows, :, columns], codes) and torch.equal(distances[:, rows], far)
    assert (found[:, :4, :, 1:] == -1).all() and (found[:, 4:, :, 0] == -1).all()


def test_ranges_of_multi_scale_branches_make_blocks_per_scale():
    torch.manual_seed(0)
    branches = [MultiScaleResidual(VectorQuantizer(5, 2), scales, phi_ratio=0.0) for scales in ((1, 2), (1, 3))]
    quantizer, z = Product(branches, [(2, 2), (3, 3)]).eval(), torch.randn(2, 13, 2)
    result = quantizer(z)
    assert [block.name for block in quantizer.index_blocks((13,))] == [
        "branch_0_scale_0",
        "branch_0_scale_1",
        "branch_1_scale_0",
        "branch_1_scale_1",
    ]
    assert result.indices.shape == (2, 5 + 10, 2) and result.quantized.shape == z.shape
    assert torch.equal(quantizer.decode(result.indices), result.quantized)


def test_a_tokenizer_has_a_stream_per_range():
    torch.manual_seed(0)
    quantizer = Product([VectorQuantizer(9, 4), Grouped(VectorQuantizer(5, 2), 2)], lengths=[2, 6])
    model = TiTok(quantizer, 16, 8, num_latent_tokens=8, encoder_size=(16, 1, 2), decoder_size=(16, 1, 2)).eval()
    images = torch.rand(2, 3, 16, 16)
    tokens = model.encode(images)
    assert {name: tuple(own.shape) for name, own in tokens.indices.items()} == {
        "branch_0": (2, 2, 1),
        "branch_1": (2, 6, 2),
    }
    torch.testing.assert_close(model.decode(tokens, clamp=False), model(images).decoded)


def test_wrong_token_counts_are_named():
    quantizer = ranges()
    with pytest.raises(ValueError, match=r"ranges \[4, 6\]; got \(2, 9, 3\)"):
        quantizer(latents(2, 9, 3))
    with pytest.raises(ValueError, match=r"\(B, 10, 4\).*got \(2, 9, 4\)"):
        quantizer.decode(torch.zeros(2, 9, 4, dtype=torch.int64))


# ---- penalties


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, math.pi])
def test_disentanglement_is_the_squared_cosine(angle):
    z = torch.tensor([2.0, 0.0, 3 * math.cos(angle), 3 * math.sin(angle)]).expand(2, 3, 4)
    quantizer = Product([Unquantized(2), Unquantized(2)], disentanglement=True, dependency=True)
    losses = quantizer(z).losses
    assert float(losses["disentanglement"]) == pytest.approx(math.cos(angle) ** 2, abs=1e-6)
    assert float(losses["dependency"]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert quantizer.default_loss_weights == {"disentanglement": 0.1, "dependency": 1.0}


def test_penalties_of_three_branches_are_means_over_pairs_and_kept_tokens():
    quantizer = Product([Unquantized(3) for _ in range(3)], disentanglement=True, dependency=True).double()
    z, keep = latents(4, 5, 9), latents(4, 5, seed=2) > -0.3
    keep[1] = False
    losses = quantizer(z.masked_fill(~keep.unsqueeze(-1), torch.nan), keep).losses
    tokens, samples = [], []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        first, second = z[..., 3 * a : 3 * a + 3], z[..., 3 * b : 3 * b + 3]
        tokens.append(F.cosine_similarity(first, second, dim=-1)[keep].square())
        for i in (0, 2, 3):
            samples.append(F.cosine_similarity(first[i][keep[i]].mean(0), second[i][keep[i]].mean(0), dim=0))
    torch.testing.assert_close(losses["disentanglement"], torch.cat(tokens).mean())
    torch.testing.assert_close(losses["dependency"], torch.stack(samples).mean())
    dropped = quantizer(z, torch.zeros_like(keep)).losses
    assert all(float(loss) == 0 for loss in dropped.values())


def test_a_sample_without_tokens_in_a_range_has_no_dependency():
    quantizer, z = Product([Unquantized(2), Unquantized(2)], [2, 3], dependency=True), latents(3, 5, 2)
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[0, 2:] = keep[2, 0] = False
    expected = [F.cosine_similarity(z[1, :2].mean(0), z[1, 2:].mean(0), dim=0)]
    expected += [F.cosine_similarity(z[2, 1], z[2, 2:].mean(0), dim=0)]
    torch.testing.assert_close(quantizer(z, keep).losses["dependency"], sum(expected) / 2)


def test_penalties_have_the_gradient_of_finite_differences():
    quantizer = Product([Unquantized(2), Unquantized(2)], disentanglement=True, dependency=True).double()
    keep = torch.tensor([[True, False, True], [True, True, True]])

    def penalties(z):
        return sum(quantizer(z, keep).losses.values())

    assert torch.autograd.gradcheck(penalties, latents(2, 3, 4).requires_grad_())


@pytest.mark.parametrize("make,name", [(channels, "disentanglement"), (channels, "dependency"), (ranges, "dependency")])
def test_penalties_reach_the_latents_and_no_codebook(make, name):
    quantizer = make(**{name: True})
    z = latents(2, 10, quantizer.dim).requires_grad_()
    quantizer(z).losses[name].backward()
    assert (z.grad != 0).any() and all(parameter.grad is None for parameter in quantizer.parameters())


def test_penalties_stay_inside_other_containers():
    for outer in (Grouped(channels(disentanglement=True), 2, shared=True), Residual([channels(disentanglement=True)])):
        result = outer.double()(latents(2, 3, outer.dim))
        assert set(result.losses) == {"commitment", "codebook", "disentanglement"} == set(outer.default_loss_weights)


def test_penalties_compile_without_graph_breaks():
    torch._dynamo.reset()
    quantizer = Product([Factorized(VectorQuantizer(5, 2), 3), VectorQuantizer(6, 3)], [4, 4], dependency=True)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second one makes the shapes symbolic
        z = torch.randn(batch, 8, 3, requires_grad=True)
        expected, found = quantizer(z), compiled(z)
        assert torch.equal(found.indices, expected.indices)
        grads = []
        for result in (expected, found):
            (grad,) = torch.autograd.grad(result.quantized.square().sum() + sum(result.losses.values()), z)
            grads.append(grad)
        torch.testing.assert_close(*grads)


# ---- construction


def test_configuration_rebuilds_the_same_product():
    quantizer = ranges(dependency=True)
    rebuilt = build(json.loads(json.dumps(quantizer.config))).double()
    rebuilt.load_state_dict(quantizer.state_dict())
    z = latents(2, 10, 3)
    assert torch.equal(rebuilt(z).quantized, quantizer(z).quantized)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(branches=[]), "one or more quantizers"),
        (dict(branches=[VectorQuantizer(4, 2)] * 2), r"different quantizers; Grouped\(..., shared=True\)"),
        (dict(branches=[VectorQuantizer(4, 2), VectorQuantizer(4, 3)], lengths=[1, 1]), r"one dim; got \[2, 3\]"),
        (dict(branches=[VectorQuantizer(4, 2), VectorQuantizer(4, 3)], disentanglement=True), "one dim"),
        (dict(branches=[VectorQuantizer(4, 2)], dependency=True), "got one branch"),
        (dict(branches=[VectorQuantizer(4, 2), VectorQuantizer(4, 2)], lengths=[3]), r"per branch \(2\); got \[3\]"),
        (dict(branches=[VectorQuantizer(4, 2)], lengths=[0]), r"positive number of tokens"),
        (
            dict(branches=[VectorQuantizer(4, 2), VectorQuantizer(4, 2)], lengths=[1, 1], disentanglement=True),
            "use dependency",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Product(**arguments)


# ---- published systems


def test_channel_slices_equal_fqgan():
    config, weights, io = parity.fixture("fqgan-quantizers")
    sizes = (config["codebook_size"], config["codebook_embed_dim"])
    options = dict(l2_normalize=True, entropy_temperature=0.01, entropy_eps=1e-5)
    quantizer = Product([VectorQuantizer(*sizes, **options) for _ in range(2)], disentanglement=True)
    names = ("vis", "sem")  # the order of its decoder's input
    for branch, name in zip(quantizer.branches, names, strict=True):
        branch.load_state_dict({"codebook": weights[f"quantize_{name}.embedding.weight"]})

    def joint(key):
        return torch.cat([parity.channel_last(io[key.format(name)]) for name in names], -1)

    z = joint("latents_{}").requires_grad_()
    result = quantizer(z)
    for column, name in zip(result.indices.unbind(-1), names, strict=True):
        assert torch.equal(column.flatten(), io[f"indices_{name}"])
    parity.assert_close(result.quantized, joint("quantized_{}"))
    parity.assert_close(quantizer.decode(result.indices), joint("quantized_from_indices_{}"))
    entropy = config["entropy_loss_ratio"] * result.losses["entropy"]
    disentanglement = config["disentanglement_ratio"] * result.losses["disentanglement"]
    commitment = config["commit_loss_beta"] * result.losses["commitment"]
    # Ours are means over the branches; the original returns each branch's own.
    for ours, theirs in ((commitment, "commit"), (entropy, "entropy"), (result.losses["codebook"], "vq")):
        parity.assert_close(2 * ours, io[f"{theirs}_loss_vis"] + io[f"{theirs}_loss_sem"])
    parity.assert_close(disentanglement, io["disentangle_loss"])
    terms = {"ste": (result.quantized * joint("upstream_{}")).sum(), "disentangle": disentanglement}
    terms |= {"commit": 2 * commitment, "entropy": 2 * entropy}
    for name, term in terms.items():
        (grad,) = torch.autograd.grad(term, z, retain_graph=True)
        parity.assert_close(grad, joint("grad_latents_{}__" + name))
    for name, term in {"vq": 2 * result.losses["codebook"], "entropy": 2 * entropy}.items():
        grads = torch.autograd.grad(term, list(quantizer.parameters()), retain_graph=True)
        for grad, branch in zip(grads, names, strict=True):
            parity.assert_close(grad, io[f"grad_codebook_{branch}__{name}"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dependency_equals_imagefolder(mode):
    _, _, io = parity.fixture("imagefolder-msvq")
    codes = parity.channel_last(io[f"quantized__{mode}"]).flatten(1, 2)  # (B, h w, 2 D)
    dim = codes.shape[-1] // 2
    slices = Product([Unquantized(dim), Unquantized(dim)], dependency=True)
    parity.assert_close(slices(codes).losses["dependency"], io[f"dependency_loss__{mode}"])
    lengths = [codes.shape[1]] * 2
    tokens = Product([Unquantized(dim), Unquantized(dim)], lengths, dependency=True)
    found = tokens(torch.cat(codes.split(dim, -1), 1)).losses["dependency"]
    parity.assert_close(found, io[f"dependency_loss__{mode}"])
