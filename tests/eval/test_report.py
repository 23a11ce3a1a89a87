import base64
import hashlib
import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.eval.metric import Originals, Pairs
from vistok.eval.protocol import preset
from vistok.eval.report.charts import Axis, Series, line_chart
from vistok.eval.report.gallery import Gallery
from vistok.eval.report.names import metric_name
from vistok.eval.report.page import report, write_report
from vistok.eval.results import Results, VariantResult

VOID = {"meta", "img", "input", "br", "link", "hr"}
EVIL = '<script>alert("x")</script>\'&.png'


class Page(HTMLParser):
    """A page that was parsed: fails where tags are not balanced."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data if self.open[-1:] in (["span"], ["b"], ["strong"]) else f" {data} ")

    def all(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


def gallery(shift, previews=(0, 2), count=1):
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous() * 40
    originals = Originals(torch.arange(4), ["a.png", "b.png", EVIL, "d.png"], torch.zeros(4), images)
    kept = Gallery(previews, count)
    kept.update(Pairs(originals, images + shift, values={"psnr": torch.tensor([20.0, 31.25, 24.0, 22.0])}))
    return kept


@pytest.fixture
def results():
    main = VariantResult(
        "reconstruction",
        "reconstruction",
        {"num_tokens": 16},
        0.21875,
        {"rfid": 1.4804, "psnr": 22.346, "usage": 0.99951, "usage/0": 0.5, "our_own": 0.125, "kid": None},
        {
            "codebook": {
                "tokens": 65536,
                "usage_curve": {"images": [1, 10, 100, 256], "usage": [0.01, 0.2, 0.5, 0.9995]},
            }
        },
    )
    lengths = [
        VariantResult(f"length={n}", "length", {"num_tokens": n}, n * 0.0137, {"psnr": 15 + n / 4.0}) for n in (4, 8)
    ]
    return Results(
        {"name": "titok <b>", "kind": "tokenizer", "parameters": 12345678},
        {"name": "imagenet val", "num_images": 50000},
        preset("torch-fidelity", num_images=4096, height=8, width=8),
        4096,
        4096,
        [main, *lengths],
        skipped={"lpips_alex": f"no weights: {EVIL}", "lpips_vgg": f"no weights: {EVIL}", "dists": "images too small"},
        unreadable=[f"{EVIL}: the file is truncated"],
        timing={"read": 2.5, "metric/inception": 7.5},
        version="0.1.0",
    )


@pytest.fixture
def page(results):
    results.partial = "a subset: 4096 of 50000 images"
    galleries = {"reconstruction": gallery(5), "length=4": gallery(9), "length=8": gallery(7)}
    return report(results, galleries)


def test_page_loads_nothing(page):
    found = Page(page)
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:")[:5] == "data:" or attributes[name].startswith("#")
    assert "url(" not in page and "@import" not in page and not found.all("link") and not found.all("iframe")
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", page.split("<script>")[1])


def test_policy_allows_our_style_and_script_and_no_other(page):
    policy = Page(page).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for tag in ("style", "script"):
        source = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(source) == 1
        digest = base64.b64encode(hashlib.sha256(source[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert " style=" not in page and not re.search(r"<[^>]+ on\w+=", page)


def test_what_comes_from_outside_is_escaped(page):
    found = Page(page)
    assert len(found.all("script")) == 1 and not [b for b in found.tags if b[0] == "b" and b[1]]
    assert EVIL not in page and unescape(page).count(EVIL) >= 4  # caption, alt text, reason, unreadable
    assert "titok <b>" in found.text


def test_every_number_is_there_with_its_unit(page, results):
    text = Page(page).text
    for variant in results.variants:
        assert variant.name in text
        for metric, value in variant.metrics.items():
            if value is not None:
                assert metric_name(metric).title in text and metric_name(metric).number(value) in text
    for words in ("22.35 dB", "99.95 %", "0.2188 bpp", "our_own 0.125"):
        assert words in text
    assert "12,345,678" in text and "inception 7.5 75.0" in text


def test_numbers_stand_with_their_images_and_protocol(page, results):
    text = Page(page).text
    assert (
        f"N = 4,096 of 50,000 images (partial), imagenet val, protocol torch-fidelity {results.protocol.hash}" in text
    )
    for field in ("extractor", "resize", "rounding", "crop", "reference"):
        assert str(getattr(results.protocol, field)) in text
    cards = re.findall(r'<div class="card">.*?</div>', page)
    assert len(cards) == 4 and all("N = 4,096, partial" in card for card in cards)


def test_partial_results_say_so_and_whole_ones_do_not(page, results):
    assert "PARTIAL a subset: 4096 of 50000 images" in Page(page).text
    results.partial = ""
    text = Page(report(results)).text
    assert "PARTIAL" not in text and "partial" not in text and "N = 4,096 images, imagenet val" in text


def test_skipped_metrics_are_named_once_per_reason(page):
    text = Page(page).text
    assert f"LPIPS (AlexNet), LPIPS (VGG) no weights: {EVIL}" in text
    assert "DISTS images too small" in text and text.count("Not computed") == 1


def test_weights_that_were_not_published_are_announced(results):
    assert "PUBLISHED" not in Page(report(results)).text
    results.protocol = replace(results.protocol, other_weights="alexnet:01234567")
    assert "NOT THE PUBLISHED WEIGHTS judged by alexnet:01234567" in Page(report(results)).text


def test_short_stages_stand_together_under_readable_names(results):
    results.timing = {"metric/rfid": 900.0, "reconstruct/codec": 98.0, "metric/psnr": 1.5, "read": 0.5}
    text = Page(report(results)).text
    assert "rFID 900.0 90.0 reconstruct: codecs 98.0 9.8 2 more 2.0 0.2" in text


def test_variants_without_a_rate_have_no_column_for_it(results):
    results.variants.append(VariantResult("pfid/a", "perturbed", {}, None, {"psnr": 12.0}))
    tables = report(results).split("<h3>")
    lengths, perturbed = (
        next(part for part in tables if part.startswith(t)) for t in ("Lengths<", "Perturbed tokens<")
    )
    assert "Rate" not in perturbed and "12.00" in perturbed
    assert any("Rate" in part for part in tables if part.startswith("Lengths<")) and lengths


def test_thresholds_that_no_image_reaches_have_no_chart(results):
    rule = {"rule": "value", "target": 90.0, "unreached": 8, "mean_tokens": 32.0, "mean_value": 21.5}
    found = {"adaptive": [{**rule, "histogram": [[8, 0], [16, 0]]}]}
    results.sections = {"adaptive_length": {"psnr": found}}
    section = report(results).split("Tokens that single images need</h2>")[1].split("</section>")[0]
    assert "<svg" not in section and "PSNR ≥ 90" in section
    found["adaptive"][0]["histogram"][0][1] = 1
    section = report(results).split("Tokens that single images need</h2>")[1].split("</section>")[0]
    ticks = re.findall(r'<text[^>]*text-anchor="end"[^>]*>([^<]+)</text>', section)
    assert "1" in ticks and not [tick for tick in ticks if "." in tick]  # there are no parts of images


def test_directions_are_shown(page):
    cards = {re.sub("<.*?>", "", card)[:4] for card in re.findall(r"<h3>.*?</h3><p>", page)}
    assert {"rFID", "PSNR"} <= cards
    assert re.search(r"rFID&nbsp;<span title=\"lower is better\">↓", page)
    assert re.search(r"PSNR, dB&nbsp;<span title=\"higher is better\">↑", page)


def test_pictures_hold_the_pixels(page):
    images = [
        np.array(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
        for image in Page(page).all("img")
    ]
    # two previews, the best and the worst as pairs; then two strips of an original and two lengths
    levels = [[0, 5], [80, 85], [40, 45], [0, 5], [0, 9, 7], [80, 89, 87]]
    assert [image.shape for image in images] == [(8, 8, 3)] * 14
    assert [int(image[3, 4, 1]) for image in images] == [level for row in levels for level in row]
    assert all((image == image[0, 0]).all() for image in images)
    assert "PSNR 31.25 dB" in Page(page).text


def test_slider_has_a_frame_per_length_and_shows_all_without_script(page):
    found = Page(page)
    assert found.all("input")[0]["max"] == "1"
    frames = found.all("figure", **{"class": "frame"})
    assert [frame["data-name"] for frame in frames] == ["length=4, 0.0548 bpp", "length=8, 0.1096 bpp"] * 2
    style = page.split("<style>")[1].split("</style>")[0]
    hiding = re.findall(r"[^{}]*\{[^{}]*display:none[^{}]*\}", style)
    assert all(".frame" not in rule or ".js" in rule for rule in hiding)


def test_large_pictures_are_reduced(results):
    images = torch.randint(0, 256, (1, 3, 600, 1200), dtype=torch.uint8)
    kept = Gallery([0])
    kept.update(Pairs(Originals(torch.arange(1), ["a"], torch.zeros(1), images), images))
    assert {(i["width"], i["height"]) for i in Page(report(results, {"reconstruction": kept})).all("img")} == {
        ("512", "256")
    }


def test_curves_in_details_are_drawn(page):
    assert len(Page(page).all("svg", **{"class": "chart"})) == 1 and "65,536" in Page(page).text


BOOK = {
    "images": 4096,
    "usage_curve": {"images": [1, 9], "usage": [0.25, 0.75]},
    "levels": [
        {"name": name, "size": 16, "tokens": 99, "usage": 0.75, "entropy": 3.5, "perplexity": 11.3, "ranks": [1, 2, 12]}
        | {"counts": [50, 20, 1]}
        for name in ("<0>", "1")
    ],
    "positions": {"<0>": {"entropy": [3.0, 2.0, 1.0], "usage": [0.5, 0.25, 0.25]}},
    "digits": [{"entropy": [1.0, 0.5], "correlation": [[1.0, -0.25], [-0.25, 1.0]]}],
}
LANGUAGE = {"zipf": {"rank": [1, 2, 9], "count": [90, 40, 1]}, "innovation": {"images": [1, 2, 9], "types": [4, 6, 8]}}


def test_tokens_are_drawn(results):
    results.main.details = {"codebook": BOOK, "token_language": LANGUAGE}
    page = report(results)
    titles = [re.sub("<.*?>", "", title) for title in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert titles == [
        "Codes used after some number of images",
        "How often codes are used, by rank",
        "Entropy at every position",
        "Codes used at every position",
        "Evenness of every digit of a code",
        "Correlation of digits, absolute",
        "Frequency of words by rank",
        "Words known after some number of images",
    ]
    text = Page(page).text
    curve = line_chart(
        [Series("used", [(1, 25.0, ""), (9, 75.0, "")], markers=False)], Axis("", log=True), Axis("", zero=True), ""
    )
    line = re.search(r'points="([^"]*)"', curve)[1]
    assert page.count(f'points="{line}"') == 1  # the curve of usage, in percent
    assert "<0> 16 99 75.00 3.500 11.3" in text and "4,096" in text and "0, 1: -0.250" in text


def test_tokens_of_a_foreign_shape_are_still_shown(results):
    results.main.details = {"codebook": {"levels": [], "something": 5, "usage_curve": None}, "token_language": [1, 2]}
    assert "Something 5" in Page(report(results)).text


def test_saved_and_unsaved_results_give_one_page(results, tmp_path):
    results.main.metrics["kid"] = float("nan")
    results.sections["extra"] = {"curve": [{"step": i, "loss": 1.0 / i if i else float("nan")} for i in range(6)]}
    before = report(results)
    results.save(tmp_path / "results.json")
    assert report(Results.load(tmp_path / "results.json")) == before


def test_results_without_variants_make_a_page(results):
    results.variants = []
    assert "imagenet val" in Page(report(results)).text


def test_gallery_of_an_unknown_variant_is_refused(results):
    with pytest.raises(ValueError, match="jpeg"):
        report(results, {"jpeg": gallery(1)})


def test_failed_write_leaves_the_old_report(results, tmp_path):
    path = tmp_path / "out" / "report.html"
    write_report(path, results)
    before = path.read_bytes()
    results.sections = {"broken": {"value": object}}
    results.variants.append(VariantResult("x", "codec", {}, "not a number"))
    with pytest.raises(TypeError):
        write_report(path, results)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


CURVES = [
    {"family": family, "metric": "psnr", "points": [{"bits_per_pixel": r, "value": v, "label": "p"} for r, v in points]}
    for family, points in {
        "tokenizer": [(0.01, 20.0), (0.05, 23.0)],
        "jpeg": [(0.4, 25.0), (1.0, 30.0)],
        "jpeg/scale=0.5": [(0.2, 22.0), (0.6, 26.0)],
        "jpeg/best scale": [(0.2, 22.0), (0.4, 25.0), (1.0, 30.0)],
    }.items()
]
SCORES = {
    row: {"accuracy": {"small": a, "large": 0.975, "mean": a}} for row, a in {"model": 0.125, "resize": 0.875}.items()
}
CELLS = [
    {"alpha": a, "delta": d, "weight": 1, "metrics": {"rfid": 10 * a * d, "psnr": None}}
    for a in (0.9, 0.5)
    for d in (2, 4)
]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        (
            "rate_distortion",
            {
                "curves": CURVES,
                "comparisons": [
                    {
                        "metric": "psnr",
                        "family": "jpeg/best scale",
                        "range": None,
                        "difference": None,
                        "rate_ratio": 0.125,
                    }
                ],
                "targets": [
                    {
                        "metric": "psnr",
                        "target": 23.0,
                        "families": {
                            "tokenizer": {"bits_per_pixel": 0.05, "num_tokens": 64},
                            "jpeg/best scale": {"bits_per_pixel": 0.4, "num_tokens": None},
                        },
                    }
                ],
            },
            ["tokenizer", "jpeg", "0.125", "PSNR ≥ 23 dB 0.05 (64 tokens) 0.4"],
        ),
        (
            "adaptive_length",
            {
                "psnr": {
                    "violations": {"images": 0.021, "steps": []},
                    "adaptive": [
                        {
                            "rule": "value",
                            "target": 20.0,
                            "histogram": [[8, 3], [16, 5]],
                            "unreached": 7,
                            "mean_tokens": 12.5,
                            "mean_value": 21.5,
                        }
                    ],
                }
            },
            ["2.1 % of the images", "PSNR ≥ 20 12.5 21.50 7"],
        ),
        (
            "pfid",
            {
                "label": "pFID-like (N=4096)",
                "value": 9.87,
                "plain": {"rfid": 1.5},
                "means": {"rfid": 9.87},
                "changes": {"rfid": 8.37},
                "grid": "paper",
                "cells": CELLS,
            },
            ["pFID-like (N=4096): 9.870", "1.500 9.870 +8.370", "α 0.9 18.000 36.000", "α 0.5 10.000 20.000", "paper"],
        ),
        (
            "tokbench",
            {
                "text": {
                    "kind": "text",
                    "size": 256,
                    "rows": SCORES,
                    "counts": {"small": 995},
                    "comparable": False,
                    "reason": "EVIL<",
                }
            },
            [
                "Text at 256 × 256",
                "Not comparable with published numbers: EVIL<",
                "Small (N = 995)",
                "Model 12.5 97.5 12.5",
            ],
        ),
        (
            "linear_probe",
            {"encoder": {"feature": "encoder", "top1": 0.412, "top5": 0.66, "num_train": 50000, "seed": 77}},
            ["encoder 41.2 66.0 – – 50,000", "77"],
        ),
        (
            "token_model",
            {
                "bits_per_token": 9.5,
                "bits_per_pixel_ar": 0.03,
                "unigram_bits_per_token": 13.5,
                "num_test": 400,
                "steps": 99,
            },
            ["N = 400 images", "Autoregressive model 9.5 – 0.03", "Frequencies of single codes 13.5", "99"],
        ),
        (
            "unheard_of",
            {
                "a_b": 1.5,
                "rows": [{"x": 1, "<y>": EVIL}],
                "deep": {"er": {"and": {"deeper": {"still": {"more": [1]}}}}},
            },
            ["Unheard of", "A b 1.5", EVIL, "Still more 1"],
        ),
        ("a_list", [1, 2, 3], ["A list", "1, 2, 3"]),
    ],
)
def test_sections_show_their_numbers(results, name, data, expected):
    results.sections = {name: data}
    text = Page(report(results)).text
    for words in expected:
        assert " ".join(words.split()) in text, words


def test_scales_of_a_codec_are_drawn_as_their_envelope(results):
    results.sections = {"rate_distortion": {"curves": CURVES}}
    page = report(results)
    assert re.findall(r"</svg>([\w/ =.]+)</li>", page) == ["tokenizer", "jpeg"] and "scale=0.5" not in page


def test_worse_cells_of_a_heat_table_are_darker(results):
    results.sections = {"pfid": {"cells": [{"alpha": 0.5, "delta": d, "metrics": {"psnr": 30 - d}} for d in (1, 2, 3)]}}
    shades = re.findall(r'<td class="h(\d)">', report(results))
    assert shades == ["0", "3", "5"]
