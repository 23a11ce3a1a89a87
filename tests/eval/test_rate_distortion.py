"""Rates are sums of bits; areas, ratios and thresholds of curves that have closed forms equal these."""

import json
import math

import numpy as np
import pytest
import torch

from vistok.eval.metric import MetricUnavailable, Originals, Pairs
from vistok.eval.rate_distortion import METRICS, Point, RateMetric, area, rate_distortion, reach
from vistok.eval.results import VariantResult


def variant(kind, rate, value, metric="psnr", **settings):
    name = f"{settings['codec']}/q={settings['quality']}" if kind == "codec" else kind
    if settings.get("scale", 1) != 1:
        name += f"/scale={settings['scale']}"
    if kind == "length":
        name = f"length={settings['num_tokens']}"
    metrics = {metric: value, "bits_per_pixel": rate, "bytes": rate * 65536 / 8}
    return VariantResult(name, kind, settings, rate, metrics)


def lengths(values, metric="psnr", rate=2**-9):
    """One variant per power of two tokens, each costing twice the rate of the one before."""
    return [variant("length", rate * 2**i, value, metric, num_tokens=2**i) for i, value in enumerate(values)]


def codec(name, points, metric="psnr", scale=1.0):
    return [
        variant("codec", rate, value, metric, codec=name, quality=q, scale=scale)
        for q, (rate, value) in enumerate(points)
    ]


def curve(rates, values):
    pairs = zip(rates, values, strict=True)
    return [Point(rate, value, variant("length", rate, value, num_tokens=1)) for rate, value in pairs]


def pairs(index, bits):
    count = len(index)
    images = torch.zeros(count, 3, 8, 16, dtype=torch.uint8)
    batch = Originals(torch.tensor(index), [""] * count, -torch.ones(count), images)
    return Pairs(batch, images, bits=None if bits is None else torch.tensor(bits, dtype=torch.float64))


def test_rate_is_the_mean_of_bits():
    metric = RateMetric()
    batch = pairs([0, 1, 2], [64.0, 128.0, 640.0])
    metric.update(batch)
    assert metric.compute() == {"bits_per_pixel": 832 / 3 / 128, "bytes": pytest.approx(832 / 3 / 8)}
    assert batch.values["bytes"].tolist() == [8, 16, 80]


def test_rate_of_merged_shards_equals_one_pass():
    bits = torch.randint(1, 5000, (7,)).double().tolist()
    whole, first, second, merged = RateMetric(), RateMetric(), RateMetric(), RateMetric()
    whole.update(pairs(list(range(7)), bits))
    first.update(pairs([5, 0], [bits[5], bits[0]]))
    second.update(pairs([6, 1, 2], [bits[6], bits[1], bits[2]]))
    second.update(pairs([4, 3], [bits[4], bits[3]]))
    for state in (second.state_dict(), first.state_dict()):
        merged.merge(state)
    assert merged.compute() == whole.compute()


def test_rate_of_images_without_one_is_unavailable():
    metric = RateMetric()
    metric.update(pairs([0, 1], None))
    with pytest.raises(MetricUnavailable, match="size of these reconstructions is unknown"):
        metric.compute()


def test_area_of_a_line_over_the_logarithm_is_its_middle():
    rates = np.array([0.01, 0.02, 0.3, 1.7])
    points = curve(rates, 20 + 3 * np.log2(rates))
    for low, high in ((0.01, 1.7), (0.015, 0.9), (0.3, 0.3), (0.02, 0.3)):
        assert area(points, low, high) == pytest.approx(20 + 3 * math.log2(math.sqrt(low * high)))


def test_area_of_a_parabola_approaches_its_integral():
    rates = 2 ** np.linspace(-4, 2, 3001)
    points = curve(rates, np.log2(rates) ** 2)
    assert area(points, 2**-3, 2) == pytest.approx((1 + 27) / 3 / 4, abs=1e-5)


def test_area_beyond_the_curve_is_refused():
    points = curve([0.1, 1.0], [20.0, 30.0])
    for low, high in ((0.09, 1), (0.1, 1.1), (0.5, 0.4)):
        with pytest.raises(ValueError, match="the curve covers"):
            area(points, low, high)


