"""One test per defect that was found in the public quantizers, showing that it is not one of ours.

The defects, as found in vector-quantize-pytorch, taming-transformers, LlamaGen and its descendants, bsq-vit,
ImageFolder, WeTok and OmniTokenizer, are named in the test names; each test fails if ours had it. The quantizers' own
tests go further into most of them.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.bits import pack_bits, unpack_bits
from vistok.quantizers.bsq import BinarySphericalQuantizer
from vistok.quantizers.estimators import rotation
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.gumbel import GumbelQuantizer
from vistok.quantizers.ibq import IndexBackpropQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.residual import Residual
from vistok.quantizers.sim_vq import SimVQ
from vistok.quantizers.vq import VectorQuantizer

_spec = importlib.util.spec_from_file_location("vistok_test_ranks", Path(__file__).with_name("ranks.py"))
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)


def latents(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_codes(quantizer, seed=1, scale=1.0):
    """Codes as far apart as latents, for every codebook inside."""
    with torch.no_grad():
        for part in quantizer.modules():
            if isinstance(part, VectorQuantizer):
                part.codebook.copy_(latents(*part.codebook.shape, seed=seed, scale=scale))
                if part.ema:
                    part.sums.copy_(part.codebook / len(part.codebook))
                seed += 1
    return quantizer


def remember(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


# ---- 1, 2, 16: several processes

# `work` runs in two processes with 3 and 6 tokens each, and once more here with all 9 tokens.
SOURCE = """
import torch
from vistok.quantizers.ibq import IndexBackpropQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.vq import VectorQuantizer

def build():  # before there is a process group
    torch.manual_seed(0)
    quantizers = {
        "lfq": LookupFreeQuantizer(4, temperature=1.0),
        "vq": VectorQuantizer(12, 4, entropy_temperature=0.5),
        "ibq": IndexBackpropQuantizer(12, 4, entropy_temperature=0.5),
        "ema": VectorQuantizer(12, 4, codebook_update="ema", ema_decay=0.5),
    }
    with torch.no_grad():
        quantizers["vq"].codebook.normal_()
        quantizers["ema"].codebook.normal_()
        quantizers["ema"].sums.copy_(quantizers["ema"].codebook / 12)
    return {name: quantizer.double() for name, quantizer in quantizers.items()}

def tokens(rank, world, step=0):
    generator = torch.Generator().manual_seed(step)
    parts = [torch.randn(1, 3 * (r + 1), 4, generator=generator, dtype=torch.float64) + r for r in range(2)]
    return parts[rank] if world > 1 else torch.cat(parts, 1)

