"""What is kept of a reference comes back as it was, or not at all."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.eval.inception.frechet import FrechetInceptionDistance
from vistok.eval.inception.moments import Gaussian
from vistok.eval.inception.reference import InceptionReference, ReferenceStatistics
from vistok.eval.inception.reference_cache import ReferenceCache


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")

IMAGES = fake.random_images(20)


def gathered(folder, **what):
    reference = InceptionReference(fake.FakeInception(), **what)
    reference.open(folder / "work", "a")
    fake.feed([reference], IMAGES, IMAGES)
    final = InceptionReference(fake.FakeInception(), **what)
    final.open(folder / "work", "b")
    final.merge(reference.state_dict())
    return final.statistics()


def test_everything_comes_back_and_features_stay_on_disk(tmp_path):
    statistics, cache = gathered(tmp_path, spatial=True, features=True), ReferenceCache(tmp_path / "cache")
    assert cache.load("key") is None
    cache.save("key", statistics, "content")
    found = ReferenceCache(tmp_path / "cache").load("key", spatial=True, features=True)
    assert found.content == "content" and found.count == 20
    for name in ("pool", "spatial"):
        assert torch.equal(getattr(found, name).mean, getattr(statistics, name).mean)
        assert torch.equal(getattr(found, name).samples, getattr(statistics, name).samples)
    assert isinstance(found.features, np.memmap)
    np.testing.assert_array_equal(found.features, statistics.features)
    assert cache.load("other") is None


def test_covariances_of_many_images_come_back(tmp_path):
    covariance = torch.randn(2048, 2048).double()
    cache = ReferenceCache(tmp_path)
    cache.save("key", ReferenceStatistics(Gaussian(torch.ones(2048).double(), covariance), count=5000), "")
    found = cache.load("key")
    assert found.pool.samples is None and torch.equal(found.pool.covariance, covariance) and found.count == 5000
    assert found.spatial is None and found.features is None


def test_a_loaded_reference_gives_the_same_distance_without_the_network(tmp_path):
    cache = ReferenceCache(tmp_path / "cache")
    cache.save("key", gathered(tmp_path), "")
    values = []
    for loaded in (None, cache.load("key")):
        inception = fake.FakeInception()
        reference = InceptionReference(inception, loaded=loaded)
        metric = FrechetInceptionDistance(inception, reference)
        fake.feed((reference, metric), IMAGES, 255 - IMAGES, batch=20)
        values.append(metric.compute()["rfid"])
        assert inception.calls == (2 if loaded is None else 1)
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_less_than_is_needed_is_nothing(tmp_path):
    cache = ReferenceCache(tmp_path / "cache")
    cache.save("key", gathered(tmp_path), "")
    assert cache.load("key") is not None
    assert cache.load("key", spatial=True) is None
    assert cache.load("key", features=True) is None
    cache.save("key", gathered(tmp_path, spatial=True, features=True), "new")
    assert cache.load("key", spatial=True, features=True).content == "new"


@pytest.mark.parametrize("damage", ["cut", "junk", "empty", "format", "pool"])
def test_a_damaged_entry_is_nothing(damage, tmp_path):
    cache = ReferenceCache(tmp_path / "cache")
    cache.save("key", gathered(tmp_path), "")
    path = tmp_path / "cache" / "key" / "statistics.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    if damage in ("format", "pool"):
        arrays["format"] = arrays["format"] + (damage == "format")
        np.savez(path, **{name: array for name, array in arrays.items() if damage == "format" or name != "pool.mu"})
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "junk": b"junk", "empty": b""}[damage])
    assert cache.load("key") is None


@pytest.mark.parametrize("key", ["", "../key", "a/b", ".hidden", "a b"])
def test_keys_that_are_no_names_are_refused(key, tmp_path):
    with pytest.raises(ValueError, match="key must consist of"):
        ReferenceCache(tmp_path).load(key)
