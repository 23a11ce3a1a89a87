"""Projections around a quantizer, and one index as several sub-codes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.quantizers.bernoulli import BernoulliQuantizer
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.residual import Residual
from vistok.quantizers.vq import VectorQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    quantizer = Factorized(VectorQuantizer(11, 3), 7, **options).to(dtype)
    with torch.no_grad():
        quantizer.quantizer.codebook.normal_()
    return quantizer


def latents(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- projections


@pytest.mark.parametrize("in_bias,out_bias", [(True, True), (False, True), (True, False)])
def test_forward_and_gradients_equal_the_formula(in_bias, out_bias):
    quantizer = make(in_bias=in_bias, out_bias=out_bias)
    z, upstream, keep = latents(2, 5, 7).requires_grad_(), latents(2, 5, 7, seed=2), latents(2, 5, seed=3) > -0.5
    parameters = dict(quantizer.named_parameters())
    assert ("project_in.bias" in parameters, "project_out.bias" in parameters) == (in_bias, out_bias)
    result = quantizer(z, keep)
    loss = (result.quantized * upstream).sum() + result.losses["commitment"] + 2 * result.losses["codebook"]
    grads = torch.autograd.grad(loss, [z, *parameters.values()])

    rows = z[keep]
    inside = rows @ parameters["project_in.weight"].T + (parameters["project_in.bias"] if in_bias else 0)
    codebook = parameters["quantizer.codebook"]
    nearest = (inside[:, None] - codebook).square().sum(-1).argmin(1)
    codes = codebook[nearest]
    through = inside + (codes - inside).detach()
    quantized = through @ parameters["project_out.weight"].T + (parameters["project_out.bias"] if out_bias else 0)
    loss = (quantized * upstream[keep]).sum()
    loss = loss + (inside - codes.detach()).square().mean() + 2 * (inside.detach() - codes).square().mean()
    expected = torch.autograd.grad(loss, [z, *parameters.values()])
    assert torch.equal(result.indices[keep][:, 0], nearest)
    torch.testing.assert_close(result.quantized[keep], quantized)
    for own, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(own, other)
    assert torch.equal(result.latents, z.masked_fill(~keep.unsqueeze(-1), 0))  # what the projected codes stand for
    assert quantizer.dim == 7 and quantizer.codebook_sizes == (11,)


def test_dropped_positions_stay_zero_despite_the_biases():
    keep = torch.tensor([[True, False, True]])
    results = []
    for filling in (0.0, torch.nan):
        quantizer = make()
        z = latents(1, 3, 7).masked_fill(~keep.unsqueeze(-1), filling).requires_grad_()
        result = quantizer(z, keep)
        assert (result.quantized[0, 1] == 0).all() and (result.indices[0, 1] == -1).all()
        decoded = quantizer.decode(result.indices)
        assert torch.equal(decoded, result.quantized)
        (result.quantized.sum() + sum(result.losses.values())).backward()
        assert (z.grad[0, 1] == 0).all()
        assert torch.equal(quantizer.project_out.bias.grad, torch.full((7,), 2.0, dtype=torch.float64))
        results.append(torch.cat([p.grad.flatten() for p in quantizer.parameters()]))
    assert torch.equal(*results)
    empty = make()(latents(1, 3, 7), torch.zeros(1, 3, dtype=torch.bool))
    assert not any(loss.any() for loss in empty.losses.values()) and not empty.quantized.any()


def test_the_inner_quantizer_sees_zeros_at_dropped_positions(monkeypatch):
    quantizer, keep, seen = make(), torch.tensor([[True, False, True]]), []
    assign, encode = quantizer.quantizer.assign, quantizer.quantizer.encode
    monkeypatch.setattr(quantizer.quantizer, "assign", lambda z, *a, **k: seen.append(z) or assign(z, *a, **k))
    monkeypatch.setattr(quantizer.quantizer, "encode", lambda z, *a, **k: seen.append(z) or encode(z, *a, **k))
    quantizer(latents(1, 3, 7), keep)
    quantizer.encode(latents(1, 3, 7), keep)
    assert len(seen) == 2 and all(z[0, [0, 2]].all() and not z[0, 1].any() for z in seen)


def test_assigned_codes_train_the_output_projection_and_not_the_latents():
    quantizer, z = make(), latents(2, 5, 7).requires_grad_()
    quantizer.assign(z).quantized.square().sum().backward()
    assert z.grad is None and quantizer.project_in.weight.grad is None and quantizer.quantizer.codebook.grad is None
    assert (quantizer.project_out.weight.grad != 0).any()


def test_in_a_residual_the_gradient_arrives_once():
    torch.manual_seed(0)
    quantizer = Residual(Factorized(VectorQuantizer(11, 3), 7), 3).double()
    z, upstream = latents(2, 5, 7).requires_grad_(), latents(2, 5, 7, seed=2)
    result = quantizer(z)
    (result.quantized * upstream).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, upstream)
    names = {name for name, parameter in quantizer.named_parameters() if parameter.grad is not None}
    assert len(names) == 6 and all("project_out" in name for name in names)
    result.losses["commitment"].backward()
    assert all(p.grad is not None for n, p in quantizer.named_parameters() if "project_in" in n)


def test_the_estimator_of_the_inner_quantizer_is_used():
    quantizer, z = make(), latents(2, 5, 7).requires_grad_()
    (straight,) = torch.autograd.grad(quantizer(z).quantized.square().sum(), z)
    quantizer.quantizer.estimator = "rotation"
    (rotated,) = torch.autograd.grad(quantizer(z).quantized.square().sum(), z)
    assert not torch.allclose(straight, rotated)
    quantizer.quantizer.estimator = "none"
    assert not torch.autograd.grad(quantizer(z).quantized.square().sum(), z, allow_unused=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decode_gives_the_bits_of_forward_whatever_the_layout(dtype):
    quantizer = Grouped(make(torch.float32), 2).eval()
    z = latents(14, 5, 3, dtype=dtype).transpose(0, 2).transpose(0, 1)  # (5, 3, 14), not contiguous
    result = quantizer(z)
    assert torch.equal(quantizer.decode(result.indices), result.quantized) and result.quantized.dtype == torch.float32
    assert torch.equal(quantizer.encode(z), result.indices)


def test_autocast_changes_nothing():
    quantizer, z = make(torch.float32).eval(), latents(4, 60, 7, dtype=torch.float32)
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, encoded, decoded = quantizer(z), quantizer.encode(z), quantizer.decode(plain.indices)
    assert torch.equal(mixed.indices, plain.indices) and torch.equal(encoded, plain.indices)
    assert torch.equal(mixed.quantized, plain.quantized) and torch.equal(decoded, plain.quantized)


def test_without_output_projection_the_inner_codes_come_out():
    torch.manual_seed(0)
    quantizer = Factorized(VectorQuantizer(11, 3), 3, project_out=False)
    z = latents(2, 5, 3, dtype=torch.float32)
    result = quantizer(z)
    inner = quantizer.quantizer(quantizer.project_in(z))
    assert torch.equal(result.quantized, inner.quantized) and quantizer.project_out is None


def test_training_compiles_without_graph_breaks():
    torch._dynamo.reset()
    quantizer = Factorized(LookupFreeQuantizer(4), 6, subcode_sizes=[2, 8])
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second one makes the shapes symbolic
        z, keep = torch.randn(batch, 5, 6, requires_grad=True), torch.ones(batch, 5, dtype=torch.bool)
        expected, found = quantizer(z, keep), compiled(z, keep)
        assert torch.equal(found.indices, expected.indices)
        grads = []
        for result in (expected, found):
            (grad,) = torch.autograd.grad(result.quantized.square().sum() + sum(result.losses.values()), z)
            grads.append(grad)
        torch.testing.assert_close(*grads)


# ---- sub-codes


@pytest.mark.parametrize("order", ["least_significant_first", "most_significant_first"])
def test_subcodes_are_the_digits_of_the_index(order):
    torch.manual_seed(0)
    inner = VectorQuantizer(24, 3)
    sizes = [2, 3, 4]
    quantizer, z = Factorized(inner, subcode_sizes=sizes, subcode_order=order), torch.randn(3, 40, 3)
    keep = torch.rand(3, 40) > 0.2
    plain, result = inner(z, keep), quantizer(z, keep)
    assert quantizer.codebook_sizes == (2, 3, 4) and quantizer.bits == pytest.approx(inner.bits)
    places = [1, 2, 6] if order == "least_significant_first" else [12, 4, 1]
    for index, digits in zip(plain.indices.flatten().tolist(), result.indices.flatten(0, 1).tolist(), strict=True):
        expected = [index // place % size for place, size in zip(places, sizes, strict=True)]
        assert digits == (expected if index >= 0 else [-1, -1, -1])
    assert torch.equal(result.quantized, plain.quantized) and result.losses == plain.losses
    assert torch.equal(quantizer.decode(result.indices), inner.decode(plain.indices))
    assert torch.equal(quantizer.encode(z, keep), result.indices)
    counts = [
        torch.bincount(c[c >= 0], minlength=n) for c, n in zip(result.indices.flatten(0, 1).T, sizes, strict=True)
    ]
    assert torch.equal(result.statistics["counts"], torch.cat(counts))


def test_a_missing_subcode_makes_a_dropped_token():
    quantizer = Factorized(VectorQuantizer(6, 3), subcode_sizes=[2, 3])
    codes = quantizer.decode(torch.tensor([[[1, -1], [-1, 2], [1, 2], [-1, -1]]]))
    assert codes.any(-1).tolist() == [[False, False, True, False]]


def test_latents_that_are_not_finite_are_not_counted():
    z = torch.randn(1, 6, 4)
    z[0, 2, 1] = torch.nan
    assert int(Factorized(LookupFreeQuantizer(4), subcode_sizes=[4, 4])(z).statistics["counts"].sum()) == 5 * 2


def test_neighbours_are_the_inner_quantizers_renamed():
    torch.manual_seed(0)
    inner = VectorQuantizer(24, 3)
    quantizer = Factorized(inner, subcode_sizes=[4, 6])
    indices = inner.encode(torch.randn(2, 5, 3))
    found, distances = quantizer.neighbour_distances(torch.cat([indices % 4, indices // 4], -1), 7)
    expected, expected_distances = inner.neighbour_distances(indices, 7)
    assert torch.equal(found[..., 0] + 4 * found[..., 1], expected[..., 0])
    assert torch.equal(distances, expected_distances)


def test_blocks_carry_all_subcodes():
    (block,) = Factorized(VectorQuantizer(24, 3), subcode_sizes=[4, 6]).index_blocks((2, 3))
    assert (block.name, block.shape, block.columns) == ("", (2, 3), (0, 2))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(), "with neither it would change nothing"),
        (dict(dim=0), "dim must be positive; got 0"),
        (dict(dim=7, project_out=False), "returns codes of size 3"),
        (dict(subcode_sizes=[4, 5]), r"multiply to the 24 codes; got \[4, 5\]"),
        (dict(subcode_sizes=[-4, -6]), "multiply to the 24 codes"),
        (dict(subcode_sizes=[4, 6], subcode_order="big"), "subcode_order must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Factorized(VectorQuantizer(24, 3), **arguments)


def test_only_a_single_index_is_cut_into_subcodes():
    with pytest.raises(ValueError, match="one index per token; this one has 2"):
        Factorized(Grouped(VectorQuantizer(4, 2), 2), subcode_sizes=[2, 2])


# ---- published systems


def test_subcodes_equal_open_magvit2():
    config, _, io = parity.fixture("openmagvit2-lfq")
    sizes = [1 << bits for bits in config["factorized_bits"]]
    quantizer = Factorized(LookupFreeQuantizer(config["dim"]), subcode_sizes=sizes)
    result = quantizer(parity.channel_last(io["latents"]))
    assert torch.equal(result.indices[..., 0].flatten(), io["indices_pre"])
    assert torch.equal(result.indices[..., 1].flatten(), io["indices_post"])
    halves = torch.cat([io["entry_pre"], io["entry_post"]], 1)
    assert torch.equal(quantizer.decode(result.indices), parity.channel_last(halves))
    assert torch.equal(result.quantized, parity.channel_last(io["quantized"]))


def test_projected_bits_equal_instella(monkeypatch):
    config, weights, io = parity.fixture("instella-binary")
    inner = BernoulliQuantizer(config["codebook_size"], config["train_temp"])
    quantizer = Factorized(inner, config["emb_dim"], out_bias=False)
    state = {"project_in.weight": weights["proj.0.weight"], "project_in.bias": weights["proj.0.bias"]}
    quantizer.load_state_dict(state | {"project_out.weight": weights["embed"].T}, strict=False)
    z = io["latents"].clone().requires_grad_()
    evaluated = quantizer.eval()(z)
    assert torch.equal(evaluated.indices, io["indices"])
    parity.assert_close(evaluated.quantized, io["quantized"])
    parity.assert_close(quantizer.decode(io["indices"]), io["quantized"])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: io["uniform"].view(*shape))
    result = quantizer.train()(z)
    assert torch.equal(result.indices, io["train_indices"])
    parity.assert_close(result.quantized, io["train_quantized"])
    parity.assert_close(result.losses["variance"], io["code_loss"])
    project = [quantizer.project_in.weight, quantizer.project_in.bias]
    names = ["proj.0.weight", "proj.0.bias"]
    grads = torch.autograd.grad(result.losses["variance"], [z, *project], retain_graph=True)
    for grad, name in zip(grads, ["grad_latents__loss", *(f"grad_loss/{name}" for name in names)], strict=True):
        parity.assert_close(grad, io[name])
    inputs = [z, *project, quantizer.project_out.weight]
    *grads, embed = torch.autograd.grad((result.quantized * io["upstream"]).sum(), inputs)
    for grad, name in zip(grads, ["grad_latents__ste", *(f"grad_ste/{name}" for name in names)], strict=True):
        parity.assert_close(grad, io[name])
    parity.assert_close(embed.T, io["grad_ste/embed"])
