"""Codebooks that change without a gradient: averages, k-means, restart, anchors; softmax gradient and entropy."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vistok import VectorQuantizer
from vistok.quantizers.estimators import rotation
from vistok.quantizers.kmeans import kmeans

_spec = importlib.util.spec_from_file_location("vistok_test_parity", Path(__file__).with_name("parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

BOTH = pytest.mark.parametrize("l2_normalize", [False, True])


def make(codes=12, dim=3, *args, dtype=torch.float64, **options):
    """A quantizer whose codebook is spread out, with averages that belong to it."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes, dim, *args, **options).to(dtype)
    with torch.no_grad():
        quantizer.codebook.normal_()
        if quantizer.l2_normalize:
            quantizer.codebook.copy_(F.normalize(quantizer.codebook, dim=1))
        if quantizer.ema:
            quantizer.sums.copy_(quantizer.codebook / codes)
            quantizer.usage.fill_(1 / codes)
    return quantizer


def ema(*args, **options):
    return make(*args, codebook_update="ema", **options)


def tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(quantizer, *batches, mask=None, **options):
    results = [quantizer(z, mask, **options) for z in batches]
    quantizer.commit_update()
    return results[-1]


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same(first, second, tolerance=0.0):
    return all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


# ---- moving averages


@BOTH
def test_averages_equal_the_published_recursion_on_counts(l2_normalize):
    """n <- g n + (1-g) c, s <- g s + (1-g) sum(z), n~ = (n+e)/(sum n + K e) sum n, code = s / n~, in tokens."""
    quantizer, per_step, decay = ema(12, 3, l2_normalize, ema_decay=0.9, ema_eps=1e-3), 20, 0.9
    eps = 1e-3 * per_step / 12  # a number of tokens there, a share of uniform usage here
    codes = quantizer.codebook.clone()
    n = torch.full((12,), per_step / 12, dtype=torch.float64)
    s = n[:, None] * codes
    for number in range(5):
        z = tokens(2, 10, 3, seed=number)
        step(quantizer, z)
        flat = z.view(-1, 3)
        flat = F.normalize(flat, dim=1) if l2_normalize else flat
        onehot = F.one_hot(torch.cdist(flat, codes).argmin(1), 12).double()
        n, s = decay * n + (1 - decay) * onehot.sum(0), decay * s + (1 - decay) * onehot.T @ flat
        codes = s / ((n + eps) / (n.sum() + 12 * eps) * n.sum())[:, None]
        codes = F.normalize(codes, dim=1) if l2_normalize else codes
        assert torch.allclose(quantizer.codebook, codes, rtol=1e-12, atol=1e-14), number
        assert torch.allclose(quantizer.usage, n / per_step, rtol=1e-12)


def test_an_averaged_codebook_is_no_parameter_and_has_no_loss_of_its_own():
    quantizer, z = ema(), tokens(2, 5, 3).requires_grad_()
    assert not list(quantizer.parameters())
    result = quantizer(z)
    assert set(result.losses) == {"commitment"} == set(quantizer.default_loss_weights)
    result.losses["commitment"].backward()
    assert torch.allclose(z.grad, 2 * (z.detach() - result.quantized.detach()) / z.numel(), atol=1e-15)


OPTIONS = {
    "ema": {"codebook_update": "ema"},
    "ema-restart": {"codebook_update": "ema", "restart_below": 0.9, "ema_decay": 0.5},
    "anchors": {"anchors": True, "ema_decay": 0.5},
    "anchors-l2": {"anchors": True, "ema_decay": 0.5, "l2_normalize": True},
    "restart": {"restart_below": 0.9, "ema_decay": 0.5},
    "kmeans": {"kmeans_steps": 1, "restart_after": 3},
}
ALL = pytest.mark.parametrize("name", OPTIONS)


