"""What every quantizer promises, asserted on every quantizer (and on some nested ones)."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch

from vistok.hub.weights import fill_weights
from vistok.layers.configurable import build
from vistok.quantizers.bernoulli import BernoulliQuantizer
from vistok.quantizers.bsq import BinarySphericalQuantizer
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.gumbel import GumbelQuantizer
from vistok.quantizers.ibq import IndexBackpropQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.perturbation import LatentPerturbation
from vistok.quantizers.product import Product
from vistok.quantizers.residual import Residual
from vistok.quantizers.scalar import ScalarQuantizer
from vistok.quantizers.shared_index import SharedIndex
from vistok.quantizers.sim_vq import SimVQ
from vistok.quantizers.vq import VectorQuantizer

GRID = (4, 4)

MAKE = {
    "vq": lambda: VectorQuantizer(12, 4),
    "vq-l2-restart": lambda: VectorQuantizer(12, 4, l2_normalize=True, restart_after=2),
    "vq-ema": lambda: VectorQuantizer(12, 4, codebook_update="ema", restart_below=0.1),
    "vq-kmeans": lambda: VectorQuantizer(12, 4, codebook_update="ema", kmeans_steps=2),
    "vq-anchors": lambda: VectorQuantizer(12, 4, anchors=True),
    "vq-rotation": lambda: VectorQuantizer(12, 4, estimator="rotation"),
    "vq-softmax": lambda: VectorQuantizer(12, 4, estimator="softmax"),
    "vq-none": lambda: VectorQuantizer(12, 4, estimator="none"),
    "vq-entropy": lambda: VectorQuantizer(12, 4, l2_normalize=True, entropy_temperature=0.1),
    "sim-vq": lambda: SimVQ(12, 4),
    "ibq": lambda: IndexBackpropQuantizer(12, 4),
    "gumbel": lambda: GumbelQuantizer(12, 4),
    "lfq": lambda: LookupFreeQuantizer(4),
    "bsq": lambda: BinarySphericalQuantizer(4),
    "bernoulli": lambda: BernoulliQuantizer(4),
    "fsq": lambda: FiniteScalarQuantizer([5, 4, 3, 3]),
    "fsq-symmetric": lambda: FiniteScalarQuantizer([5, 4, 3, 2], symmetric=True),
    "fsq-noise": lambda: FiniteScalarQuantizer([5, 4, 3, 3], corrupt=0.5, bypass=0.3),
    "scalar": lambda: ScalarQuantizer(4, bits=3),
    "grouped": lambda: Grouped(VectorQuantizer(6, 2), 2),
    "grouped-shared": lambda: Grouped(LookupFreeQuantizer(2), 2, shared=True),
    "factorized": lambda: Factorized(VectorQuantizer(12, 3, l2_normalize=True), 4),
    "factorized-subcodes": lambda: Factorized(LookupFreeQuantizer(4), subcode_sizes=[4, 4]),
    "residual": lambda: Residual(VectorQuantizer(8, 4), 3),
    "residual-shared-dropout": lambda: Residual(
        VectorQuantizer(8, 4, codebook_update="ema"), 3, shared=True, dropout=0.5
    ),
    "residual-fsq": lambda: Residual(FiniteScalarQuantizer([5, 5, 5, 5]), 2),
    "residual-factorized": lambda: Residual(Factorized(VectorQuantizer(8, 2), 4), 2),
    "multi-scale": lambda: MultiScaleResidual(VectorQuantizer(8, 4), (1, 2, 4)),
    "product": lambda: Product([VectorQuantizer(6, 2), LookupFreeQuantizer(2)]),
    "grouped-residual": lambda: Grouped(Residual(VectorQuantizer(6, 2), 2), 2),
    "shared-index": lambda: SharedIndex(12, dims=[3, 1]),
    "perturbed": lambda: LatentPerturbation(VectorQuantizer(12, 4), num_neighbours=4, sample_fraction=0.7),
}
EVERY = pytest.mark.parametrize("name", MAKE)


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MAKE[name]().to(dtype)


def latents(dtype=torch.float32, seed=1):
    z = torch.randn(3, *GRID, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.7 * z).to(dtype)


def mask():
    return torch.rand(3, *GRID, generator=torch.Generator().manual_seed(2)) > 0.4


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(before, module):
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@EVERY
def test_shapes_ranges_and_bits(name):
    quantizer, z = make(name).eval(), latents()
    assert quantizer.dim == 4
    result = quantizer(z)
    blocks = quantizer.index_blocks(GRID)
    flat = result.indices.flatten(1, -2)
    assert flat.shape == (3, sum(block.length for block in blocks), quantizer.num_subcodes)
    assert flat.dtype == torch.int64 and result.quantized.shape == z.shape and result.quantized.dtype == torch.float32
    for subcode, size in enumerate(quantizer.codebook_sizes):
        assert flat[..., subcode].min() >= 0 and flat[..., subcode].max() < size
    assert result.statistics["counts"].shape == (sum(quantizer.codebook_sizes),)
    assert int(result.statistics["counts"].sum()) == flat.numel()
    assert set(result.losses) == set(quantizer.default_loss_weights)
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in result.losses.values())


@EVERY
def test_decode_of_encode_is_forward_in_eval_bit_for_bit(name):
    quantizer, z = make(name).eval(), latents()
    for values in (z, z.double(), z.bfloat16()):
        result = quantizer(values)
        assert torch.equal(quantizer.encode(values), result.indices)
        decoded = quantizer.decode(result.indices)
        assert torch.equal(decoded.to(result.quantized.dtype), result.quantized)
    assert torch.equal(quantizer(z).quantized, quantizer(z).quantized)


@EVERY
def test_the_same_keys_come_in_training_and_evaluation(name):
    quantizer, z = make(name), latents()
    train, evaluation = quantizer.train()(z), quantizer.eval()(z)
    assert set(train.losses) == set(evaluation.losses)


@EVERY
def test_dropped_positions_count_for_nothing(name):
    outcomes = []
    for filling in (0.0, float("nan"), 1e4):
        quantizer, keep = make(name), mask()
        z = latents().masked_fill(~keep.unsqueeze(-1), filling).requires_grad_()
        torch.manual_seed(5)
        result = quantizer(z, keep)
        assert (result.quantized[~keep] == 0).all()
        if name != "multi-scale":  # its coarser tokens stand for several positions
            assert (result.indices[~keep] == -1).all()
        loss = result.quantized.square().sum() + sum(result.losses.values())
        if loss.requires_grad:
            loss.backward()
            assert z.grad is None or (z.grad[~keep] == 0).all()
        quantizer.commit_update()
        outcomes.append((result.quantized.detach(), result.indices, dict(result.losses), z.grad, state(quantizer)))
        assert int(result.statistics["counts"].sum()) == int((result.indices >= 0).sum())
    for other in outcomes[1:]:
        for mine, theirs in zip(outcomes[0][:2], other[:2], strict=True):
            assert torch.equal(mine, theirs)
        assert all(torch.equal(value, other[2][key]) for key, value in outcomes[0][2].items())
        assert outcomes[0][3] is None or torch.equal(outcomes[0][3], other[3])
        assert all(torch.equal(value, other[4][key]) for key, value in outcomes[0][4].items())


@EVERY
def test_a_batch_without_any_kept_position_gives_zero_losses(name):
    quantizer = make(name)
    z = latents().requires_grad_()
    result = quantizer(z, torch.zeros(3, *GRID, dtype=torch.bool))
    assert (result.indices == -1).all() and (result.quantized == 0).all()
    total = sum(result.losses.values()) + result.quantized.sum()
    assert all(float(loss.detach()) == 0 for loss in result.losses.values())
    if total.requires_grad:
        total.backward()
        assert z.grad is None or (z.grad == 0).all()
    before = [parameter.detach().clone() for parameter in quantizer.parameters()]
    quantizer.commit_update()
    for old, parameter in zip(before, quantizer.parameters(), strict=True):
        assert torch.equal(old, parameter) and (parameter.grad is None or parameter.grad.isfinite().all())


@EVERY
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_index(name, precision):
    quantizer, z = make(name).eval(), latents()
    expected = quantizer(z)
    with torch.autocast("cpu", precision):
        found = quantizer(z)
        assert torch.equal(quantizer.encode(z), expected.indices)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.quantized, expected.quantized)


@EVERY
def test_latents_that_are_not_finite_change_no_codebook(name):
    """They are bad data or a broken step; a codebook that met them would be lost."""
    if "factorized" in name or name == "multi-scale":
        return  # the learned projection, or the interpolation between scales, spreads them
    clean, dirty = make(name), make(name)
    keep = mask()
    z = latents()
    broken = torch.where(keep.unsqueeze(-1), z, torch.tensor(float("nan")))
    for quantizer, values, kept in ((clean, z, keep), (dirty, broken, None)):
        torch.manual_seed(3)
        for _ in range(3):
            result = quantizer(values, kept)
            assert result.indices.max() < max(quantizer.codebook_sizes)
            quantizer.commit_update()
    for key, value in clean.state_dict().items():
        torch.testing.assert_close(dirty.state_dict()[key], value, msg=key)
    loss = sum(dirty(broken).losses.values(), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
        for key, parameter in dirty.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), key


@EVERY
def test_evaluation_changes_nothing(name):
    quantizer = make(name)
    quantizer(latents())
    quantizer.commit_update()
    before = state(quantizer)
    quantizer.eval()
    quantizer(latents())
    quantizer.encode(latents())
    quantizer.commit_update()
    quantizer.train()
    with torch.no_grad():
        quantizer(latents())
    stepless = {key: value for key, value in before.items() if "step" not in key}
    assert_same_state(stepless | {k: v for k, v in state(quantizer).items() if k not in stepless}, quantizer)


@EVERY
def test_copies_pickles_and_state_dicts_are_the_same_quantizer(name):
    quantizer = make(name)
    for _ in range(3):
        quantizer(latents())
        quantizer.commit_update()
    quantizer.eval()
    expected = quantizer(latents())
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    rebuilt = build(json.loads(json.dumps(quantizer.config))).eval()
    rebuilt.load_state_dict(quantizer.state_dict(), strict=True)
    for other in (copy.deepcopy(quantizer), torch.load(buffer, weights_only=False), rebuilt):
        found = other(latents())
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.quantized, expected.quantized)


@EVERY
def test_a_quantizer_loads_into_its_meta_form(name):
    """Checkpoints are loaded so: built without memory, then given their tensors; constants are computed anew."""
    quantizer = make(name).eval()
    with torch.device("meta"):
        empty = build(quantizer.config)
    fill_weights(empty, dict(quantizer.state_dict()), Path("nowhere"))
    expected, found = quantizer(latents()), empty.eval()(latents())
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.quantized, expected.quantized)
    assert torch.equal(empty.neighbours(found.indices, 3), quantizer.neighbours(found.indices, 3))


@EVERY
def test_training_forward_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    quantizer, z = make(name), latents().requires_grad_()
    torch.manual_seed(4)
    expected = quantizer(z)
    quantizer = make(name)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    torch.manual_seed(4)
    found = compiled(z)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.quantized, expected.quantized)
    for key, value in expected.losses.items():
        torch.testing.assert_close(found.losses[key], value)


@EVERY
def test_a_second_forward_of_the_same_batch_counts_once(name):
    """A GAN step or activation checkpointing runs the generator twice; accumulation splits a batch in two."""
    if name == "vq-kmeans":
        return  # starts from latents drawn at random, and draws others from the second forward
    once, twice = make(name), make(name)
    for quantizer, repeats in ((once, 1), (twice, 2)):
        for step in range(3):
            for _ in range(repeats):
                torch.manual_seed(step)
                quantizer(latents(seed=step))
            torch.manual_seed(step)
            quantizer.commit_update()
    for (key, value), other in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=key)


@EVERY
def test_neighbours_lead_with_the_code_and_move_away(name):
    quantizer = make(name).eval()
    indices = quantizer.encode(latents())
    found, distances = quantizer.neighbour_distances(indices, 5)
    assert found.shape == (*indices.shape[:-1], 5, quantizer.num_subcodes) and distances.shape == found.shape[:-1]
    assert torch.equal(found[..., 0, :], indices) and (distances[..., 0] == 0).all()
    assert (distances.diff(dim=-1) >= 0).all()
    assert torch.equal(quantizer.neighbours(indices, 5), found)
    for subcode, size in enumerate(quantizer.codebook_sizes):
        assert found[..., subcode].min() >= 0 and found[..., subcode].max() < size
    first = found.reshape(-1, 5, quantizer.num_subcodes)[0].tolist()
    assert len({tuple(code) for code in first}) == 5
    dropped = torch.full_like(indices, -1)
    assert (quantizer.neighbours(dropped, 2) == -1).all()
    with pytest.raises(ValueError, match="k must"):
        quantizer.neighbours(indices, 0)
    with pytest.raises(ValueError, match="k must"):
        quantizer.neighbours(indices, 10**7)


@EVERY
def test_bad_input_is_named(name):
    quantizer, z = make(name), latents()
    with pytest.raises(ValueError, match=r"channels last; got \(3, 4, 4, 5\)"):
        quantizer(torch.zeros(3, 4, 4, 5))
    with pytest.raises(TypeError, match=r"floating-point tensor; got torch.int64"):
        quantizer(z.long())
    with pytest.raises(TypeError, match="mask must be bool"):
        quantizer(z, torch.ones(3, *GRID))
    with pytest.raises(ValueError, match="mask must have shape"):
        quantizer(z, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="int64"):
        quantizer.decode(torch.zeros(3, 4, quantizer.num_subcodes))
    with pytest.raises(ValueError, match=r"got \(3, 4, 9\)"):
        quantizer.decode(torch.zeros(3, 4, 9, dtype=torch.int64))


@EVERY
def test_half_precision_modules_keep_their_state_in_float32(name):
    quantizer = make(name)
    for cast, expected in (("double", torch.float64), ("float", torch.float32), ("half", torch.float32)):
        getattr(quantizer, cast)()
        assert all(getattr(quantizer, key).dtype == expected for key in quantizer.float32_buffers)
    quantizer = make(name).bfloat16()
    assert all(getattr(quantizer, key).dtype == torch.float32 for key in quantizer.float32_buffers)
    result = quantizer(latents(torch.bfloat16))
    assert result.quantized.dtype == torch.float32
    quantizer.commit_update()


STRAIGHT = ["vq", "vq-ema", "vq-anchors", "lfq", "grouped", "residual", "residual-shared-dropout", "multi-scale"]
STRAIGHT += ["residual-fsq", "residual-factorized", "product", "grouped-residual", "perturbed", "scalar"]


@pytest.mark.parametrize("name", STRAIGHT)
def test_the_gradient_arrives_once_and_unchanged(name):
    quantizer, z = make(name, torch.float64), latents(torch.float64).requires_grad_()
    upstream = latents(torch.float64, seed=9)
    (grad,) = torch.autograd.grad((quantizer(z).quantized * upstream).sum(), z)
    assert torch.equal(grad, upstream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY
def test_training_on_a_gpu_equals_the_cpu_and_never_waits_for_it(name):
    quantizer, z = make(name).eval(), latents()
    expected = quantizer(z)
    quantizer.cuda()
    assert torch.equal(quantizer.encode(z.cuda()).cpu(), expected.indices)
    quantizer.train()
    on_gpu = z.cuda().requires_grad_()
    for _ in range(3):  # the first steps may build kernels and initialise codebooks
        quantizer(on_gpu)
        quantizer.commit_update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = quantizer(on_gpu)
        (result.quantized.sum() + sum(result.losses.values())).backward()
        quantizer.commit_update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
