"""The inception score in its three conventions, against torch-fidelity and against the definition."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.eval.inception import score as inception_score
from vistok.eval.inception.score import InceptionScore, splits
from vistok.eval.metric import MetricUnavailable


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")

ORIGINALS, IMAGES = fake.random_images(47), fake.random_images(47, seed=1)


def logits():
    inception = fake.FakeInception()
    return inception.logits(inception(IMAGES).pool)


def by_definition(logits, epsilon=0.0):
    p = logits.double().softmax(1)
    mean = p.mean(0, keepdim=True)
    return float((p * ((p + epsilon).log() - (mean + epsilon).log())).sum(1).mean().exp())


def evaluated(convention, rows=None, num_images=47):
    metric = InceptionScore(fake.FakeInception(), num_images, convention)
    fake.feed([metric], ORIGINALS, IMAGES, rows)
    return metric


def test_ten_shuffled_splits_equal_torch_fidelity():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    theirs = isc_features_to_metric(logits(), splits=10, shuffle=True, rng_seed=2020)
    ours = evaluated("torch-fidelity").compute()
    assert ours["ris"] == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert ours["ris_std"] == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-4)
    assert ours["ris_std"] > 0


def test_adm_splits_the_dataset_in_its_order(monkeypatch):
    assert splits(12_000, "adm").bincount().tolist() == [5000, 5000, 2000]
    monkeypatch.setattr(inception_score, "_SPLIT_SIZE", 20)
    scores = torch.tensor([by_definition(part) for part in logits().split(20)])
    metric = evaluated("adm", rows=torch.randperm(47, generator=torch.Generator().manual_seed(0)))
    found = metric.compute()
    assert found["ris"] == pytest.approx(float(scores.mean()), rel=1e-6)
    assert found["ris_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-4)
    assert metric.details()["splits"] == pytest.approx(scores.tolist(), rel=1e-6)


def test_one_split_takes_all_images_together():
    found = evaluated("one-split").compute()
    assert found == {"ris": pytest.approx(by_definition(logits(), 1e-16), rel=1e-6), "ris_std": 0}


def test_equal_images_score_one_and_certain_different_ones_their_number():
    inception = fake.FakeInception()
    metric = InceptionScore(inception, 47, "one-split")
    fake.feed([metric], ORIGINALS, IMAGES[:1].expand(47, -1, -1, -1))
    assert metric.compute()["ris"] == pytest.approx(1, abs=1e-9)
    inception.logits = lambda pool: 1e4 * torch.eye(1008)[:7]
    metric = InceptionScore(inception, 7, "one-split")
    fake.feed([metric], ORIGINALS, IMAGES, range(7))
    assert metric.compute()["ris"] == pytest.approx(7, rel=1e-9)


@pytest.mark.parametrize("convention", ["torch-fidelity", "adm", "one-split"])
def test_merging_unequal_parts_equals_one_pass(convention, tmp_path):
    merged = InceptionScore(fake.FakeInception(), 47, convention)
    for rows in (range(0, 47, 3), [row for row in range(47) if row % 3]):
        merged.merge(fake.saved(evaluated(convention, rows).state_dict(), tmp_path / "state.pt"))
    assert merged.compute() == pytest.approx(evaluated(convention).compute(), rel=1e-9, abs=1e-12)


def test_a_subset_of_a_dataset_is_split_by_the_places_of_its_images():
    numbers = torch.arange(3, 47, 4)
    metric = InceptionScore(fake.FakeInception(), numbers.numpy())
    fake.feed([metric], ORIGINALS, IMAGES, numbers.flip(0))
    alone = InceptionScore(fake.FakeInception(), len(numbers))
    fake.feed([alone], ORIGINALS[numbers], IMAGES[numbers])
    assert metric.compute() == pytest.approx(alone.compute(), rel=1e-9)


def test_splits_without_images_do_not_count():
    metric = evaluated("torch-fidelity", range(4))
    assert len(metric.details()["splits"]) <= 4
    with pytest.raises(MetricUnavailable, match="no image"):
        InceptionScore(fake.FakeInception(), 47).compute()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="among the 5 announced; got \\[0, 1, 2, 3, 4, 5, 6\\]"):
        evaluated("adm", num_images=5)
    with pytest.raises(ValueError, match="convention must be one of torch-fidelity, adm, one-split; got 'mean'"):
        InceptionScore(fake.FakeInception(), 5, "mean")
    with pytest.raises(ValueError, match="at least 1 image; got 0"):
        InceptionScore(fake.FakeInception(), 0)
