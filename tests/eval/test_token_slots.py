"""Sequences as a language model predicts them: nothing is lost, and every position has a range of its own."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.eval.probes.token_slots import Slots
from vistok.tokenizers.base import Stream, Tokens

LAYOUTS = {
    "plain": (Stream("image", 6, (10,)),),
    "sub-codes": (Stream("image", 4, (7, 3, 12)),),
    "streams": (Stream("scale_0", 1, (5, 2)), Stream("scale_1", 4, (5, 2), (2, 2)), Stream("semantic", 3, (300,))),
    "one code": (Stream("image", 2, (1, 4)),),
}


def random_tokens(layout, batch=50):
    draws = torch.Generator().manual_seed(0)
    columns = {s.name: [torch.randint(k, (batch, s.length), generator=draws) for k in s.codebook_sizes] for s in layout}
    return Tokens({name: torch.stack(parts, -1) for name, parts in columns.items()}, layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_without_digits_the_sequence_is_the_flattened_one(layout):
    slots, ids = Slots(layout), random_tokens(layout).flatten()
    assert torch.equal(slots.read(ids), ids)
    assert (slots.length, slots.vocab_size) == (ids.shape[1], random_tokens(layout).vocab_size)


@pytest.mark.parametrize("largest", [2, 3, 7, 11])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_digits_tell_all_codes_apart_and_stay_in_the_range_of_their_position(layout, largest):
    slots, ids = Slots(layout, largest), random_tokens(layout).flatten()
    digits = slots.read(ids)
    for column, size in zip(range(ids.shape[1]), place_sizes(layout), strict=True):
        codes = torch.arange(size)
        own = ids[:1].repeat(size, 1)
        own[:, column] = own[0, column] - code_of(layout, own[0], column) + codes
        assert len(slots.read(own).unique(dim=0)) == size
    seen = torch.zeros(slots.length, dtype=torch.bool)
    for first, count, positions in slots.groups:
        assert count <= largest or largest == 1
        assert ((digits[:, positions] >= first) & (digits[:, positions] < first + count)).all()
        assert not seen[positions].any()
        seen[positions] = True
    assert seen.all() and slots.vocab_size == sum(count for _, count, _ in slots.groups)


def place_sizes(layout):
    return [size for stream in layout for _ in range(stream.length) for size in stream.codebook_sizes]


def code_of(layout, ids, column):
    """The code at a place of a flattened sequence."""
    tokens = Tokens.unflatten(ids[None], layout)
    return int(torch.cat([tokens.indices[stream.name].flatten() for stream in layout])[column])


@pytest.mark.parametrize("largest", [2, 16384])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tokens_and_fixed_bits_add_up(layout, largest):
    slots = Slots(layout, largest)
    assert float(slots.share.sum()) == pytest.approx(sum(stream.length for stream in layout))
    assert float(slots.bits.sum()) == pytest.approx(sum(stream.length * stream.bits for stream in layout))


def test_a_code_of_2_to_the_18_becomes_two_digits_of_512():
    slots = Slots((Stream("image", 2, (2**18,)),))
    assert [(count, positions.tolist()) for _, count, positions in slots.groups] == [(512, [0, 2]), (512, [1, 3])]
    assert slots.read(torch.tensor([[512 * 3 + 5, 2**18 - 1]])).tolist() == [[3, 512 + 5, 511, 512 + 511]]
    assert slots.share.tolist() == [0, 1, 0, 1] and slots.bits.tolist() == [0, 18, 0, 18]


@pytest.mark.parametrize("largest", [3, 16384])
def test_dropped_tokens_stay_dropped(largest):
    layout = LAYOUTS["sub-codes"]
    ids = random_tokens(layout).flatten()
    ids[0, 3:6] = -1
    slots = Slots(layout, largest)
    dropped = (slots.read(ids)[0] < 0).double()
    assert float(dropped @ slots.share) == pytest.approx(1) and (slots.read(ids)[1:] >= 0).all()


def test_ids_of_another_layout_are_refused():
    slots = Slots((Stream("image", 2, (4, 3)),))
    slots.read(torch.tensor([[3, 6, 0, 4]]))
    for wrong in ([4, 6, 0, 4], [3, 7, 0, 4], [3, 3, 0, 4]):
        with pytest.raises(ValueError, match="stands at a place of the layout that holds"):
            slots.read(torch.tensor([wrong]))


def test_unigram_probabilities_sum_to_one_in_every_range():
    slots = Slots((Stream("image", 2, (4, 3)),))
    counts = torch.tensor([5, 0, 1, 0, 0, 0, 9])
    probabilities = slots.log_unigram(counts).exp()
    expected = [5.5 / 8, 0.5 / 8, 1.5 / 8, 0.5 / 8, 0.5 / 10.5, 0.5 / 10.5, 9.5 / 10.5]
    assert probabilities.tolist() == pytest.approx(expected)
    assert math.isclose(float(probabilities.sum()), 2)
