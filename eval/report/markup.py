"""Pieces of HTML for the report: text, tables, pictures, charts in frames, and JSON data of any shape.

Every string that comes from outside (file names, keys, reasons) passes through :func:`text`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from .charts import Axis, Series, line_chart
from .names import NAMES, metric_name
from .style import SCRIPT, STYLE

_SIDE = 512  # pictures are shown with at most so many pixels on a side
_ROWS = 200  # of a table of unknown origin
_DEPTH = 4  # of nested data that gets headings
_LINE = 8  # values of nested data that stand on one line


def page(title: str, body: str) -> str:
    """A whole page around HTML; its content policy lets it run our script and load nothing.

    Args:
        title: plain text.
        body: HTML.
    """
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: Vistok evaluation</title><style>{STYLE}</style></head>\n<body>{body}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def text(value: Any) -> str:
    """Any value as escaped text: numbers short, lists with commas."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return f"{value:,.6g}".replace("-", "−") if abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(text(part) for part in value)
    return escape(str(value))


def heading(name: Any) -> str:
    """A name out of JSON as escaped words: ``token_model`` becomes ``Token model``; metrics under their titles."""
    if name in NAMES:
        return escape(NAMES[name].title)
    words = str(name).replace("_", " ").strip()
    return escape(words[:1].upper() + words[1:])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", kinds: Sequence[str] = ()) -> str:
    """A table that scrolls sideways where it does not fit.

    Args:
        head: HTML of the column heads.
        rows: HTML of the cells; the first of every row is its head.
        caption: HTML.
        kinds: CSS class of each column, empty for numbers.
    """
    kinds = list(kinds) or [""] * len(head)
    marks = [f' class="{kind}"' if kind else "" for kind in kinds]
    parts = [f"<caption>{caption}</caption>"] if caption else []
    cells = "".join(f'<th scope="col"{mark}>{cell}</th>' for cell, mark in zip(head, marks, strict=True))
    parts.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for first, *others in rows:
        cells = "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(others, marks[1:], strict=True))
        parts.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return f'<div class="scroll" tabindex="0"><table>{"".join(parts)}</tbody></table></div>'


def definitions(values: Mapping[str, Any]) -> str:
    """Names and values below each other."""
    entries = "".join(f"<dt>{heading(name)}</dt><dd>{_short(value)}</dd>" for name, value in values.items())
    return f'<dl class="values">{entries}</dl>' if entries else ""


