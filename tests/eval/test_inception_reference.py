"""The reference as it is gathered, loaded, and exchanged with other programs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.eval.inception.moments import Gaussian
from vistok.eval.inception.reference import InceptionReference, ReferenceStatistics, load_statistics, save_statistics
from vistok.eval.metric import MetricUnavailable
from vistok.eval.variants import OriginalsVariant


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")

IMAGES = fake.random_images(20)


def test_a_reference_beside_the_originals_looks_at_each_once(tmp_path):
    inception = fake.FakeInception()
    reference = InceptionReference(inception, spatial=True, features=True)
    reference.open(tmp_path, "a")
    batch = fake.make_pairs(IMAGES, 255 - IMAGES).originals
    reference.update(OriginalsVariant().reconstruct(batch))
    assert inception.calls == 1
    final = InceptionReference(inception, spatial=True, features=True)
    final.open(tmp_path, "b")
    final.merge(fake.saved(reference.state_dict(), tmp_path / "s.pt"))
    found, expected = final.statistics(), fake.FakeInception()(IMAGES)
    torch.testing.assert_close(found.pool.mean, expected.pool.double().mean(0))
    torch.testing.assert_close(found.spatial.mean, expected.spatial.double().mean(0))
    np.testing.assert_array_equal(found.features, expected.pool)
    assert found.count == 20


def test_merging_unequal_parts_equals_one_pass(tmp_path):
    def gathered(rows, part):
        reference = InceptionReference(fake.FakeInception(), spatial=True, features=True)
        reference.open(tmp_path, part)
        fake.feed([reference], IMAGES, IMAGES, rows)
        return fake.saved(reference.state_dict(), tmp_path / "s.pt")

    def merged(states, part):
        reference = InceptionReference(fake.FakeInception(), spatial=True, features=True)
        reference.open(tmp_path, part)
        for state in states:
            reference.merge(state)
        return reference.statistics()

    whole = merged([gathered(range(20), "all")], "end1")
    parts = merged([gathered(range(3, 20), "late"), gathered(range(3), "early")], "end2")
    torch.testing.assert_close(parts.pool.mean, whole.pool.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.pool.covariance, whole.pool.covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.spatial.mean, whole.spatial.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(parts.features, whole.features)
    assert parts.count == whole.count == 20


def test_what_is_loaded_is_not_gathered_again(tmp_path):
    inception = fake.FakeInception()
    known = ReferenceStatistics(Gaussian(torch.zeros(2048), torch.eye(2048)), count=7)
    reference = InceptionReference(inception, features=True, loaded=known)
    reference.open(tmp_path, "a")
    fake.feed([reference], IMAGES, IMAGES)
    assert reference.state_dict() == {} and inception.calls == 0
    final = InceptionReference(inception, loaded=known)
    final.merge(reference.state_dict())
    assert final.statistics() is known
    with pytest.raises(MetricUnavailable, match="no features of single images"):
        reference.require(features=True)


def test_no_reference_without_two_images():
    with pytest.raises(MetricUnavailable, match="at least 2 images; 0 were seen"):
        InceptionReference(fake.FakeInception()).statistics()


def test_files_of_other_programs_are_read(tmp_path):
    mean, spatial = np.arange(2048, dtype=np.float32), np.arange(2023, dtype=np.float64)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=np.eye(2048))
    found = load_statistics(tmp_path / "fid.npz")
    assert found.spatial is None and found.count == 0 and found.features is None
    assert found.pool.mean.dtype == torch.float64 and found.pool.mean[5] == 5 and found.pool.covariance.trace() == 2048
    adm = {
        "mu": mean,
        "sigma": np.eye(2048),
        "mu_s": spatial,
        "sigma_s": 2 * np.eye(2023),
        "arr_0": np.zeros((2, 4, 4, 3)),
    }
    np.savez(tmp_path / "adm.npz", **adm)
    found = load_statistics(tmp_path / "adm.npz")
    assert found.spatial.mean[6] == 6 and found.spatial.covariance.trace() == 4046


def test_what_is_written_is_read_and_has_the_field_s_names(tmp_path):
    reference = InceptionReference(fake.FakeInception(), spatial=True)
    fake.feed([reference], IMAGES, IMAGES)
    save_statistics(tmp_path / "own.npz", reference.statistics())
    with np.load(tmp_path / "own.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file)
    found = load_statistics(tmp_path / "own.npz")
    assert found.count == 20
    assert torch.equal(found.pool.mean, reference.statistics().pool.mean)
    assert torch.equal(found.spatial.covariance, reference.statistics().spatial.covariance)


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"mu": np.zeros(2048)}, "sigma is missing"),
        ({"mu": np.zeros(768), "sigma": np.eye(768)}, r"mu must be finite numbers of shape \(2048,\)"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "mu must be finite"),
        ({"mu": np.zeros(2048, object), "sigma": np.eye(2048)}, "allow_pickle"),
        (np.zeros(3), "one array instead of mu and sigma"),
        (b"junk", "not a file of FID statistics"),
        (b"", "not a file of FID statistics"),
    ],
)
def test_files_of_something_else_are_refused(arrays, said, tmp_path):
    path = tmp_path / "file.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif isinstance(arrays, dict):
        np.savez(path, **arrays)
    else:
        with open(path, "wb") as file:
            np.save(file, arrays)
    with pytest.raises(ValueError, match=said):
        load_statistics(path)
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "none.npz")
