"""Kernel distance against torch-fidelity on the same features, and from parts of a dataset."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.eval.inception.feature_table import FeatureTable
from vistok.eval.inception.kernel_distance import KernelInceptionDistance, kernel_distances
from vistok.eval.inception.reference import InceptionReference
from vistok.eval.metric import MetricUnavailable
from vistok.eval.rows import Rows


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")

ORIGINALS, IMAGES = fake.random_images(60), (fake.random_images(60, seed=1) * 0.8).byte()


def theirs(features, reference, subsets, subset_size):
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    values = kid_features_to_metric(
        features, reference, kid_subsets=subsets, kid_subset_size=subset_size, verbose=False
    )
    return {"kid": values[KEY_METRIC_KID_MEAN], "kid_std": values[KEY_METRIC_KID_STD]}


def make(inception, folder, part):
    reference = InceptionReference(inception, features=True)
    table = FeatureTable(inception)
    reference.open(folder / "reference", part)
    table.open(folder / "table", part)
    return reference, table


def test_subsets_equal_torch_fidelity():
    generator = torch.Generator().manual_seed(0)
    features, reference = torch.rand(300, 64, generator=generator), torch.rand(250, 64, generator=generator) * 1.1
    found = kernel_distances(features.numpy(), reference.numpy(), subsets=7, subset_size=100)
    expected = theirs(features.double(), reference.double(), 7, 100)
    assert float(found.mean()) == pytest.approx(expected["kid"], rel=1e-5)
    assert float(found.std(correction=0)) == pytest.approx(expected["kid_std"], rel=1e-4)


def test_the_estimate_is_unbiased():
    features = np.random.RandomState(0).rand(4000, 8).astype(np.float32)
    values = kernel_distances(features[:2000], features[2000:], subsets=200, subset_size=20)
    assert abs(float(values.mean())) < 3 * float(values.std()) / 200**0.5
    assert (values < 0).any()


def test_parts_merged_in_fresh_metrics_equal_torch_fidelity_on_all_images(tmp_path, monkeypatch):
    blocks = Rows.blocks
    monkeypatch.setattr(Rows, "blocks", lambda rows: blocks(rows, 7))
    inception = fake.FakeInception()
    states = []
    for number, rows in enumerate((range(0, 60, 4), [row for row in range(60) if row % 4])):
        metrics = make(inception, tmp_path, f"part{number}")
        kid = KernelInceptionDistance(metrics[1], metrics[0])
        fake.feed((*metrics, kid), ORIGINALS, IMAGES, rows)
        states.append([fake.saved(metric.state_dict(), tmp_path / "s.pt") for metric in (*metrics, kid)])
    final = make(inception, tmp_path, "end")
    kid = KernelInceptionDistance(final[1], final[0], subsets=5, subset_size=30)
    for state in states:
        for metric, part in zip((*final, kid), state, strict=True):
            metric.merge(part)
    features, reference = inception(IMAGES).pool, inception(ORIGINALS).pool
    np.testing.assert_array_equal(final[1].features(), features)
    np.testing.assert_array_equal(final[0].statistics().features, reference)
    assert kid.compute() == pytest.approx(theirs(features.double(), reference.double(), 5, 30), rel=1e-4)
    assert kid.details() == {"subsets": 5, "subset_size": 30}
    assert final[0].compute() == final[1].compute() == {}


def test_too_few_images_or_a_reference_without_features_are_said(tmp_path):
    inception = fake.FakeInception()
    reference, table = make(inception, tmp_path, "a")
    fake.feed((reference, table), ORIGINALS, IMAGES)
    for metric in (reference, table):
        state = metric.state_dict()
        metric.merge({**state, "pool": state["pool"]} if "pool" in state else state)
    with pytest.raises(MetricUnavailable, match="KID compares subsets of 1000 images; there are 60"):
        KernelInceptionDistance(table, reference).compute()
    with pytest.raises(MetricUnavailable, match="no features of single images"):
        KernelInceptionDistance(table, InceptionReference(inception))
    with pytest.raises(ValueError, match="got 1 of 1"):
        KernelInceptionDistance(table, reference, 1, 1)