@ALL
def test_micro_batches_are_one_batch_and_a_second_forward_counts_once(name):
    z = tokens(4, 6, 3)
    outcomes = []
    for batches in ([z], [z[:1], z[1:]], [z, z]):
        quantizer = make(**OPTIONS[name])
        torch.manual_seed(3)
        step(quantizer, *batches)
        outcomes.append(state(quantizer))
    if name in ("ema", "anchors", "anchors-l2"):  # the others draw random numbers
        assert same(outcomes[0], outcomes[1], 1e-12) and same(outcomes[0], outcomes[2], 1e-12)
    for key in set(outcomes[0]) - {"codebook", "sums"}:
        assert all(torch.allclose(outcomes[0][key].double(), other[key].double(), atol=1e-12) for other in outcomes), (
            key
        )


@ALL
def test_evaluation_and_no_grad_leave_the_state_bitwise_alone(name):
    quantizer, z = make(**OPTIONS[name]), tokens(4, 6, 3)
    before = state(quantizer)
    with torch.no_grad():
        step(quantizer, z)
    step(quantizer.eval(), z)
    quantizer.train().commit_update()
    assert same(before, state(quantizer))


@ALL
def test_a_step_of_dropped_tokens_changes_nothing(name):
    quantizer, z = make(**OPTIONS[name]), tokens(4, 6, 3)
    z[:] = float("nan")
    before = state(quantizer)
    before.pop("kmeans_steps_left", None)
    step(quantizer, z, mask=torch.zeros(4, 6, dtype=torch.bool))
    assert same(before, state(quantizer))


@ALL
def test_a_step_without_any_finite_token_changes_nothing(name):
    quantizer, z = make(**OPTIONS[name]), torch.full((4, 6, 3), float("nan"), dtype=torch.float64)
    before = state(quantizer)
    before.pop("kmeans_steps_left", None)
    step(quantizer, z)
    assert same(before, state(quantizer))


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_dropped_and_not_finite_tokens_do_not_enter_the_state(name, bad):
    clean = tokens(2, 6, 3)
    padded = torch.cat([clean, torch.full((2, 2, 3), bad, dtype=torch.float64)], 1)
    keep = torch.arange(8).expand(2, 8) < 6
    outcomes = []
    for z, mask in ((clean, None), (padded, keep), (padded, None)):
        quantizer = make(**OPTIONS[name])
        step(quantizer, z, mask=mask)
        outcomes.append(state(quantizer))
    assert all(torch.isfinite(value).all() for one in outcomes for value in one.values())
    largest = max(clean.abs().max(), make().codebook.abs().max()) + 1e-9
    assert all(one["codebook"].abs().max() <= largest for one in outcomes)
    random = ("codebook", "sums") if name not in ("ema", "anchors", "anchors-l2") else ()
    for key in set(outcomes[0]) - set(random):
        assert torch.allclose(outcomes[0][key], outcomes[1][key], atol=1e-12), key
        assert torch.allclose(outcomes[0][key], outcomes[2][key], atol=1e-12), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_stay_float32_when_the_module_is_cast(dtype):
    quantizer = ema(dtype=torch.float32, restart_below=0.1).to(dtype)
    assert all(value.dtype == torch.float32 for value in quantizer.state_dict().values())
    reference = ema(dtype=torch.float32, restart_below=0.1)
    z = tokens(2, 30, 3, dtype=dtype)
    step(quantizer, z), step(reference, z.float())
    assert same(state(quantizer), state(reference))
    anchored = make(anchors=True, dtype=dtype)
    assert anchored.usage.dtype == torch.float32 and anchored.codebook.dtype == dtype


# ---- restart


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_exactly_the_codes_below_the_share_of_uniform_usage_move(update):
    quantizer = make(codebook_update=update, restart_below=0.8, ema_decay=0.5)
    z = tokens(1, 200, 3)
    before = state(quantizer)
    counts = step(quantizer, z).statistics["counts"]
    usage = 0.5 / 12 + 0.5 * counts / 200
    dead = usage < 0.8 / 12
    assert 0 < dead.sum() < 12
    on_a_token = (quantizer.codebook[:, None] == z[0]).all(-1).any(1)
    assert torch.equal(on_a_token, dead)
    assert torch.allclose(quantizer.usage, usage.double().masked_fill(dead, 1 / 12), rtol=1e-12)
    if update == "gradient":
        assert torch.equal(quantizer.codebook[~dead], before["codebook"][~dead])