def test_points_are_sorted_by_rate_and_grouped_by_family():
    variants = [
        variant("reconstruction", 2**-7, 24.0),
        *reversed(lengths([18.0, 20.0, 24.0])),
        *codec("webp", [(0.5, 30.0), (0.2, 25.0)]),
        *codec("jpeg", [(0.6, 29.0)]),
        variant("perturbed", 2**-6, 12.0),
        VariantResult("originals", "originals", {}, None, {"psnr": 100.0}),
    ]
    section = rate_distortion(variants, ["psnr", "lpips_alex"])
    assert [row["family"] for row in section["curves"]] == ["tokenizer", "webp", "jpeg"]
    assert {row["metric"] for row in section["curves"]} == {"psnr"}
    tokenizer, webp, jpeg = section["curves"]
    assert [point["value"] for point in tokenizer["points"]] == [18, 20, 24]
    assert [point["num_tokens"] for point in tokenizer["points"]] == [1, 2, 4]  # not twice the full length
    assert tokenizer["area"] == pytest.approx((18 + 20) / 4 + (20 + 24) / 4)
    assert webp["points"][0] == {
        "variant": "webp/q=1",
        "label": "q=1",
        "bits_per_pixel": 0.2,
        "bytes": 0.2 * 8192,
        "num_tokens": None,
        "value": 25.0,
    }
    assert webp["range"] == [0.2, 0.5] and jpeg["range"] == [0.6, 0.6] and jpeg["area"] == 29.0
    json.dumps(section, allow_nan=False)


@pytest.mark.parametrize(("metric", "best"), [("psnr", 25.0), ("lpips_alex", 24.0)])
def test_of_two_points_at_one_rate_the_better_stays(metric, best):
    variants = codec("jpeg", [(0.2, 24.0), (0.2, 25.0), (0.1, 24.5)], metric)
    (row,) = rate_distortion(variants, [metric])["curves"]
    assert [point["value"] for point in row["points"]] == [24.5, best]


def test_a_fixed_length_is_a_curve_of_one_point():
    section = rate_distortion([variant("reconstruction", 0.1, 24.0)], ["psnr"])
    (row,) = section["curves"]
    assert row["family"] == "tokenizer" and row["points"][0]["label"] == "all tokens"
    assert section["comparisons"] == []


def test_values_and_rates_that_are_missing_leave_no_point():
    variants = [
        variant("reconstruction", 0.1, math.nan),
        VariantResult("reconstruction", "reconstruction", {}, None, {"psnr": 20.0}),
        variant("length", 0.0, 20.0, num_tokens=1),
    ]
    assert rate_distortion(variants) == {"curves": [], "comparisons": [], "targets": []}


@pytest.mark.parametrize("metric", ["psnr", "lpips_alex"])
def test_parallel_curves_differ_by_their_distance_and_their_shift(metric):
    sign = 1 if metric == "psnr" else -1
    ours = lengths([sign * (10 + 3 * i) for i in range(6)], metric, rate=0.01)  # 3 per doubling, 0.01 to 0.32
    rates = [0.04, 0.1, 0.5, 1.0]
    theirs = codec("webp", [(rate, sign * (10 + 3 * math.log2(rate / 0.01) - 6)) for rate in rates], metric)
    (row,) = rate_distortion([*ours, *theirs], [metric])["comparisons"]
    assert row["family"] == "webp" and row["metric"] == metric
    assert row["range"] == pytest.approx([0.04, 0.32])
    assert row["difference"] == pytest.approx(sign * 6)
    assert row["tokenizer_area"] == pytest.approx(sign * (10 + 3 * math.log2(math.sqrt(0.04 * 0.32) / 0.01)))
    assert row["rate_ratio"] == pytest.approx(0.25)  # 6 are two doublings


def test_the_ratio_of_rates_equals_a_fine_integral():
    ours, theirs = lengths([15.0, 18.0, 24.0, 25.0]), codec("avif", [(0.004, 14.0), (0.01, 19.0), (0.02, 24.5)])
    (row,) = rate_distortion([*ours, *theirs], ["psnr"])["comparisons"]
    quality = np.linspace(15, 24.5, 200001)
    logs = [np.log2([entry.bits_per_pixel for entry in part]) for part in (ours, theirs)]
    values = [[entry.metrics["psnr"] for entry in part] for part in (ours, theirs)]
    gap = np.interp(quality, values[0], logs[0]) - np.interp(quality, values[1], logs[1])
    assert row["rate_ratio"] == pytest.approx(2 ** gap.mean(), rel=1e-4)


