"""Words, neighbours and compression of stored tokens: closed forms, brute force, every layout, shards."""

import heapq
import importlib.util
import itertools
import json
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokens import language as token_language
from vistok.eval.tokens.language import TokenLanguage, huffman_bits
from vistok.eval.tokens.store import TokenStore
from vistok.tokenizers.base import Stream, Tokens

_spec = importlib.util.spec_from_file_location("vistok_test_tokens", Path(__file__).with_name("tokens.py"))
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)


def language(tokens, folder, sizes=None, max_tokens=1 << 24, **options):
    def make():
        store = TokenStore()
        return [store, TokenLanguage(store, sizes, max_tokens)]

    _, metric = shared.gathered(make, tokens, folder, **options)
    return metric.compute(), metric.details()


def tokens_of(ids, size=8, **stream):
    ids = torch.as_tensor(ids)
    return Tokens({"image": ids.unsqueeze(2)}, shared.layout_of((size,), ids.shape[1], **stream))


def entropy(values):
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def information(pairs):
    return entropy([a for a, _ in pairs]) + entropy([b for _, b in pairs]) - entropy(pairs)


# ---- closed forms


def test_zipf_exponents_of_power_laws(tmp_path):
    ranks = np.arange(1, 401)
    counts = np.round(4e5 / np.where(ranks <= 20, ranks**0.5, 20**0.5 * (ranks / 20) ** 1.5)).astype(int)
    found = token_language._zipf(counts)
    assert found["zipf_exponent_head"] == pytest.approx(0.5, abs=0.01)
    assert found["zipf_exponent_tail"] == pytest.approx(1.5, abs=0.01)
    assert token_language._zipf(np.random.default_rng(0).permutation(counts)) == found
    straight = token_language._zipf(np.round(1e7 / ranks).astype(int))
    assert all(value == pytest.approx(1.0, abs=0.01) for value in straight.values())


def test_one_word_said_again_and_again(tmp_path):
    values, details = language(tokens_of([[3] * 6] * 5), tmp_path)
    assert values["unigram_entropy"] == 0 and values["huffman_ratio"] == 0 and values["type_token_ratio"] == 1 / 30
    assert values["mutual_information_left"] == 0 and values["conditional_entropy_left"] == 0
    assert math.isnan(values["zipf_exponent"]) and values["images_to_90pct_types"] == 1
    assert details["innovation"]["types"] == [1] * len(details["innovation"]["images"])


def test_a_token_that_repeats_its_neighbour_tells_everything(tmp_path):
    draws = torch.Generator().manual_seed(0)
    first = torch.randint(8, (400, 1), generator=draws)
    values, _ = language(tokens_of(first.expand(-1, 5)), tmp_path)
    assert values["conditional_entropy_left"] == pytest.approx(0, abs=1e-9)
    assert (
        values["mutual_information_left"] == pytest.approx(values["unigram_entropy"])
        and values["unigram_entropy"] > 2.9
    )
    assert values["mutual_information_left_excess"] == pytest.approx(values["mutual_information_left"], abs=0.15)


def test_chance_is_taken_out_of_mutual_information(tmp_path):
    ids = torch.randint(64, (60, 20), generator=torch.Generator().manual_seed(0))
    values, _ = language(tokens_of(ids, 64), tmp_path)
    assert values["mutual_information_left"] > 1  # of independent tokens: too few of them
    assert abs(values["mutual_information_left_excess"]) < 0.1


def test_innovation_and_heaps_of_new_words_in_every_image(tmp_path):
    ids = torch.arange(100).unsqueeze(1) * torch.tensor([1, 0]) + torch.tensor([1, 0])  # one new word per image
    values, details = language(tokens_of(ids, 200), tmp_path)
    curve = details["innovation"]
    assert curve["types"] == [images + 1 for images in curve["images"]]
    assert curve["tokens"] == [2 * images for images in curve["images"]] and curve["bigram_types"] == curve["images"]
    assert values["heaps_exponent"] == pytest.approx(1, abs=0.1) and values["images_to_90pct_types"] == 90


# ---- brute force, on every layout


LAYOUTS = {
    "sequence": (shared.layout_of((16,), 12), (16,)),
    "grid": (shared.layout_of((16,), 12, (3, 4)), (16,)),
    "subcodes": (shared.layout_of((6, 4, 2), 6, (2, 3)), (6, 4, 2)),
    "streams": ((Stream("a", 4, (16,)), Stream("b", 9, (8, 4), (3, 3))), (16, 8, 4)),
    "pyramid": (tuple(Stream(f"scale_{i}", n * n, (16,), (n, n)) for i, n in enumerate((1, 2, 3))), (16,)),
    "large": (shared.layout_of((1 << 40, 1 << 40), 6, (2, 3)), (1 << 40, 1 << 40)),
}


def words_of(tokens, sizes):
    """Per stream nested lists of words [image][token][part]; each a tuple that nothing else equals; None if dropped."""
    pyramid = len(tokens.layout) > 1 and all(stream.codebook_sizes == sizes for stream in tokens.layout)
    whole = math.prod(sizes) < 1 << 62
    streams = []
    for stream in tokens.layout:
        name = "" if pyramid else stream.name
        rows = []
        for image in tokens.indices[stream.name].tolist():
            if whole:
                rows.append([[(name, *codes) if min(codes) >= 0 else None] for codes in image])
            else:
                rows.append([[(name, g, c) if c >= 0 else None for g, c in enumerate(codes)] for codes in image])
        streams.append(rows)
    return streams