@pytest.mark.parametrize("dead,later", [("restart_below", 0.1), ("restart_after", 10)])
def test_a_moved_code_stays_when_the_averages_go_on(dead, later):
    quantizer, z = ema(ema_decay=0.5, ema_eps=1e-12, **{dead: 0.8 if later < 1 else 1}), tokens(1, 10, 3)
    step(quantizer, z)
    moved = (quantizer.codebook[:, None] == z[0]).all(-1).any(1)
    before = quantizer.codebook.clone()
    setattr(quantizer, dead, later)  # no further restart
    used = step(quantizer, torch.full((1, 5, 3), 50.0, dtype=torch.float64)).indices.unique()
    waiting = moved.index_fill(0, used, False)
    assert waiting.sum() >= 3 and torch.allclose(quantizer.codebook[waiting], before[waiting], atol=1e-9)


def test_more_codes_than_tokens_does_not_make_every_code_dead():
    """A threshold in tokens would: 16 tokens for 4096 codes, far below two tokens a code."""
    quantizer = ema(4096, 2, restart_below=0.5)
    before = quantizer.codebook.clone()
    used = step(quantizer, tokens(1, 16, 2)).indices.unique()
    unused = torch.ones(4096, dtype=torch.bool).index_fill_(0, used, False)
    assert torch.allclose(quantizer.codebook[unused], before[unused], rtol=1e-6, atol=1e-6)  # but for the smoothing


@pytest.mark.parametrize("options", [{"restart_after": 1}, {"kmeans_steps": 1, "kmeans_iterations": 1}])
def test_the_generator_decides_where_codes_go(options):
    outcomes = []
    for seed in (1, 1, 2):
        quantizer = make(15, **options)
        torch.manual_seed(len(outcomes))
        step(quantizer, tokens(1, 20, 3), generator=torch.Generator().manual_seed(seed))
        outcomes.append(quantizer.codebook.detach().clone())
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])


def test_averages_and_restart_bring_nearly_all_codes_into_use():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(512, 8, codebook_update="ema", restart_below=0.1, ema_decay=0.9)
    start = quantizer.encode(torch.randn(1, 8192, 8)).unique().numel()
    for _ in range(200):
        step(quantizer, torch.randn(1, 1024, 8))
    assert quantizer.encode(torch.randn(1, 8192, 8)).unique().numel() > 0.95 * 512 > start


# ---- k-means


def lloyd(points, centroids, normalize):
    """One iteration with dense distances."""
    found = torch.cdist(points, centroids).argmin(1)
    moved = centroids.clone()
    for k in range(len(centroids)):
        if (found == k).any():
            moved[k] = points[found == k].mean(0)
    return F.normalize(moved, dim=1) if normalize else moved


@BOTH
def test_kmeans_equals_dense_lloyd_and_never_increases_the_distortion(l2_normalize):
    points, centroids = tokens(300, 4), tokens(20, 4, seed=2) + 1
    centroids[7] = 100.0  # nobody's nearest
    if l2_normalize:
        points, centroids = F.normalize(points.abs(), dim=1), F.normalize(centroids, dim=1)
        centroids[7] = -torch.ones(4) / 2
    expected, distortions = centroids, []
    for iteration in range(6):
        found = kmeans(points, centroids, iteration, normalize=l2_normalize)
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.equal(found[7], centroids[7])
        distortions.append(torch.cdist(points, found).min(1).values.square().sum())
        expected = lloyd(points, expected, l2_normalize)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(distortions, distortions[1:], strict=False))
    assert distortions[-1] < 0.8 * distortions[0]


