"""The token container: layouts of several streams, sub-codes and dropped positions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok import Stream, Tokens

LAYOUTS = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=4
)


ANYTHING_OR_NOTHING_DROPPED = st.booleans()


@st.composite
def tokens(draw, dropped=ANYTHING_OR_NOTHING_DROPPED):
    layout = tuple(Stream(f"s{i}", length, tuple(sizes)) for i, (length, sizes) in enumerate(draw(LAYOUTS)))
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    indices, mask = {}, {}
    for stream in layout:
        columns = [torch.randint(size, (batch, stream.length), generator=generator) for size in stream.codebook_sizes]
        indices[stream.name] = torch.stack(columns, -1)
        mask[stream.name] = torch.rand(batch, stream.length, generator=generator) < 0.7
    return Tokens(indices, layout, mask if draw(dropped) else None)


def equal(a: Tokens, b: Tokens) -> bool:
    return a.layout == b.layout and all(torch.equal(a.indices[s.name], b.indices[s.name]) for s in a.layout)


@settings(deadline=None)
@given(tokens())
def test_unflatten_inverts_flatten(original):
    ids = original.flatten()
    again = Tokens.unflatten(ids, original.layout)
    assert equal(again, original)
    assert torch.equal(again.flatten(), ids)
    for stream in original.layout:
        if original.mask is not None:
            kept = again.mask[stream.name] if again.mask else torch.ones_like(original.mask[stream.name])
            assert torch.equal(kept, original.mask[stream.name])


@settings(deadline=None)
@given(tokens(dropped=st.just(False)))
def test_every_subcode_of_every_stream_has_its_own_ids(original):
    ids = original.flatten()
    assert int(ids.min()) >= 0 and int(ids.max()) < original.vocab_size
    start, column = 0, 0
    for stream in original.layout:
        block = ids[:, column : column + stream.length * stream.num_subcodes].view(len(ids), -1, stream.num_subcodes)
        for subcode, size in enumerate(stream.codebook_sizes):
            assert int(block[..., subcode].min()) >= start and int(block[..., subcode].max()) < start + size
            start += size
        column += stream.length * stream.num_subcodes


def test_a_plain_vq_flattens_to_its_own_indices():
    indices = torch.randint(100, (2, 7, 1))
    assert torch.equal(Tokens({"image": indices}, (Stream("image", 7, (100,)),)).flatten(), indices[..., 0])


@settings(deadline=None)
@given(tokens(), st.data())
def test_truncate_is_a_prefix(original, data):
    total = sum(stream.length for stream in original.layout)
    n = data.draw(st.integers(1, total))
    short = original.truncate(n)
    assert sum(stream.length for stream in short.layout) == n
    # One entry per token, streams in layout order: only the sub-codes' number differs from token to token.
    width, left = 0, n
    for stream in original.layout:
        width += min(left, stream.length) * stream.num_subcodes
        left -= min(left, stream.length)
    assert torch.equal(short.flatten(), original.flatten()[:, :width])
    assert short.truncate(n).layout == short.layout


@pytest.mark.parametrize("n", [0, -1, 8])
def test_truncate_refuses_impossible_lengths(n):
    with pytest.raises(ValueError, match=f"between 1 and 7; got {n}"):
        Tokens({"image": torch.zeros(1, 7, 1, dtype=torch.int64)}, (Stream("image", 7, (4,)),)).truncate(n)


def test_truncating_a_grid_forgets_the_grid():
    grid = Tokens({"image": torch.zeros(1, 6, 1, dtype=torch.int64)}, (Stream("image", 6, (4,), (2, 3)),))
    assert grid.truncate(6).layout[0].grid == (2, 3)
    assert grid.truncate(4).layout[0].grid is None


def test_bits_count_kept_tokens_at_a_fixed_rate():
    layout = (Stream("a", 3, (8, 2)), Stream("b", 2, (5,)))
    indices = {"a": torch.zeros(2, 3, 2, dtype=torch.int64), "b": torch.zeros(2, 2, 1, dtype=torch.int64)}
    assert Tokens(indices, layout).bits == pytest.approx(3 * 4 + 2 * math.log2(5))
    mask = {"a": torch.tensor([[True, True, False], [True, False, False]]), "b": torch.ones(2, 2, dtype=torch.bool)}
    assert Tokens(indices, layout, mask).bits == pytest.approx(1.5 * 4 + 2 * math.log2(5))


def test_dropped_positions_hold_minus_one_whatever_they_held():
    mask = {"image": torch.tensor([[True, False]])}
    tokens = Tokens({"image": torch.tensor([[[3], [2]]])}, (Stream("image", 2, (4,)),), mask)
    assert tokens.indices["image"].flatten().tolist() == [3, -1]


def test_joining_and_slicing_are_inverse():
    layout = (Stream("image", 4, (9,)),)
    whole = Tokens({"image": torch.randint(9, (6, 4, 1))}, layout)
    assert equal(Tokens.cat([whole[:2], whole[2:5], whole[5:]]), whole)
    assert len(whole[1:4]) == 3
    masked = Tokens(whole.indices, layout, {"image": torch.rand(6, 4) < 0.5})
    joined = Tokens.cat([whole, masked])
    assert torch.equal(joined.mask["image"][:6], torch.ones(6, 4, dtype=torch.bool))
    assert torch.equal(joined.mask["image"][6:], masked.mask["image"])
    with pytest.raises(ValueError, match="layouts"):
        Tokens.cat([whole, whole.truncate(3)])
    with pytest.raises(ValueError, match="at least one"):
        Tokens.cat([])


def one(indices, sizes=(4,), length=2, mask=None):
    return Tokens({"image": indices}, (Stream("image", length, sizes),), mask)


def test_wrong_dtypes_and_shapes_are_named():
    with pytest.raises(TypeError, match="int64; got torch.int32"):
        one(torch.zeros(1, 2, 1, dtype=torch.int32))
    with pytest.raises(TypeError, match="int64; got torch.float32"):
        one(torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match=r"\(1, 2, 1\); got \(1, 3, 1\)"):
        one(torch.zeros(1, 3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(1, 2\)"):
        one(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="streams"):
        Tokens({"other": torch.zeros(1, 2, 1, dtype=torch.int64)}, (Stream("image", 2, (4,)),))
    with pytest.raises(TypeError, match="bool"):
        one(torch.zeros(1, 2, 1, dtype=torch.int64), mask={"image": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"mask .* got \(1, 3\)"):
        one(torch.zeros(1, 2, 1, dtype=torch.int64), mask={"image": torch.ones(1, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="grid"):
        Stream("image", 5, (4,), (2, 3))


@pytest.mark.parametrize("value", [4, 99, -2])
def test_an_index_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=rf"index {value} of image 1, token 0, sub-code 0 .* 4 codes"):
        one(torch.tensor([[[0], [1]], [[value], [2]]])).validate()


def test_unflatten_refuses_what_the_layout_cannot_hold():
    layout = (Stream("a", 1, (4,)), Stream("b", 1, (4,)))
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        Tokens.unflatten(torch.zeros(1, 3, dtype=torch.int64), layout)
    with pytest.raises(TypeError, match="int64"):
        Tokens.unflatten(torch.zeros(1, 2), layout)
    with pytest.raises(ValueError, match="id 3 of image 0 .* stream 'b'"):
        Tokens.unflatten(torch.tensor([[0, 3]]), layout)
    with pytest.raises(ValueError, match="index 5"):
        Tokens.unflatten(torch.tensor([[5, 4]]), layout)