def heat_table(values: Mapping[tuple[str, str], float], down: str, across: str, metric: str) -> str:
    """Values over two settings as a table, the darker the worse (or, without a direction, the higher).

    Args:
        values: by row and column, both HTML.
        down: what rows are called.
        across: what columns are called.
        metric: name of the values.
    """
    name = metric_name(metric)
    rows, columns = (list(dict.fromkeys(key[axis] for key in values)) for axis in (0, 1))
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def cell(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return "<td>–</td>"
        shade = (value - low) / (high - low) if high > low else 0.0
        shade = 1 - shade if name.higher_is_better else shade
        return f'<td class="h{min(5, int(6 * shade))}">{name.number(value)}</td>'

    head = "".join(f'<th scope="col">{escape(across)} {column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(down)} {row}</th>'
        + "".join(cell(values.get((row, column))) for column in columns)
        + "</tr>"
        for row in rows
    )
    caption = f"<caption>{metric_title(metric)}</caption>"
    return (
        f'<div class="scroll" tabindex="0"><table class="heat">{caption}<thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def metric_title(metric: str) -> str:
    """Title, unit and direction of a metric, as HTML."""
    name = metric_name(metric)
    unit = f", {name.unit}" if name.unit else ""
    words = {True: "higher is better", False: "lower is better", None: ""}[name.higher_is_better]
    arrow = f'&nbsp;<span title="{words}">{name.arrow}</span>' if name.arrow else ""
    return escape(name.title + unit) + arrow


def axis_label(metric: str) -> str:
    """Title, unit and direction of a metric, as plain text for an axis."""
    name = metric_name(metric)
    return name.title + (f", {name.unit}" if name.unit else "") + (f"  {name.arrow} better" if name.arrow else "")


def charts(figures: Sequence[tuple[str, str]]) -> str:
    """Charts ``(caption, svg)`` beside each other; empty ones are left out."""
    parts = [f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in figures if svg]
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def picture(image: Tensor, description: str) -> str:
    """uint8 ``(3, H, W)`` as an ``<img>`` that carries its pixels, reduced to at most 512 a side."""
    from PIL import Image

    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    pixels.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    pixels.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    small = ' class="px"' if max(pixels.size) < 160 else ""
    return (
        f'<img{small} src="data:image/png;base64,{data}" width="{pixels.width}" height="{pixels.height}" '
        f'alt="{escape(description)}">'
    )


def anything(value: Any, title: str = "", depth: int = 0) -> str:
    """JSON data of any shape: numbers as a list, records as a table, number series of one length as a chart."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) for part in value):
        columns = {name: [record.get(name) for record in value] for name in value[0]}
        return _curves(columns, title) if _is_curve(value, columns) else _records(value)
    if not isinstance(value, Mapping):
        return f"<p>{_short(value)}</p>"
    columns = {name: part for name, part in value.items() if _is_series(part)}
    lengths = {len(part) for part in columns.values()}
    if len(columns) >= 2 and len(lengths) == 1:
        return _curves(columns, title) + anything({k: v for k, v in value.items() if k not in columns}, title, depth)
    if len(value) > 1 and all(isinstance(part, Mapping) and _is_flat(part) for part in value.values()):
        return _records([{title: name, **part} for name, part in value.items()])
    value = {name: part for name, part in value.items() if part not in ("", [], {}, None)}
    plain = {name: part for name, part in value.items() if not _is_nested(part) or _fits_a_line(part)}
    parts = [definitions(plain)]
    for name, part in value.items():
        if name in plain:
            continue
        level = min(3 + depth, 4)
        inner = anything(part, name, depth + 1) if depth < _DEPTH else f"<p>{_short(part)}</p>"
        parts.append(f"<h{level}>{heading(name)}</h{level}>{inner}")
    return "".join(parts)


def rest(value: Mapping[str, Any], known: Iterable[str]) -> str:
    """What a section holds besides the fields that its renderer has shown."""
    return anything({name: part for name, part in value.items() if name not in set(known)})


def _is_curve(records: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]) -> bool:
    """Records of numbers alone, the first of which rises from record to record."""
    if len(records) < 4 or len(columns) < 2 or not all(_is_series(column) for column in columns.values()):
        return False
    first = next(iter(columns.values()))
    return None not in first and all(a < b for a, b in zip(first, first[1:], strict=False))


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of mostly equal fields as a table; what a record holds besides plain values is left to their fields."""
    names = list(dict.fromkeys(name for record in records for name in record))
    numeric = [all(isinstance(record.get(name, 0), (int, float)) for record in records) for name in names]
    rows = [[_short(record.get(name)) for name in names] for record in records[:_ROWS]]
    head = [metric_title(name) if name in NAMES else heading(name) for name in names]
    more = f"the first {_ROWS} of {len(records):,}" if len(records) > _ROWS else ""
    return table(head, rows, more, ["" if number else "t" for number in numeric])


def _curves(columns: Mapping[str, Sequence[float]], title: str) -> str:
    (first, xs), *others = columns.items()
    figures = []
    for name, ys in others:
        points = [(x, y, "") for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
        svg = line_chart(
            [Series(name, points, markers=len(points) <= 40)],
            Axis(first.replace("_", " ")),
            Axis(axis_label(name).replace("_", " ")),
            f"{title} {name}".strip(),
        )
        figures.append((name.replace("_", " "), svg))
    return charts(figures)


def _short(value: Any) -> str:
    """A value in one cell."""
    if isinstance(value, (list, tuple)) and len(value) > 16:
        return f"{text(list(value[:8]))} … ({len(value):,} values)"
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(name))} {_short(part)}" for name, part in value.items())
    return text(value)


def _is_series(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) >= 3
        and all(part is None or (isinstance(part, (int, float)) and not isinstance(part, bool)) for part in value)
    )


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, (list, tuple)) and any(isinstance(part, Mapping) for part in value)
    )


def _fits_a_line(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) <= _LINE and _is_flat(value)


def _is_flat(value: Mapping[str, Any]) -> bool:
    return not any(_is_nested(part) or _is_series(part) for part in value.values())