def test_points_that_do_not_count_move_no_centroid():
    points, centroids, valid = tokens(60, 4), tokens(5, 4, seed=2), torch.arange(60) % 3 > 0
    noisy = points.clone()
    noisy[~valid] = float("nan")
    expected = kmeans(points[valid], centroids, 3)
    assert torch.allclose(kmeans(noisy, centroids, 3, valid=valid), expected, atol=1e-12)


@BOTH
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_codebook_becomes_the_means_of_the_first_steps(update, l2_normalize):
    quantizer = make(12, 3, l2_normalize, codebook_update=update, kmeans_steps=3, kmeans_iterations=50)
    seen, before = [], quantizer.codebook.detach().clone()
    for number in range(3):
        assert torch.equal(quantizer.codebook, before)
        seen.append(tokens(2, 50, 3, seed=number))
        step(quantizer, seen[-1][:1], seen[-1][1:])  # two micro-batches
    points = torch.cat(seen).view(-1, 3)
    points = F.normalize(points, dim=1) if l2_normalize else points
    codebook = quantizer.codebook.detach()
    assert torch.allclose(lloyd(points, codebook, l2_normalize), codebook, atol=1e-6)  # a fixed point
    assert len(quantizer.encode(points[None]).unique()) == 12
    if update == "ema":
        assert torch.allclose(quantizer.sums, quantizer.codebook / 12) and (quantizer.usage == 1 / 12).all()
    step(quantizer, points[None])
    assert quantizer.kmeans_steps_left == 0


def test_kmeans_with_fewer_latents_than_codes_keeps_the_other_codes():
    quantizer, z = make(12, 3, kmeans_steps=1), tokens(1, 5, 3)
    before = quantizer.codebook.detach().clone()
    step(quantizer, z)
    kept = (quantizer.codebook == before).all(1)
    assert kept.sum() == 7
    assert {tuple(row) for row in quantizer.codebook[~kept].tolist()} == {tuple(row) for row in z[0].tolist()}


def test_a_loaded_codebook_is_not_made_anew():
    trained, z = make(kmeans_steps=2), tokens(2, 20, 3)
    step(trained, z), step(trained, z)
    loaded = make(kmeans_steps=2)
    loaded.load_state_dict(trained.state_dict())
    for seed in range(3):
        step(loaded, tokens(2, 20, 3, seed=seed) + 5)
    assert torch.equal(loaded.codebook, trained.codebook)
    started = make(kmeans_steps=2)
    step(started, z)
    resumed = make(kmeans_steps=2)
    resumed.load_state_dict(started.state_dict())
    step(resumed, z + 5)
    assert resumed.kmeans_steps_left == 0 and resumed.codebook.mean() > 3


# ---- anchors


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_titok_pulls_its_codes_alike(l2_normalize):
    _, weights, io = parity.fixture(f"losses-titok-cvq-{'l2' if l2_normalize else 'plain'}")
    quantizer = VectorQuantizer(64, 8, l2_normalize, anchors=True)
    quantizer.codebook.data.copy_(weights["embedding.weight"])
    quantizer.usage.copy_(weights["embed_prob"])
    z = parity.channel_last(io["z"]).contiguous().requires_grad_()
    result = quantizer(z)
    assert torch.equal(result.indices.squeeze(-1), io["indices"])
    parity.assert_close(result.quantized, parity.channel_last(io["z_quantized"]))
    parity.assert_close(0.25 * result.losses["commitment"], io["commitment_loss"])
    parity.assert_close(result.losses["codebook"], io["codebook_loss"])
    total = 0.25 * result.losses["commitment"] + result.losses["codebook"]
    parity.assert_close(total, io["quantizer_loss"])
    to_z, to_codebook = torch.autograd.grad(total, (z, quantizer.codebook))
    parity.assert_close(1e3 * to_z, 1e3 * parity.channel_last(io["grad_z_of_quantizer_loss"]))
    parity.assert_close(1e2 * to_codebook, 1e2 * io["grad_codebook_of_quantizer_loss"])
    quantizer.commit_update()
    parity.assert_close(quantizer.codebook.detach(), io["codebook_after"])
    parity.assert_close(30 * quantizer.usage, 30 * io["embed_prob_after"])
    assert torch.equal(quantizer.eval().encode(z).squeeze(-1), io["eval_indices_after"])


