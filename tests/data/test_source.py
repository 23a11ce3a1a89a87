"""The plan of an epoch, as every source has it by default."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.data.source import ImageSource, Sample


class Numbers(ImageSource):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        raise AssertionError("a plan reads nothing")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**32))
def test_ranks_get_equal_disjoint_shares_and_leave_out_less_than_one_sample_each(count, world_size, epoch, seed):
    shares = [Numbers(count).order(epoch, seed, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {count // world_size}
    together = np.concatenate(shares)
    assert together.dtype == np.int64 and len(set(together.tolist())) == len(together)
    assert set(together.tolist()) <= set(range(count))


def test_the_batches_of_all_ranks_together_are_the_batches_of_one_process():
    alone = Numbers(48).order(2, 7, 0, 1)
    ranks = [Numbers(48).order(2, 7, rank, 3) for rank in range(3)]
    for k in range(4):
        together = np.concatenate([rank[4 * k : 4 * k + 4] for rank in ranks])
        assert sorted(together) == sorted(alone[12 * k : 12 * k + 12])


def test_epochs_and_seeds_differ_and_repeat_exactly():
    orders = {(seed, epoch): Numbers(30).order(epoch, seed, 0, 1).tolist() for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 6
    for (seed, epoch), order in orders.items():
        assert Numbers(30).order(epoch, seed, 0, 1).tolist() == order


def test_the_left_out_remainder_changes_from_epoch_to_epoch():
    left_out = {int(*set(range(7)) - set(Numbers(7).order(epoch, 0, 0, 1)[:6].tolist())) for epoch in range(20)}
    assert len(left_out) > 3


def test_replacements_walk_through_all_other_samples():
    assert [Numbers(4).replacement(2, attempt) for attempt in range(3)] == [3, 0, 1]


def test_the_contract_cannot_be_left_half_done():
    with pytest.raises(TypeError, match="read"):
        type("Half", (ImageSource,), {"__len__": lambda self: 1})()
