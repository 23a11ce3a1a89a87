"""Quality against size: curves of a tokenizer and of codecs, and numbers that sum them up.

A rate is what an image costs to store, per pixel: tokens at a fixed rate, whole files of codecs. Between its points a
curve is taken as straight over the logarithm of the rate. Two curves are compared as Bjøntegaard does (VCEG-M33), by
the mean difference in quality at equal rate and in rate at equal quality, over what both curves cover and nothing
beyond; straight lines take the place of his cubic through four points, so two points suffice and nothing overshoots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .metric import MetricUnavailable, Pairs, PerImageMetric
from .report.names import metric_name
from .results import VariantResult

METRICS = (
    "psnr",
    "ssim",
    "ms_ssim",
    "lpips_alex",
    "lpips_vgg",
    "dists",
    "dino_similarity",
    "clip_similarity",
    "rfid",
)
TARGETS: dict[str, tuple[float, ...]] = {
    "psnr": (20.0, 25.0, 30.0),
    "ssim": (0.5, 0.7, 0.9),
    "lpips_alex": (0.3, 0.2, 0.1),
    "lpips_vgg": (0.4, 0.3, 0.2),
    "rfid": (10.0, 5.0, 2.0),
}
TOKENIZER = "tokenizer"  # family of the reconstruction and of all lengths


class RateMetric(PerImageMetric):
    """``bits_per_pixel`` and ``bytes`` of every image as it is stored."""

    names = ("bits_per_pixel", "bytes")

    def values(self, pairs: Pairs) -> Mapping[str, Tensor]:
        bits = torch.full((len(pairs),), math.nan, dtype=torch.float64) if pairs.bits is None else pairs.bits
        height, width = pairs.reconstructions.shape[2:]
        return {"bits_per_pixel": bits / (height * width), "bytes": bits / 8}

    def compute(self) -> dict[str, float]:
        values = super().compute()
        if math.isnan(values["bytes"]):
            raise MetricUnavailable("the size of these reconstructions is unknown: they come without tokens or files")
        return values


class Point(NamedTuple):
    """One variant on a curve."""

    rate: float  # bits per pixel
    value: float
    variant: VariantResult


def rate_distortion(
    variants: Sequence[VariantResult],
    metrics: Sequence[str] = METRICS,
    targets: Mapping[str, Sequence[float]] = TARGETS,
) -> dict[str, Any]:
    """Curves of every family of variants, and how the tokenizer's compares with the others, as JSON data.

    Families are ``tokenizer`` (the reconstruction and every length), every codec at every scale (``jpeg``,
    ``jpeg/scale=0.25``), and, for a codec at several scales, ``jpeg/best scale``: the points that no cheaper point of
    that codec equals. Variants without a rate, and values that are not finite, are left out.

    Args:
        variants: with their metrics computed.
        metrics: those to draw; others than the variants have do not matter.
        targets: metric -> values to reach.

    Returns:
        - ``curves``: ``family``, ``metric``, ``points`` by ascending rate (``variant``, ``label``, ``bits_per_pixel``,
          ``bytes``, ``num_tokens``, ``value``), ``range`` of its rates, ``area`` (see :func:`area`).
        - ``comparisons`` of the tokenizer with every other family, where they overlap: ``metric``, ``family``,
          ``range`` in bits per pixel that both cover, ``area`` of both over it (``tokenizer_area``,
          ``family_area``), ``difference`` (tokenizer minus family), and ``rate_ratio``: bits of the tokenizer over bits
          of the family at equal quality, geometric mean (0.5: it needs half), ``None`` where a curve is not monotone
          or the qualities do not overlap.
        - ``targets``: ``metric``, ``target``, and by family the cheapest variant that reaches it, and the rate between
          the points around it (see :func:`reach`).

    Raises:
        ValueError: for a metric without a direction.
    """
    section: dict[str, Any] = {"curves": [], "comparisons": [], "targets": []}
    for metric in metrics:
        higher = metric_name(metric).higher_is_better
        if higher is None:
            raise ValueError(f"metric {metric!r} has no direction: neither more nor less of it is better")
        families = _families(variants, metric, higher)
        section["curves"] += [_curve(family, metric, points) for family, points in families.items()]
        tokenizer = families.get(TOKENIZER)
        if tokenizer is not None:
            others = {family: points for family, points in families.items() if family != TOKENIZER}
            compared = [_compare(metric, family, tokenizer, points, higher) for family, points in others.items()]
            section["comparisons"] += [row for row in compared if row is not None]
        for target in targets.get(metric, ()) if families else ():
            reached = {family: reach(points, target, higher) for family, points in families.items()}
            section["targets"].append({"metric": metric, "target": target, "families": reached})
    return section


def area(points: Sequence[Point], low: float, high: float) -> float:
    """The mean value of a curve over the logarithm of the rate, from ``low`` to ``high`` bits per pixel.

    That is the area under the curve over the width of the range, so it reads in the unit of the metric and does not
    depend on the base of the logarithm. Where both ends are one, it is the value there.

    Raises:
        ValueError: for a range that the curve does not cover.
    """
    rates = [math.log2(point.rate) for point in points]
    return _mean(rates, [point.value for point in points], math.log2(low), math.log2(high))


def reach(points: Sequence[Point], target: float, higher_is_better: bool) -> dict[str, Any] | None:
    """The cheapest point whose value reaches a target.

    Returns:
        ``variant``, ``bits_per_pixel``, ``bytes``, ``num_tokens`` of that point, and ``interpolated_bits_per_pixel``
        where the curve crosses the target before it: ``None`` if the very first point reaches it. ``None`` if no point
        does.
    """
    sign = 1 if higher_is_better else -1
    before = None
    for point in points:
        if sign * (point.value - target) >= 0:
            crossing = None
            if before is not None:
                part = (target - before.value) / (point.value - before.value)
                crossing = before.rate * (point.rate / before.rate) ** part
            row = _row(point)
            del row["value"], row["label"]
            return row | {"interpolated_bits_per_pixel": crossing}
        before = point
    return None


def _families(variants: Sequence[VariantResult], metric: str, higher: bool) -> dict[str, list[Point]]:
    """The points of every family, sorted."""
    families: dict[str, list[Point]] = {}
    scales: dict[str, dict[str, list[Point]]] = {}  # codec -> family -> points
    for variant in variants:
        rate, value = variant.bits_per_pixel, variant.metrics.get(metric)
        if rate is None or value is None or not math.isfinite(rate) or not math.isfinite(value) or rate <= 0:
            continue
        if variant.kind in ("reconstruction", "length"):
            families.setdefault(TOKENIZER, []).append(Point(rate, value, variant))
        elif variant.kind == "codec":
            codec, scale = variant.settings["codec"], variant.settings["scale"]
            family = codec if scale == 1 else f"{codec}/scale={scale:g}"
            points = families.setdefault(family, [])
            points.append(Point(rate, value, variant))
            scales.setdefault(codec, {})[family] = points
    families = {family: _sorted(points, higher) for family, points in families.items()}
    for codec, parts in scales.items():
        if len(parts) > 1:
            families[f"{codec}/best scale"] = _front([point for part in parts.values() for point in part], higher)
    return families


def _sorted(points: list[Point], higher: bool) -> list[Point]:
    """By ascending rate; of several at one rate the best, and a length rather than the same as the reconstruction."""
    sign = 1 if higher else -1
    result: list[Point] = []
    for point in sorted(points, key=lambda point: (point.rate, -sign * point.value, point.variant.kind)):
        if not result or point.rate > result[-1].rate:
            result.append(point)
    return result


def _front(points: list[Point], higher: bool) -> list[Point]:
    """The points that are better than every cheaper one."""
    sign = 1 if higher else -1
    result: list[Point] = []
    for point in _sorted(points, higher):
        if not result or sign * point.value > sign * result[-1].value:
            result.append(point)
    return result


def _row(point: Point) -> dict[str, Any]:
    variant = point.variant
    tokens = variant.settings.get("num_tokens")
    label = f"{tokens} tokens" if tokens else "all tokens"
    if variant.kind == "codec":
        label = variant.name.partition("/")[2]
    return {
        "variant": variant.name,
        "label": label,
        "bits_per_pixel": point.rate,
        "bytes": variant.metrics.get("bytes"),
        "num_tokens": tokens,
        "value": point.value,
    }


def _curve(family: str, metric: str, points: list[Point]) -> dict[str, Any]:
    low, high = points[0].rate, points[-1].rate
    return {
        "family": family,
        "metric": metric,
        "points": [_row(point) for point in points],
        "range": [low, high],
        "area": area(points, low, high),
    }


def _compare(
    metric: str, family: str, tokenizer: list[Point], points: list[Point], higher: bool
) -> dict[str, Any] | None:
    low, high = max(tokenizer[0].rate, points[0].rate), min(tokenizer[-1].rate, points[-1].rate)
    ratio = _rate_ratio(tokenizer, points, higher)
    if low > high and ratio is None:
        return None
    ours, theirs = (area(tokenizer, low, high), area(points, low, high)) if low <= high else (None, None)
    return {
        "metric": metric,
        "family": family,
        "range": [low, high] if low <= high else None,
        "tokenizer_area": ours,
        "family_area": theirs,
        "difference": None if ours is None or theirs is None else ours - theirs,
        "rate_ratio": ratio,
    }


def _rate_ratio(tokenizer: list[Point], points: list[Point], higher: bool) -> float | None:
    """Bits of the tokenizer over bits of the other at equal quality; see :func:`rate_distortion`."""
    sign = 1 if higher else -1
    curves = []
    for curve in (tokenizer, points):
        values = sign * np.array([point.value for point in curve])
        if (np.diff(values) <= 0).any():
            return None
        curves.append((values, [math.log2(point.rate) for point in curve]))
    low, high = max(values[0] for values, _ in curves), min(values[-1] for values, _ in curves)
    if low > high:
        return None
    ours, theirs = (_mean(values, rates, low, high) for values, rates in curves)
    return float(2 ** (ours - theirs))


def _mean(places: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, low: float, high: float) -> float:
    """The mean from ``low`` to ``high`` of a polyline over ascending ``places``."""
    places = np.asarray(places, np.float64)
    if not places[0] <= low <= high <= places[-1]:
        raise ValueError(f"the curve covers {places[0]:g} to {places[-1]:g}, not {low:g} to {high:g} (log2 of rates)")
    inside = places[(places > low) & (places < high)]
    nodes = np.concatenate([[low], inside, [high]])
    heights = np.interp(nodes, places, values)
    if low == high:
        return float(heights[0])
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(nodes)).sum() / (high - low))