def test_anchors_are_the_nearest_latents_of_the_whole_step():
    quantizer = make(anchors=True, ema_decay=0.5)
    parts = [tokens(1, 5, 3, seed=seed) for seed in range(3)]
    before, flat = quantizer.codebook.detach().clone(), torch.cat(parts).view(-1, 3)
    counts = sum(quantizer(part).statistics["counts"] for part in parts)
    quantizer.commit_update()
    strength = torch.exp(-10 * 12 * (0.5 * counts / 15) / 0.5 - 1e-3)[:, None]
    anchors = flat[torch.cdist(before, flat).argmin(1)]
    assert torch.allclose(quantizer.codebook, (1 - strength) * before + strength * anchors, atol=1e-12)


# ---- softmax gradient and entropy


def logits(z, codebook, temperature):
    return -(z[:, None] - codebook).square().sum(-1) / temperature


@BOTH
@pytest.mark.parametrize("estimator", ["softmax", "none"])
def test_softmax_gradient_equals_dense_autograd(l2_normalize, estimator):
    quantizer = make(12, 3, l2_normalize, estimator=estimator, softmax_temperature=0.7)
    z, g = tokens(2, 5, 3).requires_grad_(), tokens(2, 5, 3, seed=3)
    result = quantizer(z)
    assert torch.equal(result.quantized, quantizer.decode(result.indices))
    if estimator == "none":
        assert not result.quantized.requires_grad
        return
    found = torch.autograd.grad((result.quantized * g).sum(), (z, quantizer.codebook))
    flat, codebook = z.view(-1, 3), quantizer.codebook
    if l2_normalize:
        flat, codebook = F.normalize(flat, dim=1), F.normalize(codebook, dim=1)
    p = logits(flat, codebook, 0.7).softmax(1)
    hard = F.one_hot(result.indices.flatten(), 12).double()
    dense = ((hard - p.detach() + p) @ codebook).view(2, 5, 3)
    expected = torch.autograd.grad((dense * g).sum(), (z, quantizer.codebook))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, expected, strict=True))


@BOTH
def test_rotation_is_that_of_the_compared_latents_onto_their_codes(l2_normalize):
    quantizer = make(12, 3, l2_normalize, estimator="rotation")
    z, g = tokens(2, 5, 3).requires_grad_(), tokens(2, 5, 3, seed=3)
    result = quantizer(z)
    (found,) = torch.autograd.grad((result.quantized * g).sum(), z)
    compared = F.normalize(z, dim=-1) if l2_normalize else z
    (expected,) = torch.autograd.grad((rotation(compared, result.quantized.detach()) * g).sum(), z)
    assert torch.allclose(found, expected, atol=1e-14) and not torch.allclose(found, g)


