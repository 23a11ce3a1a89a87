"""Vector quantization: search, gradients, losses and masks against closed forms, brute force and the originals."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok import VectorQuantizer
from vistok.quantizers.search import nearest_codes

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

BOTH = pytest.mark.parametrize("l2_normalize", [False, True])


def make(l2_normalize=False, codes=37, dim=5, dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes, dim, l2_normalize).to(dtype)
    with torch.no_grad():
        quantizer.codebook.normal_(std=scale)
    return quantizer


def latents(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- search


@pytest.mark.parametrize("buffer_elements", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("tokens,codes,dim", [(1, 1, 1), (50, 3, 2), (129, 300, 8)])
def test_search_equals_brute_force(tokens, codes, dim, buffer_elements, monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search.CODE_BLOCK", 64)
    z, codebook = latents(tokens, dim), latents(codes, dim, seed=2)
    expected = (z[:, None] - codebook).square().sum(-1).argmin(1)
    assert torch.equal(nearest_codes(z, codebook, buffer_elements=buffer_elements), expected)


def test_search_finds_the_lowest_index_of_equal_codes(monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search.CODE_BLOCK", 4)
    code = torch.tensor([[1.0, 2.0]])
    codebook = torch.cat([torch.zeros(3, 2), code, code, torch.zeros(2, 2), code])
    assert nearest_codes(code.repeat(5, 1), codebook).tolist() == [3] * 5


def test_a_common_offset_costs_no_precision():
    z, codebook = latents(500, 8), latents(200, 8, seed=2)
    expected = nearest_codes(z, codebook)
    shifted = nearest_codes((z + 1000).float(), (codebook + 1000).float())
    # Rounding the inputs themselves to float32 at 1000 moves them by 6e-5; nothing beyond that may be lost.
    distances = (z[:, None] - codebook).square().sum(-1)
    chosen, best = distances.gather(1, shifted[:, None])[:, 0], distances.gather(1, expected[:, None])[:, 0]
    assert ((chosen - best) < 2e-3).all() and (shifted == expected).float().mean() > 0.99


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_search_ignores_autocast_and_reduced_precision(autocast):
    z, codebook = latents(2000, 8, dtype=torch.float32), latents(1000, 8, seed=2, dtype=torch.float32)
    expected = nearest_codes(z, codebook)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", autocast):
            assert torch.equal(nearest_codes(z, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_latents_that_are_not_finite_get_some_valid_index():
    z = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [0.0, 1.0]])
    found = nearest_codes(z, latents(10, 2, dtype=torch.float32))
    assert ((found >= 0) & (found < 10)).all()


def test_search_never_holds_all_distances():
    """16 384 tokens x 65 536 codes: all distances would take 4 GB; the search stays under 200 MB."""
    code = (
        "import resource, torch\n"
        "from vistok.quantizers.search import nearest_codes\n"
        "torch.set_num_threads(1)\n"
        "z, codebook = torch.randn(16384, 4), torch.randn(65536, 4)\n"
        "nearest_codes(z[:64], codebook)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "nearest_codes(z, codebook)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 200_000  # kB


# ---- forward and decode


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_returns_the_code_itself(l2_normalize, dtype):
    quantizer = make(l2_normalize, dtype=torch.float32)
    result = quantizer(latents(2, 3, 4, 5, dtype=dtype))
    assert result.quantized.shape == (2, 3, 4, 5) and result.indices.shape == (2, 3, 4, 1)
    codebook = F.normalize(quantizer.codebook, dim=1) if l2_normalize else quantizer.codebook
    assert torch.equal(result.quantized, F.embedding(result.indices[..., 0], codebook))
    assert torch.equal(quantizer.decode(result.indices), result.quantized)


@BOTH
def test_encode_agrees_with_forward(l2_normalize):
    quantizer = make(l2_normalize)
    z = latents(2, 9, 5)
    assert torch.equal(quantizer.encode(z), quantizer(z).indices)
    assert not quantizer.encode(z.requires_grad_()).requires_grad


def test_unit_codes_do_not_depend_on_the_scale_of_the_latent():
    quantizer = make(l2_normalize=True)
    z = latents(4, 6, 5)
    small, large = quantizer(1e-3 * z), quantizer(1e3 * z)
    assert torch.equal(small.indices, large.indices)
    assert torch.allclose(small.quantized.norm(dim=-1), torch.ones(4, 6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(small.losses["commitment"], large.losses["commitment"], rtol=1e-9)


@BOTH
def test_result_is_the_same_under_autocast(l2_normalize):
    quantizer = make(l2_normalize, dtype=torch.float32)
    z = latents(2, 50, 5, dtype=torch.float32)
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z)
    assert torch.equal(plain.indices, mixed.indices) and torch.equal(plain.quantized, mixed.quantized)
    assert all(torch.equal(plain.losses[name], mixed.losses[name]) for name in plain.losses)


def test_counts_count_the_codes_used():
    quantizer = make()
    result = quantizer(latents(3, 40, 5))
    assert torch.equal(result.statistics["counts"], torch.bincount(result.indices.flatten(), minlength=37))


# ---- gradients and losses


def test_straight_through_is_the_identity():
    quantizer, z, g = make(), latents(2, 7, 5).requires_grad_(), latents(2, 7, 5, seed=3)
    (quantizer(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g)
    assert quantizer.codebook.grad is None


def test_straight_through_on_the_sphere_is_the_jacobian_of_the_normalisation():
    quantizer, z, g = make(l2_normalize=True), latents(2, 7, 5).requires_grad_(), latents(2, 7, 5, seed=3)
    (quantizer(z).quantized * g).sum().backward()
    unit = F.normalize(z.detach(), dim=-1)
    expected = (g - unit * (unit * g).sum(-1, keepdim=True)) / z.detach().norm(dim=-1, keepdim=True)
    assert torch.allclose(z.grad, expected, atol=1e-12)


def test_half_precision_latents_get_their_gradient_in_half_precision():
    quantizer, z = make(dtype=torch.float32), latents(2, 3, 5, dtype=torch.bfloat16).requires_grad_()
    quantizer(z).quantized.sum().backward()
    assert z.grad.dtype == torch.bfloat16 and torch.equal(z.grad, torch.ones_like(z))


def test_commitment_gradient_equals_closed_form():
    quantizer, z = make(), latents(2, 7, 5).requires_grad_()
    result = quantizer(z)
    result.losses["commitment"].backward()
    assert torch.allclose(z.grad, 2 * (z.detach() - result.quantized.detach()) / z.numel(), atol=1e-15)
    assert quantizer.codebook.grad is None


def test_codebook_gradient_equals_closed_form():
    quantizer, z = make(), latents(2, 7, 5).requires_grad_()
    result = quantizer(z)
    result.losses["codebook"].backward()
    flat, found = z.detach().view(-1, 5), result.indices.flatten()
    expected = torch.zeros_like(quantizer.codebook)
    for k in range(37):
        expected[k] = 2 * (quantizer.codebook.detach()[k] - flat[found == k]).sum(0) / z.numel()
    assert torch.allclose(quantizer.codebook.grad, expected, atol=1e-15)
    assert z.grad is None
    assert (quantizer.codebook.grad[~torch.isin(torch.arange(37), found)] == 0).all()


@BOTH
def test_losses_equal_finite_differences(l2_normalize):
    quantizer, z = make(l2_normalize, scale=3.0), latents(1, 4, 5).requires_grad_()

    def loss(z, codebook):
        losses = torch.func.functional_call(quantizer, {"codebook": codebook}, (z,)).losses
        return losses["commitment"], losses["codebook"]

    assert torch.autograd.gradcheck(lambda z: loss(z, quantizer.codebook.detach())[0], (z,))
    assert torch.autograd.gradcheck(lambda c: loss(z.detach(), c)[1], (quantizer.codebook,))


def test_losses_are_there_in_eval_too():
    quantizer = make().eval()
    assert set(quantizer(latents(1, 4, 5)).losses) == {"commitment", "codebook"} == set(quantizer.default_loss_weights)


# ---- masks


@BOTH
def test_a_mask_equals_truncation_whatever_the_padding_holds(l2_normalize):
    quantizer, g = make(l2_normalize), latents(2, 6, 5, seed=3)
    z = latents(2, 6, 5)
    z[:, 4:] = torch.tensor([float("nan"), 1e30], dtype=torch.float64).view(1, 2, 1)
    mask = torch.arange(6).expand(2, 6) < 4
    padded, short = z.clone().requires_grad_(), z[:, :4].clone().requires_grad_()
    masked, truncated = quantizer(padded, mask), quantizer(short)
    assert torch.equal(masked.indices[:, :4], truncated.indices) and (masked.indices[:, 4:] == -1).all()
    assert torch.equal(masked.quantized[:, :4], truncated.quantized) and (masked.quantized[:, 4:] == 0).all()
    assert torch.equal(masked.statistics["counts"], truncated.statistics["counts"])
    assert torch.equal(quantizer.encode(z, mask), masked.indices)
    assert torch.equal(quantizer.decode(masked.indices), masked.quantized)
    for name in masked.losses:
        assert torch.allclose(masked.losses[name], truncated.losses[name], rtol=1e-12)
    gradients = []
    for result, weight in ((masked, g), (truncated, g[:, :4])):
        quantizer.zero_grad()
        (sum(result.losses.values()) + (result.quantized * weight).sum()).backward()
        gradients.append(quantizer.codebook.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-12)
    assert torch.allclose(padded.grad[:, :4], short.grad, rtol=1e-12) and (padded.grad[:, 4:] == 0).all()


def test_an_empty_mask_gives_zero_losses():
    quantizer, z = make(), latents(2, 3, 5).requires_grad_()
    result = quantizer(z, torch.zeros(2, 3, dtype=torch.bool))
    sum(result.losses.values()).backward()
    assert all(loss.item() == 0 for loss in result.losses.values())
    assert (z.grad == 0).all() and int(result.statistics["counts"].sum()) == 0


def test_latents_that_are_not_finite_are_not_counted():
    quantizer, z = make(), latents(2, 5, 5)
    z[0, 1, 2], z[1, 3, 0] = float("nan"), float("inf")
    result = quantizer(z)
    finite = z.isfinite().all(-1)
    assert torch.equal(result.statistics["counts"], result.indices[..., 0][finite].bincount(minlength=37))
    assert int(result.statistics["counts"].sum()) == 8


# ---- neighbours and bad input


@BOTH
def test_neighbours_equal_brute_force(l2_normalize):
    quantizer = make(l2_normalize)
    indices = torch.randint(37, (2, 6, 1))
    codes = F.normalize(quantizer.codebook, dim=1) if l2_normalize else quantizer.codebook
    expected = (codes[indices[..., 0]][..., None, :] - codes).norm(dim=-1).argsort(-1)[..., :4]
    found = quantizer.neighbours(indices, 4)
    assert found.shape == (2, 6, 4, 1) and torch.equal(found[..., 0], expected)
    assert (quantizer.neighbours(torch.full((1, 1, 1), -1), 3) == -1).all()
    with pytest.raises(ValueError, match="between 1 and the number of codes, 37; got 38"):
        quantizer.neighbours(indices, 38)


def test_bad_input_is_named():
    quantizer = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\(B, \*S, 5\), channels last; got \(2, 5, 3\)"):
        quantizer(torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match="int64"):
        quantizer(torch.zeros(2, 3, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="bool"):
        quantizer(torch.zeros(2, 3, 5), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\)"):
        quantizer(torch.zeros(2, 3, 5), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="int64; got torch.int32"):
        quantizer.decode(torch.zeros(2, 3, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        quantizer.decode(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="positive; got 0 and 4"):
        VectorQuantizer(0, 4)


# ---- restart of unused codes


def restarting(codes=12, dim=3, after=3, l2_normalize=False):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes, dim, l2_normalize, restart_after=after)
    with torch.no_grad():
        quantizer.codebook.normal_()
    return quantizer


def step(quantizer, z, mask=None):
    result = quantizer(z, mask)
    quantizer.commit_update()
    return set(result.indices[result.indices >= 0].tolist())


@BOTH
def test_exactly_the_codes_unused_for_long_enough_move_onto_latents(l2_normalize):
    quantizer = restarting(l2_normalize=l2_normalize)
    z = torch.randn(2, 20, 3)[:, :1].expand(2, 20, 3).contiguous()  # two different latents: at most two codes in use
    before = quantizer.codebook.detach().clone()
    used = set()
    for number in range(3):
        assert torch.equal(quantizer.codebook, before), f"moved after {number} steps"
        used |= step(quantizer, z)
    moved = (quantizer.codebook != before).any(1)
    assert {i for i in range(12) if not moved[i]} == used
    allowed = F.normalize(z[:, 0], dim=1) if l2_normalize else z[:, 0]
    assert all((quantizer.codebook[i] == allowed).all(1).any() for i in range(12) if moved[i])
    assert (quantizer.idle_steps[moved] == 0).all()


def test_moved_codes_are_used_and_stay():
    quantizer, z = restarting(after=2), torch.randn(4, 50, 3)
    for _ in range(30):
        step(quantizer, z)
    moved = quantizer.codebook.detach().clone()
    assert len(step(quantizer, z)) == 12
    step(quantizer, z)
    assert torch.equal(quantizer.codebook, moved)


def test_forward_passes_of_one_optimizer_step_count_once():
    quantizer, halves = restarting(after=1), torch.randn(2, 1, 40, 3)
    used = set(quantizer(halves[0]).indices.flatten().tolist()) | set(quantizer(halves[1]).indices.flatten().tolist())
    before = quantizer.codebook.detach().clone()
    quantizer.commit_update()
    assert {i for i in range(12) if torch.equal(quantizer.codebook[i], before[i])} == used
    quantizer.commit_update()
    assert (quantizer.idle_steps == 0).all()


def test_evaluation_leaves_the_state_alone():
    quantizer, z = restarting(after=1), torch.randn(1, 5, 3)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with torch.no_grad():
        step(quantizer, z)
    step(quantizer.eval(), z)
    quantizer.encode(z)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_dropped_positions_revive_no_code():
    quantizer, z = restarting(after=1), torch.randn(1, 6, 3)
    z[:, 2:] = 77.0
    step(quantizer, z, torch.tensor([[True, True, False, False, False, False]]))
    assert quantizer.codebook.abs().max() < 10
    before = quantizer.codebook.detach().clone()
    step(quantizer, z, torch.zeros(1, 6, dtype=torch.bool))
    assert torch.equal(quantizer.codebook, before)


def test_a_quantizer_without_restart_keeps_no_state():
    quantizer = make()
    quantizer(latents(1, 4, 5))
    quantizer.commit_update()
    assert set(quantizer.state_dict()) == {"codebook"}
    with pytest.raises(ValueError, match="restart_after .* got 0"):
        VectorQuantizer(4, 2, restart_after=0)


def test_a_step_without_any_kept_token_changes_no_state():
    quantizer, z = restarting(after=1), torch.randn(1, 6, 3)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    step(quantizer, z, torch.zeros(1, 6, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_no_two_codes_move_onto_one_latent():
    quantizer, z = restarting(codes=40, after=1), torch.randn(1, 6, 3)
    for number in range(1, 7):
        before = quantizer.codebook.detach().clone()
        step(quantizer, z)
        moved = quantizer.codebook[(quantizer.codebook != before).any(1)].detach()
        assert len(moved) <= 6 and len(moved.unique(dim=0)) == len(moved), number


def test_a_frozen_codebook_is_not_restarted():
    quantizer = restarting(after=1)
    quantizer.requires_grad_(False)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    step(quantizer, torch.randn(1, 6, 3, requires_grad=True))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


# ---- latents that are not finite


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_latent_that_is_not_finite_breaks_the_encoder_loss_but_not_the_codebook(l2_normalize, bad):
    if l2_normalize and bad == 1e30:
        bad = -float("inf")  # normalising takes 1e30 for zero, its length overflows
    quantizer, z = make(l2_normalize, dtype=torch.float32), latents(2, 5, 5, dtype=torch.float32)
    z[0, 2] = bad
    good = torch.ones(2, 5, dtype=torch.bool)
    good[0, 2] = False
    result = quantizer(z)
    assert not result.losses["commitment"].isfinite()
    assert ((result.indices >= 0) & (result.indices < 37)).all()
    gradients = []
    for losses in (result.losses, quantizer(z, good).losses):
        quantizer.zero_grad()
        losses["codebook"].backward()
        gradients.append(quantizer.codebook.grad.clone())
    assert gradients[0].isfinite().all() and torch.allclose(*gradients, rtol=1e-6)


# ---- casts, copies and compilation


def test_a_codebook_in_half_precision_is_compared_in_float32():
    quantizer, z = make(dtype=torch.bfloat16), latents(2, 9, 5, dtype=torch.bfloat16)
    result = quantizer.eval()(z)
    assert result.quantized.dtype == torch.float32 and torch.equal(result.quantized, quantizer.decode(result.indices))


OPTIONS = {
    "plain": {},
    "restart": {"restart_after": 2},
    "ema": {"codebook_update": "ema", "restart_below": 0.5},
    "kmeans": {"codebook_update": "ema", "kmeans_steps": 2, "estimator": "rotation"},
    "anchors": {"anchors": True, "l2_normalize": True},
    "soft": {"estimator": "softmax", "entropy_temperature": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_copies_and_loaded_states_go_on_alike(name):
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(12, 3, **OPTIONS[name]), torch.randn(2, 10, 3)
    step(quantizer, z)
    quantizer(z)  # a copy in the middle of a step takes along what has been gathered
    others = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))]
    outcomes = []
    for one in (quantizer, *others):
        torch.manual_seed(1)
        one.commit_update()
        step(one, z)
        outcomes.append(one.state_dict())
    assert all(torch.equal(outcomes[0][key], state[key]) for state in outcomes for key in outcomes[0])
    fresh = VectorQuantizer(12, 3, **OPTIONS[name])
    fresh.load_state_dict(quantizer.state_dict())
    for one in (quantizer, fresh):
        torch.manual_seed(2)
        step(one, z)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", OPTIONS)
def test_training_compiles_into_one_graph(name):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(12, 3, **OPTIONS[name])
    eager, compiled = quantizer, torch.compile(copy.deepcopy(quantizer), fullgraph=True, backend="aot_eager")
    z, mask = torch.randn(2, 10, 3), torch.rand(2, 10) > 0.2
    for number in range(3):
        gradients, results = [], []
        for one in (eager, compiled):
            torch.manual_seed(number)
            latent = z.clone().requires_grad_()
            results.append(one(latent, mask))
            (sum(results[-1].losses.values()) + results[-1].quantized.square().sum()).backward()
            one.commit_update()
            gradients.append(latent.grad)
        assert torch.equal(results[0].indices, results[1].indices)
        assert torch.allclose(*gradients, atol=1e-6)
    for (key, value), other in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        assert torch.allclose(value, other, atol=1e-6), key


# ---- the originals


def gradients_of(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def close_in_scale(actual, expected, tolerance=1e-5):
    """Within ``tolerance`` of the largest expected value, however small that is."""
    parity.assert_close(actual / expected.abs().max(), expected / expected.abs().max(), tolerance)


def original(name, l2_normalize, codebook="embedding.weight", latents="z", **options):
    """A quantizer with a fixture's codebook, its latents channel-last, and what is expected of it."""
    _, weights, io = parity.fixture(name)
    quantizer = VectorQuantizer(*weights[codebook].shape, l2_normalize, **options)
    quantizer.codebook.data.copy_(weights[codebook])
    return quantizer, parity.channel_last(io[latents]).contiguous().requires_grad_(), io


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_titok_gives_the_same(l2_normalize):
    quantizer, z, io = original(f"losses-titok-vq-{'l2' if l2_normalize else 'plain'}", l2_normalize)
    result = quantizer(z)
    assert torch.equal(result.indices.squeeze(-1), io["indices"])
    parity.assert_close(result.quantized, parity.channel_last(io["z_quantized"]))
    parity.assert_close(0.25 * result.losses["commitment"], io["commitment_loss"])
    parity.assert_close(result.losses["codebook"], io["codebook_loss"])
    total = sum(weight * result.losses[name] for name, weight in quantizer.default_loss_weights.items())
    parity.assert_close(total, io["quantizer_loss"])
    to_z, to_codebook = gradients_of(total, z, quantizer.codebook)
    close_in_scale(to_z, parity.channel_last(io["grad_z_of_quantizer_loss"]))
    close_in_scale(to_codebook, io["grad_codebook_of_quantizer_loss"])
    (through,) = gradients_of((result.quantized * parity.channel_last(io["grad_out"])).sum(), z)
    close_in_scale(through, parity.channel_last(io["grad_z_of_output"]))


