"""Precision and recall against torch-fidelity, in any blocks, and what they must be where it is known."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.eval.inception import precision_recall as module
from vistok.eval.inception.feature_table import FeatureTable
from vistok.eval.inception.precision_recall import PrecisionRecall, precision_recall
from vistok.eval.inception.reference import InceptionReference
from vistok.eval.metric import MetricUnavailable


def helper(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = helper("fake_inception")


def clouds(number=150, other=110, dim=6):
    random = np.random.RandomState(0)
    reference = random.randn(other, dim).astype(np.float32) + 50
    return (random.randn(number, dim) * 0.7 + 0.4).astype(np.float32) + 50, reference


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("block", [2, 7, 64, 2048])
def test_equals_torch_fidelity_in_any_blocks(neighbours, block, monkeypatch):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    monkeypatch.setattr(module, "_BLOCK", block)
    features, reference = clouds()
    theirs = calculate_precision_recall_full(
        *(torch.from_numpy(part).double() for part in (features, reference)), neighbours
    )
    found = precision_recall(features, reference, neighbours=neighbours)
    assert found == pytest.approx(theirs, abs=1e-6)
    assert 0.2 < min(found) and max(found) < 1 and found[0] != pytest.approx(found[1], abs=0.02)


def test_copies_have_full_precision_and_recall_and_strangers_none():
    features, _ = clouds()
    assert precision_recall(features, features.copy()) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)


def test_one_mode_is_precise_and_covers_its_share():
    random = np.random.RandomState(0)
    one, two = random.randn(200, 4).astype(np.float32), random.randn(200, 4).astype(np.float32) + 100
    precision, recall = precision_recall(one[:100], np.concatenate([one[100:], two]))
    assert precision > 0.8
    assert 0.2 < recall <= 100 / 300


def gathered(inception, folder, number, part="a"):
    reference, table = InceptionReference(inception, features=True), FeatureTable(inception)
    reference.open(folder / "reference", part)
    table.open(folder / "table", part)
    originals = fake.random_images(number)
    images = (originals.float() * 0.9 + 5).byte()
    fake.feed((reference, table), originals, images)
    final_reference, final_table = InceptionReference(inception, features=True), FeatureTable(inception)
    for metric, final, name in ((reference, final_reference, "reference"), (table, final_table, "table")):
        final.open(folder / name, "end")
        final.merge(fake.saved(metric.state_dict(), folder / "s.pt"))
    return final_table, final_reference, inception(images).pool.numpy(), inception(originals).pool.numpy()


def test_metric_equals_the_function_on_all_images(tmp_path):
    table, reference, features, originals = gathered(fake.FakeInception(), tmp_path, 40)
    metric = PrecisionRecall(table, reference)
    precision, recall = precision_recall(features, originals)
    assert metric.compute() == {"precision": precision, "recall": recall}
    assert metric.details() == {"neighbours": 3, "reference_images": 40}


def test_at_most_so_many_reference_images_are_used_and_their_choice_is_repeatable(tmp_path, monkeypatch):
    table, reference, features, _ = gathered(fake.FakeInception(), tmp_path, 40)
    sizes = []
    inner = precision_recall
    monkeypatch.setattr(
        module, "precision_recall", lambda a, b, **rest: (sizes.append((len(a), b.copy())), inner(a, b, **rest))[1]
    )
    values = [PrecisionRecall(table, reference, max_reference=25, seed=seed).compute() for seed in (0, 0, 1)]
    assert [(count, len(chosen)) for count, chosen in sizes] == [(40, 25)] * 3
    assert values[0] == values[1] and np.array_equal(sizes[0][1], sizes[1][1])
    assert not np.array_equal(sizes[0][1], sizes[2][1])
    assert len(np.unique(sizes[0][1], axis=0)) == 25


def test_too_few_images_are_said(tmp_path):
    table, reference, *_ = gathered(fake.FakeInception(), tmp_path, 3)
    with pytest.raises(MetricUnavailable, match="more than 3 images; there are 3"):
        PrecisionRecall(table, reference).compute()
    with pytest.raises(ValueError, match="neighbours must be at least 1; got 0"):
        PrecisionRecall(table, reference, neighbours=0)
    with pytest.raises(MetricUnavailable, match="no features of single images"):
        PrecisionRecall(table, InceptionReference(fake.FakeInception()))


def test_every_two_images_are_compared_once(monkeypatch):
    compared = []
    distances = module._squared_distances
    monkeypatch.setattr(module, "_squared_distances", lambda x, y: compared.append(len(x) * len(y)) or distances(x, y))
    monkeypatch.setattr(module, "_BLOCK", 10)
    features, reference = clouds(50, 30)
    precision_recall(features, reference)
    within = sum(n * (n + 10) // 2 for n in (50, 30))  # the triangle, and blocks with themselves
    assert sum(compared) == within + 50 * 30


def test_images_that_are_all_alike():
    same, other = np.full((9, 5), 0.3, np.float32), np.full((7, 5), 0.7, np.float32)
    assert precision_recall(same, same[:7]) == (1, 1)
    assert precision_recall(same, other) == (0, 0)
