"""Values that occur, their counts and first images, against brute force."""

from collections import Counter

import pytest
import torch

from vistok.eval.tokens.distinct import Distinct


def test_union_of_parts_equals_brute_force():
    draws = torch.Generator().manual_seed(0)
    values = torch.randint(-1, 40, (500,), generator=draws) * (1 << 50)
    images = torch.randint(0, 90, (500,), generator=draws)
    parts = [Distinct.of(values[rows], images[rows]) for rows in (slice(0, 77), slice(77, 77), slice(77, 500))]
    found = Distinct.union([Distinct.union(parts[1:]), parts[0]])
    counts = Counter(value for value in values.tolist() if value >= 0)
    assert found.values.tolist() == sorted(counts) and found.total == sum(counts.values())
    assert found.counts.tolist() == [counts[value] for value in sorted(counts)]
    assert found.first.tolist() == [int(images[values == value].min()) for value in sorted(counts)]


def test_entropy_in_bits():
    assert Distinct.of(torch.tensor([5, 9, 5, 9, 1, 1, 7, 7]), torch.zeros(8).long()).entropy == pytest.approx(2)
    assert Distinct.of(torch.tensor([3, 3]), torch.zeros(2).long()).entropy == 0
    assert Distinct.of(torch.tensor([-1]), torch.zeros(1).long()).entropy == 0