@BOTH
def test_entropy_equals_dense_autograd_and_ignores_dropped_tokens(l2_normalize):
    quantizer = make(12, 3, l2_normalize, entropy_temperature=0.3, batch_entropy_weight=1.7)
    z, mask = tokens(2, 6, 3), torch.arange(6).expand(2, 6) < 4
    z[:, 4:] = float("nan")
    z.requires_grad_()
    result = quantizer(z, mask)
    assert quantizer.default_loss_weights == {"commitment": 0.25, "codebook": 1.0, "entropy": 0.005}
    found = torch.autograd.grad(result.losses["entropy"], (z, quantizer.codebook))
    flat, codebook = z[:, :4].reshape(-1, 3), quantizer.codebook
    if l2_normalize:
        flat, codebook = F.normalize(flat, dim=1), F.normalize(codebook, dim=1)
    p = logits(flat, codebook, 0.3).softmax(1)
    sample, batch = -(p * p.log()).sum(1).mean(), -(p.mean(0) * p.mean(0).log()).sum()
    expected = torch.autograd.grad(sample - 1.7 * batch, (z, quantizer.codebook))
    assert torch.allclose(result.losses["entropy"], sample - 1.7 * batch, rtol=1e-12)
    assert torch.allclose(result.statistics["sample_entropy"], sample) and not batch.isnan()
    assert torch.allclose(result.statistics["batch_entropy"], batch)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, expected, strict=True))
    assert set(quantizer.eval()(z.detach(), mask).losses) == set(result.losses)
    empty = quantizer(z, torch.zeros(2, 6, dtype=torch.bool)).losses
    assert all(loss == 0 for loss in empty.values())


# ---- settings and resources


@pytest.mark.parametrize(
    "options,message",
    [
        ({"codebook_update": "EMA"}, "codebook_update must be one of .*'gradient', 'ema'.* got 'EMA'"),
        ({"estimator": "ste"}, "estimator must be one of .*straight_through.* got 'ste'"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\).* got 1.0"),
        ({"ema_eps": 0.0}, "ema_eps must be positive.* got 0.0"),
        ({"kmeans_steps": -1}, "kmeans_steps .* got -1"),
        ({"kmeans_iterations": 0}, "kmeans_iterations .* got 0"),
        ({"restart_below": 1.0}, "restart_below must lie between 0 and 1.* got 1.0"),
        ({"restart_below": 0.1, "restart_after": 5}, "two definitions of a dead code"),
        ({"anchors": True, "codebook_update": "ema"}, "anchors=True needs codebook_update='gradient'"),
        ({"anchors": True, "restart_after": 5}, "anchors=True already moves unused codes"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must be positive; got 0.0"),
        ({"entropy_temperature": -1.0}, "entropy_temperature must be positive.* got -1.0"),
        ({"entropy_eps": -1.0}, "entropy_eps must not be negative; got -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(8, 2, **options)


@ALL
def test_a_step_never_reads_a_value_from_the_device(name):
    """Tensors without values: whatever reads one, or has a shape that depends on one, raises."""
    with FakeTensorMode():
        quantizer = VectorQuantizer(12, 3, **{**OPTIONS[name], "kmeans_steps": 0}, entropy_temperature=0.1)
        z = torch.randn(2, 10, 3, requires_grad=True)
        for mask in (None, torch.rand(2, 10) > 0.5):
            result = quantizer(z, mask)
            (sum(result.losses.values()) + result.quantized.sum()).backward()
        quantizer.commit_update()


def test_a_step_with_many_codes_never_holds_all_distances():
    """1024 tokens x 65 536 codes: all distances would take 268 MB; some tables of codes of 1 MB and blocks remain."""
    code = (
        "import resource, torch\n"
        "from vistok import VectorQuantizer\n"
        "torch.set_num_threads(1)\n"
        "def step(z, **options):\n"
        "    quantizer = VectorQuantizer(len(z) * 64, 4, **options)\n"
        "    result = quantizer(z[None].requires_grad_())\n"
        "    (result.losses['commitment'] + result.quantized.sum()).backward()\n"
        "    quantizer.commit_update()\n"
        "everything = {'codebook_update': 'ema', 'restart_below': 0.1}, {'anchors': True}\n"
        "[step(torch.randn(32, 4), **options) for options in everything]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "[step(torch.randn(1024, 4), **options) for options in everything]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 60_000  # kB


def test_a_copy_shares_nothing():
    quantizer, z = ema(restart_below=0.5), tokens(2, 10, 3)
    quantizer(z)
    other = copy.deepcopy(quantizer)
    before = state(other)
    quantizer.commit_update()
    assert same(before, state(other)) and not same(before, state(quantizer))