@pytest.mark.parametrize("kind,weights", [("legacy", (1.0, 0.25)), ("fixed", (0.25, 1.0))])
def test_taming_gives_the_same_with_beta_on_either_loss(kind, weights):
    quantizer, z, io = original("losses-taming-vq", False)
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io["indices"])
    parity.assert_close(result.quantized, parity.channel_last(io["z_quantized"]))
    total = weights[0] * result.losses["commitment"] + weights[1] * result.losses["codebook"]
    parity.assert_close(total, io[f"loss_{kind}"])
    to_z, to_codebook = gradients_of(total, z, quantizer.codebook)
    close_in_scale(to_z, parity.channel_last(io[f"grad_z_of_loss_{kind}"]))
    close_in_scale(to_codebook, io[f"grad_codebook_of_loss_{kind}"])
    (through,) = gradients_of((result.quantized * parity.channel_last(io["grad_out"])).sum(), z)
    close_in_scale(through, parity.channel_last(io["grad_z_of_output"]))


@pytest.mark.parametrize("name,estimator", [("ste", "straight_through"), ("rot", "rotation")])
def test_gigatok_gives_the_same(name, estimator):
    quantizer, z, io = original(
        f"losses-gigatok-vq-{name}", True, estimator=estimator, entropy_temperature=0.01, entropy_eps=1e-5
    )
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io["indices"])
    # The original's rotation has 1e-6 in every denominator, so its output is not quite the code.
    parity.assert_close(result.quantized, parity.channel_last(io["z_quantized"]))
    close_in_scale(result.quantized, parity.channel_last(io["codebook_entry"]), 1e-6)
    parity.assert_close(0.25 * result.losses["commitment"], io["commit_loss"])
    parity.assert_close(result.losses["codebook"], io["vq_loss"])
    close_in_scale(0.005 * result.losses["entropy"], io["entropy_loss"])
    total = sum(weight * result.losses[key] for key, weight in quantizer.default_loss_weights.items())
    to_z, to_codebook = gradients_of(total, z, quantizer.codebook)
    close_in_scale(to_z, parity.channel_last(io["grad_z_of_losses"]))
    close_in_scale(to_codebook, io["grad_codebook_of_losses"])
    (through,) = gradients_of((result.quantized * parity.channel_last(io["grad_out"])).sum(), z)
    close_in_scale(through, parity.channel_last(io["grad_z_of_output"]))
    parity.assert_close(quantizer.eval()(z).quantized, parity.channel_last(io["z_quantized_eval"]))


def test_robusttok_gives_the_same_without_perturbation():
    quantizer, z, io = original("robusttok-perturbation", True, "quantize.embedding.weight", "latents")
    result = quantizer(z)
    assert torch.equal(result.indices.flatten(), io["indices"])
    parity.assert_close(result.quantized, parity.channel_last(io["quantized"]))
    parity.assert_close(result.losses["codebook"], io["vq_loss"])
    parity.assert_close(0.25 * result.losses["commitment"], io["commit_loss"])
    to_z, to_codebook = gradients_of(
        0.25 * result.losses["commitment"] + result.losses["codebook"], z, quantizer.codebook
    )
    close_in_scale(to_z, parity.channel_last(io["grad_latents__vq_plus_commit"]))
    close_in_scale(to_codebook, io["grad_codebook__vq_plus_commit"])
