"""Stored tokens come back as they were, in the order of their images, whoever stored them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokens.store import TokenStore, pooled
from vistok.tokenizers.base import Stream

_spec = importlib.util.spec_from_file_location("vistok_test_tokens", Path(__file__).with_name("tokens.py"))
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)


@pytest.mark.parametrize("size,number_bytes", [(2, 2), (65_535, 2), (65_536, 4), (1 << 31, 4), (1 << 62, 8)])
def test_tokens_come_back_whatever_their_codebook(size, number_bytes, tmp_path):
    layout = (Stream("a", 3, (size, 4)), Stream("b", 4, (size,), (2, 2)))
    tokens = shared.random_tokens(layout, 10, dropped=0.3)
    tokens.indices["a"][0, 0, 0] = size - 1
    tokens.mask["a"][0, 0] = True
    index = [5 * i + 2 for i in range(10)]
    (store,) = shared.gathered(
        lambda: [TokenStore()],
        tokens,
        tmp_path,
        [[9, 1, 4], [], [0, 2, 3, 5, 6, 7, 8]],
        index,
        2,
        tmp_path / "state.pt",
    )
    assert len(store) == 10 and store.index().tolist() == index and store.layout == layout
    blocks = list(store.blocks(4))
    assert [len(block) for block in blocks] == [4, 4, 2]
    for name in ("a", "b"):
        assert torch.equal(torch.cat([block.indices[name] for block in blocks]), tokens.indices[name])
    assert store.compute() == {} and (tmp_path / "0" / "part-0.rows").stat().st_size == 3 * (8 + 10 * number_bytes)


def test_an_empty_store_has_nothing(tmp_path):
    (store,) = shared.gathered(lambda: [TokenStore()], shared.random_tokens(shared.layout_of(), 2), tmp_path, [[]])
    assert len(store) == 0 and list(store.blocks()) == [] and store.index().tolist() == []


def test_errors(tmp_path):
    store, tokens = TokenStore(), shared.random_tokens(shared.layout_of(), 2)
    with pytest.raises(RuntimeError, match="open"):
        store.update(shared.pairs(tokens, [0, 1]))
    store.open(tmp_path, "part")
    store.update(shared.pairs(tokens, [0, 1]))
    with pytest.raises(ValueError, match="one layout"):
        store.update(shared.pairs(tokens.truncate(5), [2, 3]))
    with pytest.raises(MetricUnavailable, match="not decoded from tokens"):
        store.update(shared.pairs(None, [4]))


def test_streams_share_codebooks_if_the_tokenizer_has_no_more():
    two = (Stream("a", 2, (16,)), Stream("b", 4, (16,)))
    assert pooled(two, (16,)) and not pooled(two, (16, 16)) and not pooled(two, None) and not pooled(two[:1], (16,))
