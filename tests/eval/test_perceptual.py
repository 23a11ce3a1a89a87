"""LPIPS and DISTS: the values of the reference packages on the same weights, shared work, one network."""

import gc
import importlib.util
import types
from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image.dists as torchmetrics_dists
from torchvision.models import vgg

from vistok.eval import perceptual
from vistok.eval.metric import MetricUnavailable, Originals, Pairs
from vistok.eval.perceptual import DISTS, LPIPS


def _module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = _module("vistok_test_pairs", Path(__file__).with_name("pairs.py"))
trunks = _module("vistok_test_trunks", Path(__file__).parents[1] / "losses" / "trunks.py")

NETS = {"alex": "alexnet", "vgg": "vgg16"}
METRICS = {
    "lpips_alex": lambda files, **options: LPIPS("alex", weights=files["alex"], **options),
    "lpips_vgg": lambda files, **options: LPIPS("vgg", weights=files["vgg"], **options),
    "dists": lambda files, **options: DISTS(weights=files["vgg"], **options),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {net: trunks.write_weights(name, folder) for net, name in NETS.items()}


@pytest.fixture(params=METRICS)
def make(request, files):
    return lambda **options: METRICS[request.param](files, **options)


def package_dists(file, monkeypatch):
    """torchmetrics' DISTS in float64 with the trunk of a file."""
    with torch.device("meta"):
        features = vgg.make_layers(vgg.cfgs["D"])
    state = torch.load(file, weights_only=True)
    features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()}, assign=True)
    monkeypatch.setattr(torchmetrics_dists, "vgg16", lambda weights: types.SimpleNamespace(features=features))
    return torchmetrics_dists.DISTSNetwork().double()


def values(metric, images, reconstructions):
    pairs = made.pair(images, reconstructions)
    metric.update(pairs)
    return pairs.values[metric.names[0]]


@pytest.mark.parametrize("net", NETS)
def test_lpips_of_every_image_is_that_of_the_package(net, files):
    images = made.photographs(3, 64, 72)
    worse = made.degraded(images)
    with torch.no_grad():
        expected = trunks.package_lpips(net, files[net])(images / 127.5 - 1, worse / 127.5 - 1).flatten()
    ours = values(LPIPS(net, weights=files[net]), images, worse)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert ours.unique().numel() == 3


def test_dists_of_every_image_is_that_of_torchmetrics(files, monkeypatch):
    images = made.photographs(3, 49, 64)
    worse = made.degraded(images)
    expected = package_dists(files["vgg"], monkeypatch)(images.double() / 255, worse.double() / 255)
    ours = values(DISTS(weights=files["vgg"]), images, worse)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    assert ours.min() > 1e-3 and ours.unique().numel() == 3


def test_equal_images_have_no_distance(make):
    images = made.photographs(2, 40, 40)
    distances = values(make(), images, images.clone())
    assert distances.max() < 1e-6 and distances.min() >= 0


@pytest.mark.parametrize("keep", [True, False])
def test_values_depend_neither_on_the_batch_nor_on_what_is_kept(make, keep, monkeypatch):
    images = made.photographs(3, 48, 40)
    worse = made.degraded(images)
    metric = make()
    expected = torch.cat([values(metric, images[i : i + 1], worse[i : i + 1]) for i in range(3)])
    monkeypatch.setattr(perceptual, "_KEEP_BYTES", 1 << 40 if keep else 0)
    monkeypatch.setitem(perceptual._PIXELS_AT_ONCE, "cpu", 2 * 48 * 40)
    torch.testing.assert_close(values(metric, images, worse), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("keep, runs", [(True, 3), (False, 4)])
def test_originals_are_looked_at_once_for_all_variants(make, keep, runs, monkeypatch):
    images = made.photographs(2, 40, 40)
    originals = made.pair(images, images).originals
    monkeypatch.setattr(perceptual, "_KEEP_BYTES", 1 << 40 if keep else 0)
    first, second = make(), make()
    seen = []
    handle = first.network.trunk.stages[0].register_forward_hook(lambda *args: seen.append(1))
    results = [Pairs(originals, made.degraded(images, strength)) for strength in (4.0, 12.0)]
    first.update(results[0])
    second.update(results[1])
    handle.remove()
    assert len(seen) == runs
    alone = Pairs(Originals(originals.index, originals.keys, originals.labels, images), results[1].reconstructions)
    make().update(alone)
    assert torch.equal(alone.values[second.names[0]], results[1].values[second.names[0]])


@pytest.mark.parametrize("name", METRICS)
def test_what_is_kept_of_originals_takes_the_memory_that_is_reckoned_with(name, files):
    metric = METRICS[name](files)
    features = list(metric.features(made.photographs(1, 160, 160)))
    taken = sum(part.numel() * part.element_size() for part in features) / 160**2
    reckoned = perceptual._BYTES_PER_PIXEL[metric._net]
    assert 0.8 * reckoned < taken <= reckoned


def test_metrics_share_one_network_and_forget_it_with_the_last_of_them(files):
    from vistok.eval import networks

    first, second = (LPIPS("alex", weights=files["alex"]) for _ in range(2))
    assert first.network is second.network
    assert LPIPS("vgg", weights=files["vgg"]).network is not first.network
    key = first._key
    del first
    assert key in networks._IN_USE
    del second
    gc.collect()
    assert key not in networks._IN_USE


def test_shards_merge_to_the_values_of_one_pass(make):
    images = made.photographs(5, 40, 40)
    whole, merged = made.one_pass_and_merged(make, images, made.degraded(images))
    assert whole == pytest.approx(merged, abs=1e-6)


def test_no_gradient_is_kept_and_global_precision_is_left_alone(make, files):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    images = made.photographs(1, 40, 40)
    metric = make()
    inside = []
    hook = metric.network.trunk.stages[0].register_forward_hook(
        lambda *args: inside.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision))
    )
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = values(metric, images, made.degraded(images))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
    hook.remove()
    assert set(inside) == {("highest", "ieee")}
    assert torch.backends.cudnn.conv.fp32_precision == before[1]
    assert not under_autocast.requires_grad and under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, values(metric, images, made.degraded(images)))


def test_missing_weights_are_reported_on_one_line(tmp_path):
    for make, name in ((LPIPS, "alexnet-owt-7be5be79.pth"), (DISTS, "vgg16-397923af.pth")):
        with pytest.raises(MetricUnavailable, match=name) as caught:
            make(weights=tmp_path / "nothing.pth")
        assert "\n" not in str(caught.value) and "nothing.pth" in str(caught.value)


def test_weights_of_another_network_are_refused(files):
    with pytest.raises(ValueError, match="not torchvision's alexnet"):
        LPIPS("alex", weights=files["vgg"])
    with pytest.raises(ValueError, match="net must be one of alex, vgg; got 'squeeze'"):
        LPIPS("squeeze", weights=files["vgg"])


@pytest.mark.parametrize("name, smallest", [("lpips_alex", 31), ("lpips_vgg", 16), ("dists", 16)])
def test_too_small_images_are_refused_and_the_smallest_work(name, smallest, files):
    images = made.photographs(1, smallest, smallest)
    metric = METRICS[name](files, image_size=(smallest, smallest))
    assert values(metric, images, made.degraded(images)).isfinite().all()
    with pytest.raises(MetricUnavailable, match=f"{name} needs images of at least {smallest} x {smallest} pixels; got"):
        METRICS[name](files, image_size=(64, smallest - 1))
    with pytest.raises(MetricUnavailable, match=f"got {smallest - 1} x {smallest - 1}"):
        values(metric, images[..., 1:, 1:], images[..., 1:, 1:])