def work(quantizers, rank, world):
    out = {}
    for name in ("lfq", "vq", "ibq"):
        z = tokens(rank, world).requires_grad_()
        result = quantizers[name](z)
        result.losses["entropy"].backward()
        # The gradient that an averaging over ranks leaves, for latents of which every rank has its own.
        out[name] = {"loss": result.losses["entropy"].detach(), "z": z.grad / world}
        if "batch_entropy" in result.statistics:
            out[name]["batch_entropy"] = result.statistics["batch_entropy"]
        for parameter in quantizers[name].parameters():
            out[name]["codebook"] = parameter.grad
    for step in range(3):
        quantizers["ema"](tokens(rank, world, step))
        quantizers["ema"].commit_update()
    out["ema"] = {key: value.clone() for key, value in quantizers["ema"].state_dict().items()}
    return out
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes found, and what one finds with the tokens of both."""
    found = ranks.run_ranks(tmp_path_factory.mktemp("defects"), SOURCE, 2)
    space = {}
    exec(SOURCE, space)
    return found, space["work"](space["build"](), 0, 1)


def test_defect_01_batch_entropy_under_ddp_is_that_of_all_tokens(processes):
    (first, second), single = processes
    expected = single["lfq"]
    for rank in (first["lfq"], second["lfq"]):
        torch.testing.assert_close(rank["batch_entropy"], expected["batch_entropy"])
        torch.testing.assert_close(rank["loss"], expected["loss"])
    both = torch.cat([first["lfq"]["z"], second["lfq"]["z"]], 1)
    torch.testing.assert_close(both, expected["z"])


def test_defect_02_a_module_built_before_the_process_group_synchronises_all_the_same(processes):
    (first, second), single = processes
    for key, value in first["ema"].items():
        assert torch.equal(value, second["ema"][key])
        torch.testing.assert_close(value, single["ema"][key])


@pytest.mark.parametrize("name", ["vq", "ibq"])
def test_defect_16_mean_probabilities_are_reduced_over_ranks_for_every_codebook(processes, name):
    (first, second), single = processes
    torch.testing.assert_close(first[name]["loss"], single[name]["loss"])
    torch.testing.assert_close(second[name]["loss"], single[name]["loss"])
    averaged = (first[name]["codebook"] + second[name]["codebook"]) / 2
    torch.testing.assert_close(averaged, single[name]["codebook"])
    torch.testing.assert_close(torch.cat([first[name]["z"], second[name]["z"]], 1), single[name]["z"])


# ---- 3 to 9


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_defect_03_masked_commitment_compares_in_the_space_of_the_codes(l2_normalize, projected):
    torch.manual_seed(0)
    quantizer = spread_codes(VectorQuantizer(8, 3 if projected else 6, l2_normalize))
    quantizer = Factorized(quantizer, 6) if projected else quantizer
    z, mask = latents(2, 5, 6, scale=3), torch.arange(10).view(2, 5) % 3 > 0
    masked, kept = quantizer(z, mask), quantizer(z[mask].unsqueeze(0))
    torch.testing.assert_close(masked.losses["commitment"], kept.losses["commitment"])
    torch.testing.assert_close(masked.losses["codebook"], kept.losses["codebook"])


STACKS = {
    "vq": lambda: Residual(VectorQuantizer(8, 4), 4),
    "lfq": lambda: Residual([LookupFreeQuantizer(4, scale=2.0**-i) for i in range(4)]),
    "sim-vq": lambda: Residual(SimVQ(8, 4), 4),
    "grouped": lambda: Grouped(Residual(VectorQuantizer(8, 2), 4), 2),
}


@pytest.mark.parametrize("name", STACKS)
def test_defect_04_the_task_gradient_passes_a_residual_stack_once(name):
    torch.manual_seed(0)
    quantizer = spread_codes(STACKS[name]())
    z, upstream = latents(2, 5, 4).requires_grad_(), latents(2, 5, 4, seed=2)
    result = quantizer(z)
    (gradient,) = torch.autograd.grad((result.quantized * upstream).sum(), z, retain_graph=True)
    assert torch.equal(gradient, upstream)


def test_defect_04_every_level_of_a_residual_stack_commits_the_encoder():
    quantizer = spread_codes(Residual(VectorQuantizer(8, 4), 4))
    z = latents(2, 5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(z).losses["commitment"], z)
    # By hand: the mean over levels of 2 (r_i - code_i) / elements.
    rest, expected = z.detach(), torch.zeros(2, 5, 4)
    for level in quantizer.quantizers:
        rest = rest - level(rest).quantized.detach()
        expected += 2 * rest / rest.numel() / 4
    torch.testing.assert_close(gradient, expected)


def test_defect_05_rotation_is_exact_and_finite_at_zero_and_at_opposite_vectors():
    codes = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    z = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-1e-30, 1e-30], [3.0, 4.0]], requires_grad=True)
    rotated = rotation(z, codes)
    assert torch.equal(rotated, codes)
    (gradient,) = torch.autograd.grad(rotated.sum(), z)
    assert gradient.isfinite().all() and (gradient.abs() <= 10).all()


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_defect_06_a_latent_that_is_not_finite_changes_no_averaged_code(l2_normalize):
    broken, clean = (
        spread_codes(VectorQuantizer(8, 4, l2_normalize, codebook_update="ema", ema_decay=0.5)) for _ in range(2)
    )
    z, keep = latents(1, 12, 4), torch.arange(12).unsqueeze(0) > 1
    broken(torch.where(torch.arange(12).view(1, 12, 1) == 0, torch.nan, z).index_fill(1, torch.tensor([1]), torch.inf))
    clean(z, keep)
    broken.commit_update()
    clean.commit_update()
    for key, value in broken.state_dict().items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, clean.state_dict()[key])


@pytest.mark.parametrize("bits,dtype", [(18, torch.bfloat16), (36, torch.float32), (62, torch.float32)])
def test_defect_07_spherical_indices_are_packed_in_integers(bits, dtype):
    quantizer = BinarySphericalQuantizer(bits, entropy_group=1).eval()
    z = latents(1, 200, bits).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = quantizer(z).indices
    by_hand = [int("".join("1" if value > 0 else "0" for value in token), 2) for token in z[0].tolist()]
    assert indices.flatten().tolist() == by_hand
    assert torch.equal(unpack_bits(indices[..., 0], bits, "most_significant_first"), z > 0)
    assert torch.equal(pack_bits(z > 0, "most_significant_first"), indices[..., 0])


def test_defect_07_the_scale_of_the_spherical_gradient_is_a_choice():
    for scaled, expected in ((False, 1.0), (True, 0.25)):
        z = F.normalize(latents(1, 3, 16), dim=-1).requires_grad_()
        result = BinarySphericalQuantizer(16, l2_normalize=False, scaled_gradient=scaled)(z)
        (gradient,) = torch.autograd.grad(result.quantized.sum(), z)
        torch.testing.assert_close(gradient, torch.full_like(z, expected))


def test_defect_08_beta_weights_the_commitment_and_not_the_codebook():
    quantizer = spread_codes(VectorQuantizer(8, 4))
    assert quantizer.default_loss_weights == {"commitment": 0.25, "codebook": 1.0}
    z = latents(1, 6, 4).requires_grad_()
    losses = quantizer(z).losses
    both = [z, quantizer.codebook]
    to_z, to_codebook = torch.autograd.grad(losses["commitment"], both, allow_unused=True, retain_graph=True)
    assert to_z.abs().sum() > 0 and to_codebook is None
    to_z, to_codebook = torch.autograd.grad(losses["codebook"], both, allow_unused=True)
    assert to_z is None and to_codebook.abs().sum() > 0


def test_defect_08_an_averaged_codebook_constructs_and_learns():
    quantizer = spread_codes(VectorQuantizer(8, 4, codebook_update="ema", ema_decay=0.5))
    before = quantizer.codebook.clone()
    quantizer(latents(1, 40, 4))
    quantizer.commit_update()
    assert not torch.equal(quantizer.codebook, before) and quantizer.codebook.isfinite().all()


def test_defect_08_gumbel_takes_the_likeliest_code_in_evaluation_every_time():
    torch.manual_seed(0)
    quantizer, z = GumbelQuantizer(16, 4), latents(1, 50, 4)
    drawn = [quantizer(z).indices for _ in range(2)]
    assert not torch.equal(*drawn)
    quantizer.eval()
    found = quantizer(z).indices
    assert torch.equal(quantizer(z).indices, found) and torch.equal(quantizer.encode(z), found)
    assert torch.equal(found[..., 0], quantizer.logits(z).argmax(-1))


@pytest.mark.parametrize("settings", [{}, {"codebook_update": "ema"}, {"restart_after": 3}, {"anchors": True}])
def test_defect_09_no_state_is_a_parameter_or_keeps_a_graph(settings):
    quantizer = VectorQuantizer(8, 4, l2_normalize=True, **settings)
    assert {name for name, _ in quantizer.named_parameters()} <= {"codebook"}
    sizes = []
    for step in range(3):
        result = quantizer(latents(1, 12, 4, seed=step).requires_grad_())
        (result.quantized.sum() + sum(result.losses.values())).backward()
        quantizer.commit_update()
        held = {key: value for key, value in vars(quantizer).items() if isinstance(value, torch.Tensor)}
        states = [*quantizer.buffers(), *held.values()]
        assert all(value.grad_fn is None and not value.requires_grad for value in states)
        sizes.append(sum(value.numel() for value in states))
    assert len(set(sizes)) == 1


def test_defect_09_losses_are_numbers_in_evaluation_and_entropy_only_where_asked_for(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("entropy computed although nobody asked")

    z = latents(1, 6, 4)
    monkeypatch.setattr("vistok.quantizers.vq.codebook_entropy", refuse)
    quantizer = VectorQuantizer(8, 4)
    for mode in (True, False):
        losses = quantizer.train(mode)(z).losses
        assert set(losses) == {"commitment", "codebook"} and all(value.isfinite() for value in losses.values())
    with pytest.raises(AssertionError, match="nobody asked"):
        VectorQuantizer(8, 4, entropy_temperature=1.0)(z)


# ---- 10 to 16, without processes


def make_pyramid():
    torch.manual_seed(0)
    return spread_codes(MultiScaleResidual(VectorQuantizer(16, 4), (1, 2, 4), phi_sharing=2))


def test_defect_10_a_mask_of_integers_is_refused():
    for quantizer in (VectorQuantizer(8, 4), LookupFreeQuantizer(4), make_pyramid()):
        with pytest.raises(TypeError, match="bool"):
            quantizer(latents(2, 4, 4, 4), torch.ones(2, 4, 4, dtype=torch.int64))


def test_defect_10_losses_of_a_pyramid_are_means_over_its_scales_in_both_modes():
    quantizer, z = make_pyramid(), latents(2, 4, 4, 4)
    for mode in (True, False):
        result = quantizer.train(mode)(z)
        sums = [quantizer.decode(result.indices[:, :rows]) for rows in (1, 1 + 4, 1 + 4 + 16)]
        expected = torch.stack([(z - total).square().mean() for total in sums]).mean()
        torch.testing.assert_close(result.losses["commitment"], expected)
        torch.testing.assert_close(result.losses["codebook"], expected)


def test_defect_11_groups_have_a_batch_entropy_each_unless_one_quantizer_is_shared():
    # Group 0 uses one code only and group 1 another: each by itself uses half of nothing, mixed they look diverse.
    z = torch.tensor([4.0, 4.0, -4.0, -4.0]).expand(1, 6, 4)
    inner = {"dim": 2, "temperature": 1.0}
    apart = Grouped(LookupFreeQuantizer(**inner), 2)(z).statistics["batch_entropy"]
    mixed = Grouped(LookupFreeQuantizer(**inner), 2, shared=True)(z).statistics["batch_entropy"]
    assert apart < 1e-3
    torch.testing.assert_close(mixed, torch.tensor(2.0).log(), atol=1e-3, rtol=0)


def test_defect_11_the_mask_of_grouped_training_is_the_mask_that_was_given():
    z, mask = latents(2, 5, 8), torch.arange(10).view(2, 5) % 3 > 0
    quantizer = Grouped(LookupFreeQuantizer(4, temperature=1.0), 2, shared=True)
    masked, kept = quantizer(z, mask), quantizer(z[mask].unsqueeze(0))
    assert torch.equal(masked.indices[mask], kept.indices[0]) and (masked.indices[~mask] == -1).all()
    for name, loss in masked.losses.items():
        torch.testing.assert_close(loss, kept.losses[name])


@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_defect_12_a_loaded_codebook_is_not_initialised_again(codebook_update):
    def make():
        return VectorQuantizer(8, 4, kmeans_steps=1, codebook_update=codebook_update, ema_decay=0.999)

    trained = make()
    trained(latents(1, 64, 4))
    trained.commit_update()
    loaded = make()
    loaded.load_state_dict(trained.state_dict())
    # Far away from what was learned: k-means on these would take the codebook along.
    loaded(latents(1, 64, 4, seed=1) + 50)
    loaded.commit_update()
    moved = (loaded.codebook - trained.codebook).abs().amax(1)
    assert (moved < 1e-4).sum() >= 7  # all but the one code that all of these latents are assigned to


@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_defect_12_a_restarted_code_stays_where_it_was_put(codebook_update):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, restart_below=0.6, ema_decay=0.5, codebook_update=codebook_update)
    far = latents(1, 32, 4) + 10
    quantizer(far)
    quantizer.commit_update()
    moved = (quantizer.codebook.detach().unsqueeze(1) - far[0]).abs().amax(-1).amin(1) < 1e-5
    assert moved.sum() >= 7
    put = quantizer.codebook.detach().clone()
    quantizer(put[moved].repeat(1, 4, 1).view(1, -1, 4))  # latents at these codes give nothing a reason to move
    quantizer.commit_update()
    torch.testing.assert_close(quantizer.codebook.detach()[moved], put[moved], atol=1e-3, rtol=1e-4)


def test_defect_13_both_bit_orders_exist_and_are_named():
    z = torch.tensor([[[1.0, -1.0, -1.0, -1.0]]])
    for order, index in (("least_significant_first", 1), ("most_significant_first", 8)):
        quantizer = LookupFreeQuantizer(4, bit_order=order).eval()
        assert quantizer(z).indices.item() == index
        assert torch.equal(quantizer.decode(torch.tensor([[[index]]])), z)
    assert LookupFreeQuantizer(4)(z).indices.item() == 1 and BinarySphericalQuantizer(4)(z).indices.item() == 8


EMPTY = {
    "vq": lambda: VectorQuantizer(8, 4, entropy_temperature=0.1),
    "ema": lambda: VectorQuantizer(8, 4, codebook_update="ema", restart_below=0.5),
    "lfq": lambda: LookupFreeQuantizer(4),
    "bsq": lambda: BinarySphericalQuantizer(4),
    "ibq": lambda: IndexBackpropQuantizer(8, 4),
    "gumbel": lambda: GumbelQuantizer(8, 4),
    "sim-vq": lambda: SimVQ(8, 4),
    "residual": lambda: Residual(VectorQuantizer(8, 4), 2),
    "grouped": lambda: Grouped(LookupFreeQuantizer(2), 2),
}


@pytest.mark.parametrize("name", EMPTY)
def test_defect_14_a_batch_without_a_kept_token_has_zero_losses_and_changes_nothing(name):
    torch.manual_seed(0)
    quantizer = EMPTY[name]()
    before = remember(quantizer)
    z = torch.full((2, 3, 4), torch.nan).requires_grad_()
    result = quantizer(z, torch.zeros(2, 3, dtype=torch.bool))
    assert (result.indices == -1).all() and (result.quantized == 0).all()
    for loss in result.losses.values():
        assert loss == 0
    total = result.quantized.sum() + sum(result.losses.values())
    total.backward()
    for leaf in (z, *quantizer.parameters()):
        assert leaf.grad is None or (leaf.grad == 0).all()
    if name != "gumbel":  # it counts optimizer steps, whatever they held
        quantizer.commit_update()
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key])


def test_defect_15_a_scalar_codebook_is_never_listed():
    quantizer = FiniteScalarQuantizer([16] * 9).eval()  # 2^36 codes
    held = [*quantizer.parameters(), *quantizer.buffers()]
    assert quantizer.codebook_sizes == (16**9,) and sum(value.numel() for value in held) < 100
    z = latents(1, 40, 9)
    result = quantizer(z)
    assert result.indices.max() > 2**32 and torch.equal(quantizer.decode(result.indices), result.quantized)
    largest = torch.tensor([[[16**9 - 1]]])
    assert torch.equal(quantizer.decode(largest), torch.full((1, 1, 9), 7 / 8))