def test_one_point_is_compared_where_it_lies():
    ours, theirs = [variant("reconstruction", 0.04, 24.0)], codec("jpeg", [(0.01, 16.0), (0.16, 24.0)])
    (row,) = rate_distortion([*ours, *theirs], ["psnr"])["comparisons"]
    assert row["range"] == [0.04, 0.04] and row["difference"] == pytest.approx(24 - 20)
    assert row["rate_ratio"] == pytest.approx(0.04 / 0.16)


def test_curves_without_a_common_rate_are_compared_at_equal_quality_alone():
    theirs = codec("jpeg", [(0.1, 20.0), (0.4, 24.0)])
    (row,) = rate_distortion([variant("reconstruction", 0.05, 22.0), *theirs], ["psnr"])["comparisons"]
    assert row["range"] is None and row["difference"] is None and row["tokenizer_area"] is None
    assert row["rate_ratio"] == pytest.approx(0.05 / 0.2)
    assert rate_distortion([variant("reconstruction", 0.05, 12.0), *theirs], ["psnr"])["comparisons"] == []


def test_a_curve_that_is_not_monotone_has_no_rate_at_equal_quality():
    theirs = codec("jpeg", [(0.002, 18.0), (0.016, 24.0)])
    for values in ([18.0, 22.0, 21.0], [18.0, 18.0, 21.0]):
        (row,) = rate_distortion([*lengths(values), *theirs], ["psnr"])["comparisons"]
        assert row["rate_ratio"] is None and row["difference"] is not None


def test_the_best_scale_keeps_what_no_cheaper_point_equals():
    variants = [
        *codec("webp", [(0.2, 24.0), (0.4, 28.0)]),
        *codec("webp", [(0.05, 20.0), (0.25, 23.0)], scale=0.5),
        *codec("webp", [(0.02, 19.0), (0.06, 20.0)], scale=0.25),
        *codec("jpeg", [(0.3, 24.0)]),
    ]
    curves = {row["family"]: row["points"] for row in rate_distortion(variants, ["psnr"])["curves"]}
    assert set(curves) == {"webp", "webp/scale=0.5", "webp/scale=0.25", "webp/best scale", "jpeg"}
    best = [(point["bits_per_pixel"], point["value"]) for point in curves["webp/best scale"]]
    assert best == [(0.02, 19), (0.05, 20), (0.2, 24), (0.4, 28)]
    assert curves["webp/best scale"][0]["label"] == "q=0/scale=0.25"


@pytest.mark.parametrize(("metric", "sign"), [("psnr", 1), ("lpips_alex", -1)])
def test_targets_name_the_cheapest_point_and_where_the_curve_crosses(metric, sign):
    values = [sign * value for value in (18.0, 20.0, 24.0, 23.0, 26.0)]
    variants = [*lengths(values, metric), *codec("jpeg", [(0.1, sign * 21.0)], metric)]
    targets = {metric: tuple(sign * target for target in (17.0, 20.0, 21.0, 25.0, 30.0))}
    rows = rate_distortion(variants, [metric], targets)["targets"]
    assert [row["target"] for row in rows] == list(targets[metric])
    found = [row["families"]["tokenizer"] for row in rows]
    assert [entry and entry["num_tokens"] for entry in found] == [1, 2, 4, 16, None]
    crossings = [entry["interpolated_bits_per_pixel"] for entry in found[:-1]]
    assert crossings[0] is None
    assert crossings[1:] == pytest.approx([2**-8, 2**-7.75, 2 ** (-6 + 2 / 3)])
    assert [row["families"]["jpeg"] is not None for row in rows] == [True, True, True, False, False]
    assert found[2]["variant"] == "length=4" and found[2]["bytes"] == 2**-7 * 8192


def test_a_target_that_the_first_point_reaches_has_no_crossing():
    points = curve([0.1, 0.2], [20.0, 30.0])
    assert reach(points, 20.0, True)["interpolated_bits_per_pixel"] is None
    assert reach(points, 30.0, True)["interpolated_bits_per_pixel"] == pytest.approx(0.2)
    assert reach(points, 30.1, True) is None


def test_every_metric_that_is_drawn_by_default_has_a_direction():
    rate_distortion([], METRICS)
    with pytest.raises(ValueError, match="'kid_std' has no direction"):
        rate_distortion([], ["kid_std"])
