"""Lengths come from one encoding; what images reach at each length is counted right."""

import math

import pytest
import torch

from vistok import OneDPiece, TailTokenDrop, TiTok, VectorQuantizer
from vistok.decoders.maskgit import MaskGITDecoder
from vistok.eval.length import adaptive_lengths, adaptive_section, length_variants, violations
from vistok.eval.metric import Originals
from vistok.eval.rate_distortion import RateMetric
from vistok.eval.variants import Codes, TokenizerVariant
from vistok.tokenizers.base import Stream

N = 8
SIZES = {"encoder_size": (32, 1, 2), "decoder_size": (32, 1, 2)}


def one_d_piece():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, l2_normalize=True)
    pixels = MaskGITDecoder(32, (1, 1, 1, 1), 1, 16)
    return OneDPiece(quantizer, 16, 8, N, num_proxy_codes=9, pixel_decoder=pixels, **SIZES).eval()


def titok(regularizers=(), tokens=N):
    torch.manual_seed(0)
    return TiTok(VectorQuantizer(16, 4), 16, 8, tokens, regularizers=regularizers, **SIZES).eval()


def originals(count=3):
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Originals(torch.arange(count), [str(i) for i in range(count)], -torch.ones(count), images)


@pytest.mark.parametrize("make", [one_d_piece, lambda: titok([TailTokenDrop()])])
def test_lengths_decode_prefixes_of_one_encoding(make):
    tokenizer, batch, calls = make(), originals(), []
    encode = tokenizer.encode
    tokenizer.encode = lambda images: calls.append(len(images)) or encode(images)
    codes = Codes(tokenizer)
    variants = length_variants(codes)
    assert [variant.name for variant in variants] == ["length=1", "length=2", "length=4", "length=8"]
    full = TokenizerVariant(codes).reconstruct(batch)
    pairs = {variant.num_tokens: variant.reconstruct(batch) for variant in variants}
    assert calls == [3]
    assert torch.equal(pairs[N].reconstructions, full.reconstructions)
    assert torch.equal(pairs[N].bits, full.bits)
    with torch.no_grad():
        prefix = tokenizer.decode(encode(batch.images.float() / 255).truncate(2))
    assert torch.equal(pairs[2].reconstructions, (prefix * 255).round().to(torch.uint8))
    assert not torch.equal(pairs[2].reconstructions, full.reconstructions)
    assert pairs[2].bits.tolist() == [2 * 4.0] * 3  # 16 codes


def test_the_rate_of_a_length_is_that_of_its_tokens():
    metric = RateMetric()
    for variant in length_variants(Codes(one_d_piece()), [4]):
        metric.update(variant.reconstruct(originals()))
    assert metric.compute() == {"bits_per_pixel": 4 * 4 / 256, "bytes": 2.0}


