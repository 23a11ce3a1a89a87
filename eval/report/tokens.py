"""Tokens in the report: how codes are used, and what their language looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Axis, Series, bar_chart, line_chart, matrix_chart
from .markup import charts, rest, table, text
from .names import metric_name

_LEVELS = 6  # in one chart


def codebook(details: Mapping[str, Any]) -> str:
    """Usage over the number of images, counts over the rank, entropy at every position, correlation of digits."""
    figures = []
    curve = details.get("usage_curve") or {}
    if curve:
        points = _points(curve.get("images"), curve.get("usage"), scale=100.0)
        title = "Codes used after some number of images"
        figures.append((title, _curve(points, "images, logarithmic", "codes used, %", title, log_x=True)))
    levels = details.get("levels") or []
    title = "How often codes are used, by rank" + _first(len(levels))
    series = [
        Series(str(level.get("name")), _points(level.get("ranks"), level.get("counts")), markers=False)
        for level in levels[:_LEVELS]
    ]
    axes = Axis("rank of the code, logarithmic", log=True), Axis("times used, logarithmic", log=True)
    figures.append((title, line_chart(series, *axes, title)))
    positions = details.get("positions") or {}
    for quantity, label in (("entropy", "entropy, bit"), ("usage", "codes used, %")):
        title = f"{label.split(',')[0].capitalize()} at every position" + _first(len(positions))
        scale = 100.0 if quantity == "usage" else 1.0
        series = [
            Series(name, _points(range(len(part[quantity])), part[quantity], scale), markers=False)
            for name, part in list(positions.items())[:_LEVELS]
            if part.get(quantity)
        ]
        figures.append((title, line_chart(series, Axis("position of the token"), Axis(label), title)))
    for digits in details.get("digits") or []:
        bars = [(str(number), value) for number, value in enumerate(digits.get("entropy") or [])]
        title = "Evenness of every digit of a code"
        figures.append((title, bar_chart(bars, "digit", Axis("entropy, share of the largest"), title)))
        title = "Correlation of digits, absolute"
        figures.append((title, matrix_chart(digits.get("correlation") or [], "digit", title)))
    known = {"usage_curve", "levels", "positions", "digits"}
    return rest(details, known) + charts(figures) + _levels(levels)


def _levels(levels: Sequence[Mapping[str, Any]]) -> str:
    """The codebooks one by one, if there are several."""
    if len(levels) < 2:
        return ""
    rows = [
        [
            text(level.get("name")),
            text(level.get("size")),
            text(level.get("tokens")),
            metric_name("usage").number(level.get("usage")),
            metric_name("code_entropy").number(level.get("entropy")),
            metric_name("perplexity").number(level.get("perplexity")),
        ]
        for level in levels
    ]
    return table(["Codebook", "Codes", "Tokens", "Used, %", "Entropy, bit", "Perplexity"], rows)


def token_language(details: Mapping[str, Any]) -> str:
    """Frequencies over ranks, and how fast new words appear."""
    figures = []
    zipf = details.get("zipf") or {}
    title = "Frequency of words by rank"
    svg = line_chart(
        [Series("words", _points(zipf.get("rank"), zipf.get("count")), markers=False)],
        Axis("rank of the word, logarithmic", log=True),
        Axis("times used, logarithmic", log=True),
        title,
    )
    figures.append((title, svg))
    innovation = details.get("innovation") or {}
    title = "Words known after some number of images"
    series = [
        Series(name, _points(innovation.get("images"), innovation.get(field)), markers=False)
        for field, name in (("types", "words"), ("bigram_types", "pairs of neighbours"))
        if innovation.get(field)
    ]
    axes = Axis("images, logarithmic", log=True), Axis("known, logarithmic", log=True)
    figures.append((title, line_chart(series, *axes, title)))
    return rest(details, {"zipf", "innovation"}) + charts(figures)


def _first(number: int) -> str:
    return f" (first {_LEVELS} of {number} codebooks)" if number > _LEVELS else ""


def _points(xs: Any, ys: Any, scale: float = 1.0) -> list[tuple[float, float, str]]:
    """Points of two columns; those without a value are left out."""
    pairs = zip(xs or (), ys or (), strict=False)
    return [(x, scale * y, "") for x, y in pairs if x is not None and y is not None]


def _curve(points: list[tuple[float, float, str]], x: str, y: str, title: str, log_x: bool = False) -> str:
    return line_chart([Series(title, points, markers=False)], Axis(x, log=log_x), Axis(y, zero=True), title)
