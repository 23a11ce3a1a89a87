"""Charts as inline SVG: lines, points and bars, drawn for a page that loads nothing.

Colours come from the page's style sheet through the classes ``c0`` to ``c5``, so a chart follows light, dark and
paper. Series differ in marker and dash as well as in colour, and carry their names; every point tells its numbers when
pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 34, 46
_COLORS = 6
_DASHES = ("", "7 4", "2 4", "10 4 2 4", "4 2", "12 5")
_LETTER = 6.6  # mean width of a letter of a label


@dataclass(frozen=True)
class Series:
    """Points ``(x, y, label)`` of one name; the label may be empty.

    ``line`` joins them, ``markers`` shows them.
    """

    name: str
    points: Sequence[tuple[float, float, str]]
    line: bool = True
    markers: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis is called and how it is divided.

    Attributes:
        label: with its unit.
        log: logarithmic; values that are not positive are left out.
        ticks: where to put ticks; round numbers if empty.
        zero: the axis begins at 0.
        whole: values are counts, so ticks are whole numbers.
    """

    label: str
    log: bool = False
    ticks: Sequence[float] = ()
    zero: bool = False
    whole: bool = False


class _Scale:
    """Data to pixels along one axis."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        low, high = min(values), max(values)
        if axis.zero and not axis.log:
            low, high = min(low, 0.0), max(high, 0.0)
        low, high = self._value(low), self._value(high)
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.5
        self.low = low if axis.zero and low == 0 else low - margin
        self.high = high + margin

    def __call__(self, value: float) -> float:
        return self.start + (self._value(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def _value(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value

    def ticks(self) -> list[float]:
        if self.axis.ticks:
            return list(self.axis.ticks)
        if not self.axis.log:
            ticks = linear_ticks(self.low, self.high)
            return [tick for tick in ticks if tick == round(tick)] if self.axis.whole else ticks
        return log_ticks(10**self.low, 10**self.high)


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Up to about ``count`` round numbers between two numbers."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, with 2 and 5 between them on a short axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) >= 4:
            return ticks
    return ticks if len(ticks) >= 3 else linear_ticks(low, high, 4)


def tick_text(value: float) -> str:
    """A number as short as an axis needs it."""
    if value and abs(value) >= 1e4:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{letter}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−") if abs(value) > 1e-12 else "0"


def line_chart(series: Sequence[Series], x: Axis, y: Axis, title: str, description: str = "") -> str:
    """Lines or points over a common pair of axes.

    Points that are not finite, or not positive on a logarithmic axis, are left out.

    Returns:
        An ``<svg>`` element, and a legend as a list if there are several series; empty if no point is left.
    """
    series = [Series(s.name, [p for p in s.points if _drawable(p, x, y)], s.line, s.markers) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    across = _Scale(x, [p[0] for s in series for p in s.points], _LEFT, WIDTH - _RIGHT)
    up = _Scale(y, [p[1] for s in series for p in s.points], HEIGHT - _BOTTOM, _TOP)
    parts, placed = [_frame(across, up)], []
    for number, one in enumerate(series):
        places = [(across(a), up(b)) for a, b, _ in one.points]
        placed += [(a - 4, b - 4, a + 4, b + 4) for a, b in places] if one.markers else []
        group = []
        if one.line and len(places) > 1:
            dash = f' stroke-dasharray="{_DASHES[number % _COLORS]}"' if number % _COLORS else ""
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            group.append(f'<polyline class="line" points="{path}"{dash}/>')
        for (a, b), (at, value, label) in zip(places, one.points, strict=True):
            hint = escape(f"{one.name}{': ' if label else ''}{label} ({at:.4g}; {value:.4g})")
            if one.markers:
                group.append(f'<path class="mark" d="{_marker(number, a, b)}"><title>{hint}</title></path>')
        parts.append(f'<g class="c{number % _COLORS}">{"".join(group)}</g>')
    if len(series) > 1:
        for number, one in enumerate(series):
            places = [(across(a), up(b)) for a, b, _ in one.points]
            parts.append(_label(one.name, places, placed, f"c{number % _COLORS}"))
    return _svg(parts, title, description) + _legend(series)


def bar_chart(bars: Sequence[tuple[str, float]], x_label: str, y: Axis, title: str, description: str = "") -> str:
    """Bars of named values from 0 up.

    Returns:
        An ``<svg>`` element; empty without bars.
    """
    bars = [(name, value) for name, value in bars if value is not None and math.isfinite(value)]
    if not bars:
        return ""
    up = _Scale(Axis(y.label, zero=True, whole=y.whole), [value for _, value in bars], HEIGHT - _BOTTOM, _TOP)
    slot = (WIDTH - _LEFT - _RIGHT) / len(bars)
    gap = min(6.0, 0.2 * slot)
    longest = max(len(name) for name, _ in bars) * _LETTER + 8
    every = max(1, math.ceil(longest / slot))  # so that names do not run into each other
    parts = [_rules(up), _x_label(x_label)]
    for place, (name, value) in enumerate(bars):
        left, top, bottom = _LEFT + place * slot + gap / 2, up(max(value, 0.0)), up(min(value, 0.0))
        parts.append(
            f'<rect class="bar c0" x="{left:.2f}" y="{top:.2f}" width="{slot - gap:.2f}" '
            f'height="{bottom - top:.2f}"><title>{escape(f"{name}: {value:.4g}")}</title></rect>'
        )
        if place % every == 0:
            middle = left + (slot - gap) / 2
            parts.append(
                f'<text x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>'
            )
    return _svg(parts, title, description)


def matrix_chart(values: Sequence[Sequence[float]], label: str, title: str, description: str = "") -> str:
    """A square matrix as shaded cells, from 0 (blank) to 1 (full) by absolute value; its diagonal is left out.

    Returns:
        An ``<svg>`` element; empty for a matrix of less than two rows.
    """
    size = len(values)
    if size < 2:
        return ""
    side = (HEIGHT - _BOTTOM - _TOP) / size
    left = (WIDTH - side * size) / 2
    frame = f'x="{left:.1f}" y="{_TOP}" width="{side * size:.1f}" height="{side * size:.1f}"'
    parts = [f'<rect class="cells" {frame}/>', _x_label(label)]
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if row == column or value is None or not math.isfinite(value) or abs(value) < 0.005:
                continue
            at = f'x="{left + column * side:.1f}" y="{_TOP + row * side:.1f}" width="{side:.1f}" height="{side:.1f}"'
            hint = f"<title>{row}, {column}: {value:.3f}</title>"
            parts.append(f'<rect class="bar c1" {at} fill-opacity="{min(1.0, abs(value)):.3f}">{hint}</rect>')
    return _svg(parts, title, description)


def _drawable(point: tuple[float, float, str], x: Axis, y: Axis) -> bool:
    return all(
        value is not None and math.isfinite(value) and (value > 0 or not axis.log)
        for value, axis in ((point[0], x), (point[1], y))
    )


def _frame(across: _Scale, up: _Scale) -> str:
    parts = [_rules(up)]
    bottom = HEIGHT - _BOTTOM
    last = -math.inf
    for tick in across.ticks():
        place, text = across(tick), tick_text(tick)
        if place < _LEFT - 1 or place > WIDTH - _RIGHT + 1 or place - last < len(text) * _LETTER + 10:
            continue
        last = place
        parts.append(f'<line class="tick" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    return "".join(parts) + _x_label(across.axis.label)


def _rules(up: _Scale) -> str:
    """Horizontal lines at the ticks of the y axis, with their numbers, and the label of that axis above them."""
    parts = []
    for tick in up.ticks():
        place = up(tick)
        if _TOP - 1 <= place <= HEIGHT - _BOTTOM + 1:
            parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<line class="tick" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="name" x="4" y="16">{escape(up.axis.label)}</text>')
    return "".join(parts)


def _x_label(label: str) -> str:
    return f'<text class="name" x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(label)}</text>'


def _marker(number: int, x: float, y: float) -> str:
    """Outline of the marker of a series: circle, square, triangle, diamond, or one of them again."""
    shape, r = number % 4, 4.5
    if shape == 0:
        return f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1 0 {2 * r},0a{r},{r} 0 1 0 {-2 * r},0z"
    if shape == 1:
        return f"M{x - 4:.1f},{y - 4:.1f}h8v8h-8z"
    if shape == 2:
        return f"M{x:.1f},{y - 5.5:.1f}l5.2,9.5h-10.4z"
    return f"M{x:.1f},{y - 6:.1f}l6,6l-6,6l-6,-6z"


def _label(text: str, places: Sequence[tuple[float, float]], placed: list[tuple], color: str) -> str:
    """The name of a series beside one of its points, where nothing stands yet; nothing if there is no such place."""
    width, height = len(text) * _LETTER + 6, 14
    for x, y in (places[-1], places[0], places[len(places) // 2], *places):
        for left, top in (
            (x + 8, y - height / 2),
            (x - width / 2, y - height - 8),
            (x - width / 2, y + 8),
            (x + 6, y - height - 4),
            (x + 6, y + 4),
            (x - width - 8, y - height / 2),
        ):
            box = (left, top, left + width, top + height)
            inside = _LEFT < box[0] and box[2] < WIDTH and _TOP - 8 < box[1] and box[3] < HEIGHT - _BOTTOM
            free = all(
                box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1] for other in placed
            )
            if inside and free:
                placed.append(box)
                return f'<text class="label {color}" x="{left + 3:.1f}" y="{top + 11:.1f}">{escape(text)}</text>'
    return ""


def _legend(series: Sequence[Series]) -> str:
    """Lines, markers and names of the series, as an HTML list; empty for a single series."""
    if len(series) < 2:
        return ""
    entries = []
    for number, one in enumerate(series):
        dash = f' stroke-dasharray="{_DASHES[number % _COLORS]}"' if number % _COLORS else ""
        line = f'<line class="line" x1="0" x2="26" y1="7" y2="7"{dash}/>' if one.line else ""
        mark = f'<path class="mark" d="{_marker(number, 13, 7)}"/>' if one.markers else ""
        drawing = f'<svg viewBox="0 0 26 14" width="26" height="14" aria-hidden="true">{line}{mark}</svg>'
        entries.append(f'<li class="c{number % _COLORS}">{drawing}{escape(one.name)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _svg(parts: Sequence[str], title: str, description: str) -> str:
    text = f"<title>{escape(title)}</title>" + (f"<desc>{escape(description)}</desc>" if description else "")
    return f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">{text}{"".join(parts)}</svg>'
