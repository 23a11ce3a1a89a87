"""What metrics share: values per image, and work that is done once per batch."""

import math

import pytest
import torch

from vistok.eval.metric import MetricUnavailable, Originals, Pairs, PerImageMetric


class Given(PerImageMetric):
    """Two values of every image: its first pixel, and not a number for some."""

    names = ("first", "some")

    def values(self, pairs):
        first = pairs.reconstructions[:, 0, 0, 0].float()
        return {
            "first": first,
            "some": torch.where(first > 2, first, torch.tensor([math.nan, math.inf])[first.long() % 2]),
        }


def pairs(*values):
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    index = torch.tensor(values)
    originals = Originals(index, [str(value) for value in values], index, images)
    return Pairs(originals, images)


def test_means_are_over_the_finite_values():
    metric = Given()
    metric.update(pairs(4, 1, 0))
    metric.update(pairs(5, 2))
    assert metric.compute() == {"first": 2.4, "some": 4.5}
    assert metric.table()[0].tolist() == [0, 1, 2, 4, 5]


def test_without_a_finite_value_the_mean_is_none():
    metric = Given()
    metric.update(pairs(0, 1))
    assert math.isnan(metric.compute()["some"])
    with pytest.raises(MetricUnavailable, match="no image"):
        Given().compute()


def test_values_are_left_for_the_metrics_behind():
    batch = pairs(3, 7)
    batch.values["earlier"] = torch.ones(2)
    Given().update(batch)
    assert batch.values["first"].tolist() == [3, 7] and "earlier" in batch.values


def test_work_is_done_once_per_batch_and_key():
    batch = pairs(1)
    for holder in (batch, batch.originals):
        calls = []
        for key in ("a", "b", "a"):
            assert holder.once(key, lambda key=key, calls=calls: calls.append(key) or key) == key
        assert calls == ["a", "b"]
