"""The Fréchet distance against closed forms, against torch-fidelity, and against itself from parts."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.eval.inception.frechet import FrechetInceptionDistance, frechet_distance
from vistok.eval.inception.moments import Gaussian, Moments
from vistok.eval.inception.network import Inception, load_network
from vistok.eval.inception.reference import InceptionReference, ReferenceStatistics
from vistok.eval.metric import MetricUnavailable


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")


def gaussian(features):
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.gaussian()


def random_features(number, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(number, dim, generator=generator, dtype=torch.float64) @ mixing + 0.3 * seed


def torch_fidelity_distance(first, second):
    """Their formula, with their float32 mean replaced by one in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double()) for features in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def in_their_span(first, second):
    """Coordinates within the space that both sets of samples span: all distances stay as they are."""
    basis, _ = torch.linalg.qr(torch.cat([first, second]).double().T)
    return first.double() @ basis, second.double() @ basis


def test_diagonal_covariances_give_the_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 1.0]).double()
    shift = torch.tensor([1.0, 2.0, 0.0]).double()
    found = frechet_distance(Gaussian(shift, a.diag()), Gaussian(torch.zeros(3).double(), b.diag()))
    assert found == pytest.approx(5 + 1 + 1 + 4, rel=1e-12)


@pytest.mark.parametrize("sizes", [(90, 120), (30, 120), (120, 30), (30, 25)])
def test_every_route_equals_torch_fidelity(sizes):
    first, second = (random_features(number, 40, seed) for seed, number in enumerate(sizes, 1))
    expected = torch_fidelity_distance(first, second)
    tolerance = 1e-9 if min(sizes) > 40 else 1e-5  # theirs adds roots of rounding errors where a covariance is singular
    assert frechet_distance(gaussian(first), gaussian(second)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("sizes", [(30, 120), (120, 30), (30, 25)])
def test_few_samples_lose_no_precision(sizes):
    first, second = (random_features(number, 40, seed) for seed, number in enumerate(sizes, 1))
    routes = frechet_distance(gaussian(first), gaussian(second))
    x, y = (part - part.mean(0) for part in (first, second))
    nuclear = np.linalg.svd((x @ y.T).numpy(), compute_uv=False).sum() / ((len(x) - 1) * (len(y) - 1)) ** 0.5
    variances = x.square().sum() / (len(x) - 1) + y.square().sum() / (len(y) - 1)
    expected = (first.mean(0) - second.mean(0)).square().sum() + variances - 2 * nuclear
    assert routes == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("number", [2, 20, 39, 40, 200])
def test_distance_of_samples_from_themselves_vanishes(number):
    for seed in range(8):
        features = random_features(number, 40, seed)
        assert 0 <= frechet_distance(gaussian(features), gaussian(features)) < (1e-12 if number < 40 else 1e-6)


def test_distance_is_symmetric():
    first, second = gaussian(random_features(90, 40, 1)), gaussian(random_features(70, 40, 2))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-10)


def test_different_features_are_refused():
    with pytest.raises(ValueError, match="got 3 and 4"):
        frechet_distance(gaussian(torch.randn(9, 3)), gaussian(torch.randn(9, 4)))


@pytest.mark.parametrize("tap", ["pool", "spatial"])
def test_parts_merged_in_fresh_metrics_equal_torch_fidelity_on_all_images(tap, tmp_path):
    originals, reconstructions = fake.random_images(23), fake.random_images(23, seed=1)
    inception = fake.FakeInception()

    def make():
        reference = InceptionReference(inception, spatial=tap == "spatial")
        return reference, FrechetInceptionDistance(inception, reference, tap)

    final = make()
    for part in (range(4), range(4, 23)):
        metrics = make()
        fake.feed(metrics, originals, reconstructions, part)
        for metric, merged in zip(metrics, final, strict=True):
            merged.merge(fake.saved(metric.state_dict(), tmp_path / "state.pt"))
    values = final[1].compute()
    features = [getattr(inception(images), tap) for images in (reconstructions, originals)]
    assert values == {
        "rfid" if tap == "pool" else "rsfid": pytest.approx(
            torch_fidelity_distance(*in_their_span(*features)), rel=1e-6
        )
    }
    assert final[0].compute() == {}
    assert final[1].details() == {"images": 23, "reference_images": 23}


def test_reconstructions_that_equal_the_originals_score_zero_at_any_number_of_images():
    images, inception = fake.random_images(9), fake.FakeInception()
    reference = InceptionReference(inception)
    metric = FrechetInceptionDistance(inception, reference)
    fake.feed((reference, metric), images, images.clone())
    assert abs(metric.compute()["rfid"]) < 1e-9


def test_too_few_images_or_missing_features_are_said():
    inception = fake.FakeInception()
    reference = InceptionReference(inception)
    with pytest.raises(MetricUnavailable, match="at least 2 images; 0 evaluated"):
        FrechetInceptionDistance(inception, reference).compute()
    with pytest.raises(MetricUnavailable, match="mu_s"):
        FrechetInceptionDistance(inception, reference, "spatial")
    only_pool = ReferenceStatistics(Gaussian(torch.zeros(2048), torch.eye(2048)))
    with pytest.raises(MetricUnavailable, match="mu_s"):
        FrechetInceptionDistance(inception, InceptionReference(inception, spatial=True, loaded=only_pool), "spatial")
    with pytest.raises(ValueError, match="tap must be"):
        FrechetInceptionDistance(inception, reference, "logits")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return helper("inception_weights").save_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_rfid_of_pixels_equals_torch_fidelity(weights):
    originals = fake.random_images(8, size=48)
    originals = (
        torch.nn.functional.avg_pool2d(originals.float(), 4).repeat_interleave(4, 2).repeat_interleave(4, 3).byte()
    )
    reconstructions = (originals.float() * 0.9 + 3).byte()
    inception = Inception(weights)
    reference = InceptionReference(inception)
    metric = FrechetInceptionDistance(inception, reference)
    fake.feed((reference, metric), originals, reconstructions, batch=5)
    network = load_network(weights)
    features = [network(images)[0] for images in (reconstructions, originals)]
    expected = torch_fidelity_distance(*in_their_span(*features))
    assert metric.compute()["rfid"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_rfid_equals_their_whole_program(weights):
    from torch_fidelity import calculate_metrics

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, number):
            return self.images[number]

    originals, reconstructions = fake.random_images(24, size=64), fake.random_images(24, seed=1, size=64)
    inception = Inception(weights)
    reference = InceptionReference(inception)
    metric = FrechetInceptionDistance(inception, reference)
    fake.feed((reference, metric), originals, reconstructions, batch=10)
    theirs = calculate_metrics(
        input1=Images(reconstructions),
        input2=Images(originals),
        cuda=False,
        fid=True,
        feature_extractor_weights_path=str(weights),
        batch_size=8,
        verbose=False,
        cache=False,
    )
    assert metric.compute()["rfid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4, abs=2e-4)
