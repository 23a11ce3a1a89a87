"""Features against torch-fidelity's network with the same random weights."""

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from vistok.eval.inception import network as inception_module
from vistok.eval.inception.network import Inception, load_network
from vistok.eval.metric import MetricUnavailable


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")
IMAGES = fake.random_images(3, size=40)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return helper("inception_weights").save_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def theirs(weights):
    """torch-fidelity's outputs, and what their branch ``mixed_6/conv`` gives."""
    network = load_network(weights)
    network.features_list = ["2048", "logits_unbiased", "logits"]
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    return *network(IMAGES), seen[0]


@pytest.fixture(scope="module")
def inception(weights):
    return Inception(weights)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_features_and_logits_equal_torch_fidelity(inception, theirs):
    found = inception(IMAGES)
    assert found.pool.shape == (3, 2048) and found.pool.dtype == torch.float32
    assert error(found.pool, theirs[0]) < 2e-6
    assert error(inception.logits(found.pool), theirs[1]) < 2e-6
    assert error(inception.logits(found.pool, bias=True), theirs[2]) < 2e-6


def test_spatial_features_are_adms(inception, theirs):
    branch = theirs[3]  # (B, 192, 17, 17)
    expected = branch[:, :7].permute(0, 2, 3, 1).reshape(3, 2023)  # TensorFlow has channels last
    assert error(inception(IMAGES).spatial, expected) < 2e-6


def test_float64_is_float64(weights, theirs):
    network = load_network(weights).double()
    network.feature_extractor_internal_dtype = torch.float64
    deep = {}
    network.AvgPool.register_forward_hook(lambda module, inputs, output: deep.update(pool=output.flatten(1)))
    network(IMAGES[:1])
    found = Inception(weights, dtype="float64")(IMAGES[:1])
    assert found.pool.dtype == found.spatial.dtype == torch.float64
    assert error(found.pool, deep["pool"]) < 1e-12


def test_bfloat16_is_near_and_not_equal(weights, theirs):
    found = Inception(weights, dtype="bfloat16")(IMAGES[:1])
    assert found.pool.dtype == torch.float32
    assert 1e-4 < error(found.pool, theirs[0][:1]) < 0.05


def test_resize_changes_the_features(weights, inception):
    assert error(Inception(weights, resize="clean")(IMAGES[:1]).pool, inception(IMAGES[:1]).pool) > 1e-4


def test_features_do_not_depend_on_the_batch(inception, monkeypatch):
    together = inception(IMAGES)
    monkeypatch.setitem(inception_module._IMAGES_AT_ONCE, "cpu", 2)
    apart = inception(IMAGES)
    assert error(apart.pool, together.pool) < 1e-6 and error(apart.spatial, together.spatial) < 1e-6


def test_global_precision_neither_changes_features_nor_is_changed(inception):
    expected = inception(IMAGES[:1]).pool
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(inception(IMAGES[:1]).pool, expected)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype, convolutions", [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_only_tf32_lets_convolutions_compute_in_it(inception, dtype, convolutions, monkeypatch):
    settings, seen = torch.backends.cudnn.conv, []
    before = settings.fp32_precision

    def forward(images):
        seen.append((settings.fp32_precision, torch.is_grad_enabled()))
        return images.float().flatten(1), images.float().flatten(1)

    monkeypatch.setattr(inception, "dtype", dtype)
    monkeypatch.setattr(inception, "_forward", forward)
    settings.fp32_precision = "tf32" if convolutions == "ieee" else "ieee"
    try:
        inception(IMAGES)
        assert seen == [(convolutions, False)]
        assert settings.fp32_precision != convolutions
    finally:
        settings.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_convolutions_on_cuda_run_without_tf32_and_leave_the_setting(weights, theirs):
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    plain = Inception(weights, device="cuda")(IMAGES.cuda())
    assert error(plain.pool.cpu(), theirs[0]) < 5e-6
    reduced = Inception(weights, dtype="tf32", device="cuda")(IMAGES.cuda())
    assert 1e-5 < error(reduced.pool.cpu(), theirs[0]) < 1e-2
    assert settings.fp32_precision == before


def test_loading_draws_no_random_numbers(weights):
    before = torch.get_rng_state()
    load_network(weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_of_a_batch_are_computed_once():
    inception = fake.FakeInception()
    pairs = fake.make_pairs(IMAGES[:, :, :4, :4], 255 - IMAGES[:, :, :4, :4])
    first = inception.reconstructions(pairs)
    assert inception.reconstructions(pairs) is first and inception.calls == 1
    originals = inception.originals(pairs.originals)
    assert inception.originals(pairs.originals) is originals and inception.calls == 2
    assert not torch.equal(first.pool, originals.pool)
    pairs.reconstructions = pairs.originals.images
    assert inception.reconstructions(pairs) is originals and inception.calls == 2
    other = fake.FakeInception()
    assert other.originals(pairs.originals) is not originals and other.calls == 1


class Harm:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "other", "junk", "empty"])
def test_a_file_that_is_something_else_is_refused_and_never_executed(kind, tmp_path):
    path, proof = tmp_path / "weights.pth", tmp_path / "executed"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Harm(str(proof)), protocol=2))
    elif kind == "torch":
        torch.save({"fc.weight": Harm(str(proof))}, path)
    elif kind == "other":
        torch.save({"fc.weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"not weights" if kind == "junk" else b"")
    with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception"):
        Inception(path)
    assert not proof.exists()


def test_a_missing_file_makes_the_metric_unavailable(tmp_path):
    with pytest.raises(MetricUnavailable, match="no Inception weights: there is no file"):
        Inception(tmp_path / "none.pth")


def test_wrong_arguments_are_refused(weights, inception):
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, tf32, bfloat16; got 'float16'"):
        Inception(weights, dtype="float16")
    with pytest.raises(ValueError, match="resize must be one of"):
        Inception(weights, resize="cubic")
    for images in (IMAGES.float(), IMAGES[0], IMAGES[:, :1]):
        with pytest.raises(ValueError, match="images must be uint8"):
            inception(images)