@pytest.mark.parametrize(("total", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_lengths_are_the_powers_of_two_and_the_full_length(total, expected):
    codes = Codes(titok([TailTokenDrop()], total))
    assert [variant.num_tokens for variant in length_variants(codes)] == expected


def test_given_lengths_are_sorted_and_taken_once():
    assert [variant.num_tokens for variant in length_variants(Codes(one_d_piece()), [5, 3, 5])] == [3, 5]


def test_the_full_length_is_that_of_the_size_to_evaluate(monkeypatch):
    tokenizer = titok([TailTokenDrop()])
    streams = {None: tokenizer.layout(), (16, 32): (Stream("image", 5, (16,)),)}
    monkeypatch.setattr(tokenizer, "layout", streams.__getitem__)
    assert [variant.num_tokens for variant in length_variants(Codes(tokenizer), None, (16, 32))] == [1, 2, 4, 5]


@pytest.mark.parametrize("lengths", [[], [0, 4], [4, N + 1]])
def test_lengths_that_a_tokenizer_does_not_have_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be numbers from 1 to 8; got"):
        length_variants(Codes(one_d_piece()), lengths)


def test_a_tokenizer_of_fixed_length_is_refused_by_name():
    with pytest.raises(ValueError, match="TiTok has a fixed length"):
        length_variants(Codes(titok()))


def tables(higher, count=200):
    """Values at lengths 1, 2, 4, 16 that mostly get better, out of order, some of them missing."""
    generator = torch.Generator().manual_seed(int(higher))
    values = torch.randn(4, count, generator=generator) + torch.arange(4.0)[:, None] * (1 if higher else -1)
    values[1, :5] = float("nan")
    values[2, 5:10] = float("inf")
    values[0, 10:15] = -float("inf")
    return dict(zip((1, 16, 4, 2), values[[0, 3, 2, 1]], strict=True))


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
def test_adaptive_lengths_equal_a_search_through_every_image(higher, per_image):
    values = tables(higher)
    sign = 1 if higher else -1
    target = sign * torch.linspace(-1, 4.5, 200) if per_image else sign * 2.0
    found = adaptive_lengths(values, target, higher)
    expected = []
    for image in range(200):
        goal = float(target[image]) if per_image else target
        row = {length: float(values[length][image]) for length in (1, 2, 4, 16)}
        reached = [length for length, value in row.items() if (value >= goal if higher else value <= goal)]
        expected.append(next((length for length in reached if math.isfinite(row[length])), 0))
    assert found.tolist() == expected and found.dtype == torch.int64
    assert len(set(expected)) == 5


def test_a_target_is_reached_where_it_is_met_exactly():
    for higher in (True, False):
        assert adaptive_lengths({3: torch.tensor([0.5, 0.1]), 7: torch.tensor([0.5, 0.5])}, 0.5, higher)[0] == 3


@pytest.mark.parametrize("higher", [True, False])
def test_violations_equal_a_search_through_every_image(higher):
    values, tolerance = tables(higher), 0.3
    lengths, found = (1, 2, 4, 16), violations(values, higher, tolerance)
    worse = []
    for image in range(200):
        gains = [float(values[b][image] - values[a][image]) for a, b in zip(lengths, lengths[1:], strict=False)]
        worse.append([math.isfinite(gain) and gain * (1 if higher else -1) < -tolerance for gain in gains])
    assert found["images"] == pytest.approx(sum(map(any, worse)) / 200)
    assert 0 < found["images"] < 1
    assert [(step["from"], step["to"]) for step in found["steps"]] == [(1, 2), (2, 4), (4, 16)]
    for number, step in enumerate(found["steps"]):
        assert step["share"] == pytest.approx(sum(row[number] for row in worse) / 200)


def test_quality_that_never_falls_violates_nothing():
    values = {1: torch.tensor([1.0, 2.0]), 2: torch.tensor([1.0, 3.0])}
    assert violations(values, True) == {"images": 0.0, "steps": [{"from": 1, "to": 2, "share": 0.0}]}
    assert violations(values, False)["images"] == 0.5


def test_section_counts_images_by_length_and_says_what_adapting_costs():
    values = {1: torch.tensor([19.0, 26.0, 10.0, 24.5]), 4: torch.tensor([24.0, 27.0, 11.0, 24.0])}
    values[8] = torch.tensor([25.0, 28.0, 12.0, 25.0])
    section = adaptive_section({"psnr": values}, {"psnr": (24.0,)}, {"psnr": (1.0,)})
    absolute, relative = section["psnr"]["adaptive"]
    assert (absolute["rule"], absolute["target"]) == ("value", 24.0)
    assert absolute["histogram"] == [[1, 2], [4, 1], [8, 0]] and absolute["unreached"] == 1
    assert absolute["mean_tokens"] == (4 + 1 + 8 + 1) / 4
    assert absolute["mean_value"] == (24 + 26 + 12 + 24.5) / 4
    assert (relative["rule"], relative["target"]) == ("full length", 1.0)
    assert relative["histogram"] == [[1, 1], [4, 3], [8, 0]] and relative["unreached"] == 0
    assert section["psnr"]["violations"]["images"] == 0.25


def test_slack_of_a_distance_lies_above_its_full_length():
    values = {1: torch.tensor([0.30, 0.5]), 2: torch.tensor([0.22, 0.3]), 4: torch.tensor([0.2, 0.1])}
    (entry,) = adaptive_section({"lpips_alex": values}, {}, {"lpips_alex": (0.05,)})["lpips_alex"]["adaptive"]
    assert entry["histogram"] == [[1, 0], [2, 1], [4, 1]]


def test_tables_of_other_images_and_metrics_without_a_direction_are_refused():
    with pytest.raises(ValueError, match="same images at every length"):
        adaptive_lengths({1: torch.zeros(3), 2: torch.zeros(4)}, 0.0, True)
    with pytest.raises(ValueError, match="same images at every length"):
        adaptive_lengths({}, 0.0, True)
    with pytest.raises(ValueError, match="'kid_std' has no direction"):
        adaptive_section({"kid_std": {1: torch.zeros(3)}})