def neighbours_of(tokens, streams, above, shift=0):
    pairs = []
    for stream, rows in zip(tokens.layout, streams, strict=True):
        width = stream.grid[1] if stream.grid else stream.length
        for number, row in enumerate(rows):
            other = rows[number - shift]
            for place, part in itertools.product(range(stream.length), range(len(row[0]))):
                if above and stream.grid and place >= width:
                    pairs.append((other[place - width][part], row[place][part]))
                if not above and place % width:
                    pairs.append((other[place - 1][part], row[place][part]))
    return [pair for pair in pairs if None not in pair]


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_equals_brute_force(case, dropped, tmp_path):
    layout, sizes = LAYOUTS[case]
    tokens = shared.random_tokens(layout, 20, dropped=dropped)
    values, details = language(tokens, tmp_path, sizes)
    streams = words_of(tokens, sizes)
    flat = [word for rows in streams for row in rows for token in row for word in token if word is not None]
    assert details["tokens"] == len(flat)
    assert values["type_token_ratio"] == pytest.approx(len(set(flat)) / len(flat))
    assert values["unigram_entropy"] == pytest.approx(entropy(flat))
    for name, above in (("left", False), ("above", True)):
        pairs = neighbours_of(tokens, streams, above)
        if not pairs:
            assert f"mutual_information_{name}" not in values
            continue
        strangers = information(neighbours_of(tokens, streams, above, shift=1))
        assert values[f"mutual_information_{name}"] == pytest.approx(information(pairs), abs=1e-9)
        assert values[f"mutual_information_{name}_excess"] == pytest.approx(information(pairs) - strangers, abs=1e-9)
        expected = entropy(pairs) - entropy([a for a, _ in pairs])
        assert values[f"conditional_entropy_{name}"] == pytest.approx(expected, abs=1e-9)
        if not above:
            assert values["bigram_entropy"] == pytest.approx(entropy(pairs))
            assert details["innovation"]["bigram_types"][-1] == len(set(pairs))
    assert ("mutual_information_above" in values) == (case != "sequence")
    curve = details["innovation"]
    for images, types in zip(curve["images"], curve["types"], strict=True):
        seen = {w for rows in streams for row in rows[:images] for token in row for w in token if w is not None}
        assert types == len(seen)
    json.dumps(details, allow_nan=False)


@pytest.mark.parametrize("case", LAYOUTS)
def test_shards_equal_one_pass(case, tmp_path):
    layout, sizes = LAYOUTS[case]
    tokens = shared.random_tokens(layout, 23, dropped=0.2)
    index = [3 * i + 1 for i in range(23)]
    one = language(tokens, tmp_path / "one", sizes, index=index)
    parts = [[7, 3, 22], [], list(range(8, 22)), [0, 1, 2, 4, 5, 6]]
    options = {"parts": parts, "index": index, "batch": 3, "through": tmp_path / "states.pt"}
    assert language(tokens, tmp_path / "several", sizes, **options) == one


def test_a_token_without_one_of_its_subcodes_is_no_word(tmp_path):
    ids = torch.tensor([[[1, 2], [1, -1], [-1, -1], [1, 2]]])
    values, details = language(Tokens({"image": ids}, shared.layout_of((4, 4), 4)), tmp_path)
    assert details["tokens"] == 2 and values["type_token_ratio"] == 0.5 and "bigram_entropy" not in values


# ---- compression


def test_huffman_code_has_the_least_length():
    draws = np.random.default_rng(0)
    for counts in (
        [5],
        [1, 1],
        [7, 1, 1, 1],
        [3] * 9,
        draws.integers(1, 50, 300),
        draws.zipf(1.5, 200).clip(max=10**6),
    ):
        heap = [int(count) for count in counts]
        heapq.heapify(heap)
        expected = 0
        while len(heap) > 1:
            joined = heapq.heappop(heap) + heapq.heappop(heap)
            expected += joined
            heapq.heappush(heap, joined)
        assert huffman_bits(np.array(counts)) == expected
    assert huffman_bits(np.ones(1 << 20, dtype=np.int64)) == 20 << 20  # joined many at a time


def test_compression_is_relative_to_a_fixed_rate(tmp_path):
    ids = torch.randint(256, (100, 50), generator=torch.Generator().manual_seed(0))
    values, _ = language(tokens_of(ids, 256), tmp_path / "random")
    assert values["huffman_ratio"] == pytest.approx(1, abs=0.02)
    expected = len(lzma.compress(ids.numpy().astype("<u2").tobytes())) / 5000
    assert values["xz_ratio"] == pytest.approx(expected, abs=0.02)
    values, _ = language(tokens_of(ids[:1].expand(100, -1), 256), tmp_path / "repeated")
    assert values["xz_ratio"] < 0.1 < 0.6 < values["huffman_ratio"] < 0.75  # about log2(46) of 8 bits


# ---- limits and errors


def test_a_limit_takes_evenly_spaced_images(tmp_path):
    tokens = tokens_of(torch.arange(2500).unsqueeze(1).expand(-1, 4).clone(), 5000)  # several blocks of the store
    values, details = language(tokens, tmp_path, max_tokens=3500, batch=500)
    assert details["images"] == 834 and details["images_in_total"] == 2500  # every third
    assert values["type_token_ratio"] == pytest.approx(1 / 4)


def test_what_cannot_be_computed_says_so(tmp_path):
    with pytest.raises(MetricUnavailable, match="no image"):
        language(tokens_of([[1]]), tmp_path, parts=[])
    with pytest.raises(MetricUnavailable, match="all tokens are dropped"):
        language(tokens_of([[-1, -1]]), tmp_path)
    with pytest.raises(MetricUnavailable, match=r"more than 2\^62 codes"):
        language(shared.random_tokens((Stream("a", 2, (1 << 62,)), Stream("b", 2, (1 << 62,))), 3), tmp_path / "huge")
    with pytest.raises(ValueError, match="max_tokens must be positive; got 0"):
        TokenLanguage(TokenStore(), max_tokens=0)
