"""Usage, entropy and rate of codes: known histograms, brute force, every layout, shards."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokens import usage as codebook_usage
from vistok.eval.tokens.codebook import codebook_statistics
from vistok.eval.tokens.store import TokenStore
from vistok.eval.tokens.usage import CodebookUsage
from vistok.quantizers.bits import pack_bits
from vistok.tokenizers.base import Stream, Tokens

_spec = importlib.util.spec_from_file_location("vistok_test_tokens", Path(__file__).with_name("tokens.py"))
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)


def tokens_of(rows, size=8, **stream):
    """Tokens of one stream from a list of rows of codes."""
    ids = torch.tensor(rows).unsqueeze(2)
    return Tokens({"image": ids}, shared.layout_of((size,), ids.shape[1], **stream))


def usage(tokens, folder, make=CodebookUsage, **options):
    (metric,) = shared.gathered(lambda: [make()], tokens, folder, **options)
    return metric.compute(), metric.details()


def entropy(values):
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


# ---- known histograms


def test_uniform_use_of_half_the_codes(tmp_path):
    values, details = usage(tokens_of([[0, 1, 2, 3], [3, 2, 1, 0]]), tmp_path)
    assert values["usage"] == 0.5 and values["dead_codes"] == 4
    assert values["perplexity"] == pytest.approx(4) and values["code_entropy"] == pytest.approx(2)
    assert values["code_entropy_normalised"] == pytest.approx(2 / 3)
    assert values["bits_per_pixel"] == pytest.approx(4 * 3 / 64)
    assert values["bits_per_pixel_entropy"] == pytest.approx(4 * 2 / 64)
    assert values["bits_per_pixel_entropy_position"] == pytest.approx(4 * 1 / 64)  # two codes at each position
    assert details["positions"]["image"] == {"entropy": [1.0] * 4, "usage": [0.25] * 4}
    assert details["levels"][0]["counts"] == [2, 2, 2, 2] and details["tokens"] == 8


def test_one_code_has_no_entropy(tmp_path):
    values, _ = usage(tokens_of([[5] * 4] * 3), tmp_path)
    assert values["perplexity"] == 1 and values["code_entropy"] == 0 and values["usage"] == 1 / 8
    assert values["bits_per_pixel_entropy"] == 0


def test_rare_codes_do_not_count_as_used_at_one_percent_of_the_uniform_rate(tmp_path):
    rows = [[0] * 100] * 15 + [[0] * 99 + [1]]  # 1600 tokens, uniform rate 200: code 1 is used once, below 2
    values, _ = usage(tokens_of(rows), tmp_path)
    assert values["usage"] == 2 / 8 and values["usage_1pct"] == 1 / 8
    values, _ = usage(tokens_of([*rows[:-1], [0] * 98 + [1] * 2]), tmp_path)
    assert values["usage_1pct"] == 2 / 8


def test_values_are_those_of_training(tmp_path):
    tokens = shared.random_tokens(shared.layout_of((16, 8)), 30)
    values, _ = usage(tokens, tmp_path)
    counts = torch.cat(
        [torch.bincount(tokens.indices["image"][..., g].flatten(), minlength=k) for g, k in ((0, 16), (1, 8))]
    )
    for name, value in codebook_statistics(counts, (16, 8)).items():
        assert values[name] == pytest.approx(float(value)), name


# ---- layouts


LAYOUTS = {
    "plain": (shared.layout_of((16,), 12, (3, 4)), (16,)),
    "subcodes": (shared.layout_of((16, 8, 4)), (16, 8, 4)),
    "streams": ((Stream("a", 4, (16,)), Stream("b", 9, (8, 4), (3, 3))), (16, 8, 4)),
    "pyramid": (tuple(Stream(f"scale_{i}", n * n, (16, 4), (n, n)) for i, n in enumerate((1, 2, 3))), (16, 4)),
}


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_equals_brute_force(case, dropped, tmp_path):
    layout, sizes = LAYOUTS[case]
    tokens = shared.random_tokens(layout, 25, dropped=dropped)
    values, details = usage(tokens, tmp_path, lambda: CodebookUsage(sizes))
    books = {}  # codes of each sub-code of each stream, then of each codebook
    for stream in layout:
        for g, size in enumerate(stream.codebook_sizes):
            kept = [c for c in tokens.indices[stream.name][..., g].flatten().tolist() if c >= 0]
            books[stream.name, g] = (size, kept)
    bits = sum(len(codes) * math.log2(size) for size, codes in books.values())
    ideal = sum(len(codes) * entropy(codes) for _, codes in books.values())
    assert values["bits_per_pixel"] == pytest.approx(bits / (25 * 64))
    assert values["bits_per_pixel_entropy"] == pytest.approx(ideal / (25 * 64))
    positional = sum(
        len(kept) * entropy(kept)
        for stream in layout
        for g in range(stream.num_subcodes)
        for n in range(stream.length)
        if (kept := [c for c in tokens.indices[stream.name][:, n, g].tolist() if c >= 0])
    )
    assert values["bits_per_pixel_entropy_position"] == pytest.approx(positional / (25 * 64))
    if case == "pyramid":
        wholes = [(k, sum((books[s.name, g][1] for s in layout), [])) for g, k in enumerate(sizes)]
    else:
        wholes = list(books.values())
    assert values["usage"] == pytest.approx(sum(len(set(c)) for _, c in wholes) / sum(k for k, _ in wholes))
    assert values["dead_codes"] == sum(k - len(set(c)) for k, c in wholes)
    assert values["code_entropy"] == pytest.approx(sum(entropy(c) for _, c in wholes) / len(wholes))
    assert values["perplexity"] == pytest.approx(sum(2 ** entropy(c) for _, c in wholes) / len(wholes))
    assert [level["tokens"] for level in details["levels"]] == [len(codes) for _, codes in books.values()]
    if len(books) > 1:
        for (name, g), level in zip(books, details["levels"], strict=True):
            many = sum(stream.num_subcodes for stream in layout if stream.name == name) > 1
            label = {"subcodes": f"{g}", "pyramid": f"{name}.{g}", "streams": f"{name}.{g}" if many else name}[case]
            assert level["name"] == label and values[f"usage/{label}"] == level["usage"]
    json.dumps(details, allow_nan=False)


@pytest.mark.parametrize("case", LAYOUTS)
def test_shards_equal_one_pass(case, tmp_path):
    layout, sizes = LAYOUTS[case]
    tokens = shared.random_tokens(layout, 23, dropped=0.2)
    one = usage(tokens, tmp_path, lambda: CodebookUsage(sizes))
    parts = [[7, 3, 22], [], list(range(8, 22)), [0, 1, 2, 4, 5, 6]]
    several = usage(
        tokens, tmp_path, lambda: CodebookUsage(sizes), parts=parts, batch=3, through=tmp_path / "states.pt"
    )
    assert one == several


def test_layouts_may_not_change():
    metric = CodebookUsage()
    metric.update(shared.pairs(shared.random_tokens(shared.layout_of((16,)), 2), [0, 1]))
    with pytest.raises(ValueError, match="one layout"):
        metric.update(shared.pairs(shared.random_tokens(shared.layout_of((8,)), 2), [2, 3]))
    with pytest.raises(ValueError, match="one number of pixels; got 64 and 32"):
        metric.update(shared.pairs(shared.random_tokens(shared.layout_of((16,)), 2), [2, 3], pixels=(4, 8)))


def test_reconstructions_without_tokens_say_so():
    with pytest.raises(MetricUnavailable, match="not decoded from tokens"):
        CodebookUsage().update(shared.pairs(None, [0]))
    with pytest.raises(MetricUnavailable, match="no image"):
        CodebookUsage().compute()


# ---- the usage curve


def test_usage_curve_counts_codes_of_the_first_images(tmp_path):
    tokens = shared.random_tokens(shared.layout_of((64,), 3), 40)
    index = [10 * i + 7 for i in range(40)]  # numbers of a subset
    _, details = usage(tokens, tmp_path, parts=[range(25, 40), range(25)], index=index)
    curve = details["usage_curve"]
    assert curve["images"][0] == 1 and curve["images"][-1] == 40
    for images, share in zip(curve["images"], curve["usage"], strict=True):
        assert share == len(tokens.indices["image"][:images].unique()) / 64


# ---- large codebooks and digits


def test_codebooks_without_counters_are_read_from_the_store(tmp_path, monkeypatch):
    tokens = shared.random_tokens((Stream("a", 5, (300, 8)), Stream("b", 4, (300, 8), (2, 2))), 30, dropped=0.2)

    def make():
        store = TokenStore()
        return [store, CodebookUsage((300, 8), store=store)]

    _, counted = shared.gathered(make, tokens, tmp_path / "counted")
    expected = counted.compute()
    monkeypatch.setattr(codebook_usage, "COUNTS_LIMIT", 100)
    _, stored = shared.gathered(make, tokens, tmp_path / "stored", parts=[range(20, 30), range(20)])
    found = stored.compute()
    assert found.keys() == expected.keys() - {"bits_per_pixel_entropy_position"}
    assert found == pytest.approx({name: expected[name] for name in found})
    assert stored.details()["usage_curve"] == counted.details()["usage_curve"]


def test_the_curve_of_a_large_codebook_goes_on_over_many_blocks(tmp_path):
    ids = torch.arange(1100).unsqueeze(1).expand(-1, 2) * (1 << 30)  # one new code in every image
    tokens = Tokens({"image": ids.unsqueeze(2).clone()}, shared.layout_of((1 << 45,), 2))

    def make():
        store = TokenStore()
        return [store, CodebookUsage(store=store)]

    _, metric = shared.gathered(make, tokens, tmp_path, batch=600)
    values, curve = metric.compute(), metric.details()["usage_curve"]
    assert [round(share * (1 << 45)) for share in curve["usage"]] == curve["images"]
    assert values["dead_codes"] == (1 << 45) - 1100 and values["perplexity"] == pytest.approx(1100)


def test_large_codebooks_without_a_store_are_left_out(tmp_path):
    tokens = shared.random_tokens(shared.layout_of((1 << 36,), 6), 9)
    values, details = usage(tokens, tmp_path, lambda: CodebookUsage(digits=(2,) * 36))
    assert set(values) == {"digit_entropy", "digit_correlation"} and details["levels"] == []


def test_positions_are_left_out_when_their_table_would_be_large(tmp_path, monkeypatch):
    tokens = shared.random_tokens(shared.layout_of((16,)), 9)
    expected, _ = usage(tokens, tmp_path)
    monkeypatch.setattr(codebook_usage, "POSITIONS_LIMIT", 100)
    found, details = usage(tokens, tmp_path)
    assert expected.pop("bits_per_pixel_entropy_position") and found == expected and details["positions"] == {}


def test_bits_of_a_binary_code(tmp_path):
    draws = torch.Generator().manual_seed(0)
    bits = torch.rand(500, 7, 6, generator=draws) < torch.tensor([0.5, 0.9, 0.5, 1.0, 0.5, 0.5])
    bits[..., 4] = bits[..., 0] ^ (torch.rand(500, 7, generator=draws) < 0.1)
    tokens = Tokens(
        {"image": torch.stack([pack_bits(part, "least_significant_first") for part in bits.split(3, 2)], 2)},
        shared.layout_of((8, 8), 7),
    )
    values, details = usage(
        tokens, tmp_path, lambda: CodebookUsage(digits=(2, 2, 2)), parts=[range(123), range(123, 500)]
    )
    flat = bits.flatten(0, 1).double()
    share = flat.mean(0)
    expected = [0.0 if p in (0.0, 1.0) else -p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in share.tolist()]
    assert details["digits"][0]["entropy"] == pytest.approx(expected, abs=1e-5)
    assert values["digit_entropy"] == pytest.approx(sum(expected) / 6)
    correlation = torch.corrcoef(flat.t()).nan_to_num(0.0)
    found = torch.tensor(details["digits"][0]["correlation"], dtype=torch.float64)
    assert torch.allclose(found, correlation, atol=1e-5) and found[0, 4] > 0.7
    away = ~torch.eye(6, dtype=torch.bool)
    assert values["digit_correlation"] == pytest.approx(float(correlation[away].abs().mean()), abs=1e-6)


def test_dropped_tokens_have_no_digits(tmp_path):
    tokens = tokens_of([[7, -1, -1, 0], [-1, 7, 0, -1]])
    values, _ = usage(tokens, tmp_path, lambda: CodebookUsage(digits=(4, 2)))
    assert values["digit_entropy"] == pytest.approx((0.5 + 1.0) / 2) and values["digit_correlation"] == pytest.approx(1)


def test_stored_tokens_are_sorted_a_few_times_however_many_blocks_there_are(tmp_path, monkeypatch):
    tokens = shared.random_tokens(shared.layout_of((1 << 30,), 8), 64)  # hardly any code comes twice
    sorted_values = []
    union, blocks = codebook_usage.Distinct.union.__func__, TokenStore.blocks

    def counted(cls, parts):
        sorted_values.append(sum(len(part.values) for part in parts))
        return union(cls, parts)

    monkeypatch.setattr(codebook_usage.Distinct, "union", classmethod(counted))
    monkeypatch.setattr(TokenStore, "blocks", lambda self: blocks(self, 1))

    def make():
        store = TokenStore()
        return [store, CodebookUsage((1 << 30,), (), store)]

    _, metric = shared.gathered(make, tokens, tmp_path)
    codes = tokens.indices["image"].flatten()
    assert metric.compute()["dead_codes"] == 2**30 - len(codes.unique())
    assert sum(sorted_values) < 5 * len(codes)
