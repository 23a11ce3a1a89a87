"""Results of several evaluations in one table, if they may stand in one.

Numbers measured in different ways look alike, so a comparison refuses results of different protocols and names the
fields that differ. It can be forced; then every row carries the hash of its protocol, a warning stands above, and no
value is marked as best. Rows of a partial evaluation are marked and never best.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..results import Results
from .markup import metric_title, page, table, text
from .names import metric_name, sort_names

_WARNING = "These rows were measured in different ways and are NOT comparable"
_BEST = " ★"
_WIDTH, _LABEL = 120, 28  # columns of a terminal; longer names of results stand below the table


class ProtocolMismatch(ValueError):
    """Results of different protocols were to stand in one table."""


@dataclass(frozen=True)
class Row:
    """A result in a comparison: what it is called, where it came from, what it holds."""

    label: str
    path: Path
    results: Results


@dataclass(frozen=True)
class Comparison:
    """Results side by side; made by :func:`compare`.

    Attributes:
        rows: in the order of their paths.
        differences: field of the protocol -> its value in every row, for the fields in which rows differ.
        chosen: metrics to show, in their order; all if empty.
    """

    rows: list[Row]
    differences: dict[str, list[Any]]
    chosen: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that are shown: those chosen, or all that some row has."""
        return list(self.chosen) or sort_names({metric for row in self.rows for metric in _metrics(row)})

    def best(self, metric: str) -> set[int]:
        """Numbers of the rows with the best value, at the digits that are shown.

        None if rows are not comparable, or all that have a value show the same.
        """
        name = metric_name(metric)
        values = {
            number: _metrics(row)[metric]
            for number, row in enumerate(self.rows)
            if not row.results.partial and math.isfinite(_metrics(row).get(metric, math.nan))
        }
        shown = {number: name.number(value) for number, value in values.items()}
        if self.differences or name.higher_is_better is None or len(set(shown.values())) < 2:
            return set()
        target = name.number(max(values.values()) if name.higher_is_better else min(values.values()))
        return {number for number, text in shown.items() if text == target}

    def text(self) -> str:
        """For a terminal: a line per metric, a column per result; the best values carry a star."""
        head, rows = self._cells(lambda value: f"{value}{_BEST}")
        legend = []
        if max(len(row[0]) for row in rows) > _LABEL:
            legend = [f"[{number}] {row[0]}" for number, row in enumerate(rows, 1)]
            rows = [[f"[{number}]", *row[1:]] for number, row in enumerate(rows, 1)]
        columns = []
        for row in rows:  # digits stand below digits: a star takes the place of blanks
            cells = [cell if cell.endswith(_BEST) else cell + " " * len(_BEST) for cell in row]
            columns.append([cell.rjust(max(map(len, cells))) for cell in cells])
        titles = [title.ljust(max(map(len, head[1:]))) for title in ["", *head[1:]]]
        lines = []
        for block in _fold(columns, _WIDTH - len(titles[0])):
            shown = ["  ".join(cells).rstrip() for cells in zip(titles, *block, strict=True)]
            lines += ["", shown[0], "-" * max(map(len, shown)), *shown[1:]]
        return "\n".join([*self._notes(above=True), *lines, "", *legend, *self._notes(above=False)]).rstrip()

    def markdown(self) -> str:
        """For a README; the best values are bold."""
        head, rows = self._cells(lambda value: f"**{value}**")
        lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
        body = ["| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in lines]
        above, below = ([_markdown(note) for note in self._notes(above)] for above in (True, False))
        if self.differences:
            above[0] = f"**{above[0]}**"
        return "\n\n".join(["  \n".join(above), "\n".join(body), "  \n".join(below)]).rstrip()

    def html(self) -> str:
        """A page of its own that loads nothing."""
        head, rows = self._cells(lambda value: value)
        best = {metric: self.best(metric) for metric in self.metrics}
        first = len(head) - len(self.metrics)
        cells = []
        for number, row in enumerate(rows):
            values = [
                f"<strong>{text(value)}</strong>" if number in best[metric] else text(value)
                for metric, value in zip(self.metrics, row[first:], strict=True)
            ]
            cells.append([*(text(cell) for cell in row[:first]), *values])
        above, below = self._notes(above=True), self._notes(above=False)
        banner = ""
        if self.differences:
            warning, *fields = above[:-1]
            banner = f'<div class="banner" role="note"><strong>WARNING</strong> {text(warning)}'
            banner += "".join(f"<br>{text(field)}" for field in fields) + "</div>"
        titles = [*(text(cell) for cell in head[:first]), *(metric_title(metric) for metric in self.metrics)]
        notes = "".join(f"<li>{text(note)}</li>" for note in below)
        body = (
            f'<header><p class="eyebrow">Vistok comparison</p><h1>{len(self.rows)} results</h1>{banner}'
            f'<p class="basis">{text(above[-1])}</p></header><main>{table(titles, cells)}'
            f'<ul class="lines">{notes}</ul></main>'
        )
        return page("Comparison", body).rstrip()

    def csv(self) -> str:
        """For a program: values with all their digits, nothing marked."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        metrics = self.metrics
        writer.writerow(["result", "path", "protocol", "evaluated", "expected", "partial", *metrics])
        for row in self.rows:
            results = row.results
            values = [_metrics(row).get(metric, "") for metric in metrics]
            basis = [results.protocol.hash, results.evaluated, results.expected, results.partial]
            writer.writerow([row.label, row.path, *basis, *values])
        return stream.getvalue().rstrip()

    def _cells(self, mark: Any) -> tuple[list[str], list[list[str]]]:
        """Head and rows as plain text, the best values as ``mark`` shows them."""
        metrics = self.metrics
        best = {metric: self.best(metric) for metric in metrics}
        head = ["Result", "N", *(["Protocol"] if self.differences else [])]
        for metric in metrics:
            name = metric_name(metric)
            head.append(" ".join(filter(None, [name.title + (f", {name.unit}" if name.unit else ""), name.arrow])))
        rows = []
        for number, row in enumerate(self.rows):
            results = row.results
            partial = " (partial)" if results.partial else ""
            cells = [row.label, f"{results.evaluated:,}{partial}"]
            cells += [results.protocol.hash] if self.differences else []
            for metric in metrics:
                value = metric_name(metric).number(_metrics(row).get(metric))
                cells.append(mark(value) if number in best[metric] else value)
            rows.append(cells)
        return head, rows

    def _notes(self, above: bool) -> list[str]:
        """Lines above the table (the last says what all rows have in common) or below it."""
        if above:
            protocol = self.rows[0].results.protocol
            if self.differences:
                return [
                    f"{_WARNING}.",
                    *_fields(self.rows, self.differences),
                    "The hash of each row's protocol is given.",
                ]
            data = self.rows[0].results.data.get("name", "unknown data")
            other = f", NOT by the published weights ({protocol.other_weights})" if protocol.other_weights else ""
            return [f"{protocol.num_images:,} images of {data}, protocol {protocol.preset} {protocol.hash}{other}"]
        notes = [f"{row.label} is partial: {row.results.partial}" for row in self.rows if row.results.partial]
        for row in self.rows:
            reasons: dict[str, list[str]] = {}
            for metric, reason in row.results.skipped.items():
                reasons.setdefault(reason, []).append(metric_name(metric).title)
            notes += [f"{row.label}, {', '.join(names)} not computed: {reason}" for reason, names in reasons.items()]
        return notes


def compare(paths: Sequence[str | Path], force: bool = False, metrics: Sequence[str] = ()) -> Comparison:
    """Read results and put them side by side.

    Args:
        paths: of files ``results.json``, or of the folders that hold one.
        force: also if their protocols differ.
        metrics: which to show, in this order; all if empty.

    Raises:
        FileNotFoundError: for a path where there is no result.
        ProtocolMismatch: if protocols differ; names the fields and their values.
        ValueError: for no paths, a file that is not a result, or a metric that no result has.
    """
    if not paths:
        raise ValueError("compare needs at least one result; got none")
    files = [Path(path) / "results.json" if Path(path).is_dir() else Path(path) for path in paths]
    found = [Results.load(file) for file in files]
    names = [" ".join(str(results.subject.get("name", "nameless")).split()) for results in found]
    labels = [name if names.count(name) == 1 else f"{name} ({file})" for name, file in zip(names, files, strict=True)]
    rows = [Row(label, file, results) for label, file, results in zip(labels, files, found, strict=True)]
    differing = {
        field: None for results in found[1:] for field in found[0].protocol.differences(results.protocol)
    }  # a dict keeps the order of the fields
    differences = {field: [getattr(row.results.protocol, field) for row in rows] for field in differing}
    if differences and not force:
        fields = "\n  ".join(_fields(rows, differences))
        raise ProtocolMismatch(
            f"results of different protocols do not belong in one table:\n  {fields}\n"
            f"evaluate them in one way, or force the table, which then says so"
        )
    unknown = set(metrics) - set(Comparison(rows, {}).metrics)
    if unknown:
        known = ", ".join(Comparison(rows, {}).metrics)
        raise ValueError(f"metrics: no result has {', '.join(sorted(unknown))}; they have {known}")
    return Comparison(rows, differences, tuple(dict.fromkeys(metrics)))


def _fold(columns: list[list[str]], width: int) -> list[list[list[str]]]:
    """Columns in groups that fit into a width, at least one in each."""
    groups: list[list[list[str]]] = []
    left = 0
    for column in columns:
        left -= 2 + len(column[0])
        if left < 0:
            groups.append([])
            left = width - 2 - len(column[0])
        groups[-1].append(column)
    return groups


def _fields(rows: Sequence[Row], differences: dict[str, list[Any]]) -> list[str]:
    """One line per field: every value and the rows that have it."""
    lines = []
    for field, values in differences.items():
        groups: dict[Any, list[str]] = {}
        for row, value in zip(rows, values, strict=True):
            groups.setdefault(value, []).append(row.label)
        lines.append(f"{field}: " + "; ".join(f"{value!r} in {', '.join(names)}" for value, names in groups.items()))
    return lines


def _metrics(row: Row) -> dict[str, float]:
    """The numbers of the plain reconstruction; those that were not finite are left out."""
    if not row.results.variants:
        return {}
    main = row.results.main
    rate = {"bits_per_pixel": main.bits_per_pixel}
    return {name: value for name, value in {**rate, **main.metrics}.items() if value is not None}


def _markdown(cell: str) -> str:
    return " ".join(escape(cell, quote=False).replace("|", "\\|").split())
