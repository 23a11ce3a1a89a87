"""The lines that an evaluation prints."""

from dataclasses import replace

import pytest

from vistok.cli.summary import summary
from vistok.eval.protocol import preset
from vistok.eval.results import Results, VariantResult

PROTOCOL = preset("torch-fidelity", num_images=16, height=64, width=64)


@pytest.fixture
def results():
    main = VariantResult(
        "reconstruction", "reconstruction", {}, 0.0703, {"rfid": 146.5, "psnr": 10.4, "dead_codes": 5.0}
    )
    return Results({"name": "titok"}, {"name": "val"}, PROTOCOL, 16, 16, [main])


def lines(results):
    return summary(results).splitlines()


def test_numbers_stand_below_each_other_with_direction_and_unit(results):
    assert lines(results) == [
        f"titok on 16 images of 64x64, protocol torch-fidelity {PROTOCOL.hash}",
        "  rfid           ↓ 146.500",
        "  psnr           ↑   10.40 dB",
        "  dead_codes     ↓       5",
        "  bits_per_pixel ↓  0.0703 bpp",
        "  rFID falls as images are added: published values rest on 50,000",
    ]


def test_what_makes_numbers_incomparable_comes_first(results):
    results.partial = "a subset: 16 of 24 images"
    results.protocol = replace(PROTOCOL, other_weights="alexnet:01234567")
    assert lines(results)[1] == "PARTIAL: a subset: 16 of 24 images"
    assert lines(results)[2].startswith("NOT the published weights: alexnet:01234567")


def test_reasons_are_given_once(results):
    results.skipped = {"kid": "no weights", "lpips_vgg": "too small", "ris": "no weights", "rsfid": "no weights"}
    assert lines(results)[-2:] == ["skipped rsfid, ris, kid: no weights", "skipped lpips_vgg: too small"]


def test_lengths_are_a_table(results):
    for tokens, rfid in ((1, 193.772), (32, 9.5)):
        found = {"psnr": 10.0, "rfid": rfid, "bytes": 4.0}
        results.variants.append(VariantResult(f"length={tokens}", "length", {"num_tokens": tokens}, 0.1, found))
    table = [line for line in lines(results) if line.split()[0] in ("tokens", "1", "32")]
    assert table == ["  tokens     rfid   psnr", "       1  193.772  10.00", "      32    9.500  10.00"]


def test_sections_are_told_in_a_line_each(results):
    rows = {"model": {"accuracy": {"small": 0.5, "mean": None}}}
    results.sections = {
        "pfid": {"label": "pFID-like (N=16)", "value": 151.2},
        "linear_probe": {"latents": {"feature": "latents", "top1": 0.123, "majority": None}},
        "token_model": {"bits_per_token": 7.5, "unigram_bits_per_token": 8.0, "fixed_bits_per_token": 9.0},
        "tokbench": {"text": {"rows": rows, "comparable": False, "reason": "other data"}},
        "rate_distortion": {"curves": []},
    }
    text = summary(results)
    for line in (
        "  pFID-like (N=16): 151.200",
        "  linear probe on latents: top1 12.3 %, majority –",
        "  bits per token: 7.500 by an autoregressive model, 8.000 by single frequencies, 9.000 at a fixed rate",
        "    model          50.0        –",
        "  not comparable with published numbers: other data",
    ):
        assert line in text.splitlines()
