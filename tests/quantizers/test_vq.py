"""Vector quantization: search, gradients, losses and masks against closed forms and brute force."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vistok import VectorQuantizer
from vistok.quantizers.search import nearest_codes

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
    """65 536 tokens x 65 536 codes: all distances would take 17 GB; the search stays under 200 MB."""
    code = (
        "import resource, torch\n"
        "from vistok.quantizers.search import nearest_codes\n"
        "torch.set_num_threads(2)\n"
        "z, codebook = torch.randn(65536, 4), torch.randn(65536, 4)\n"
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
