"""The sections of the report that know what they show; :data:`SECTIONS` gives the title and the renderer of each.

Sections come as JSON data from ``results.json``. A section without a renderer, or with fields that its renderer does
not know, is shown as plain tables and curves, so nothing that was measured stays out of the report. The same goes for
the details of metrics (:data:`DETAILS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .markup import anything, heading, heat_table, metric_title, rest, table, text
from .names import metric_name, sort_names
from .rates import adaptive_length, rate_distortion
from .tokens import codebook, token_language


def pfid(section: Mapping[str, Any]) -> str:
    """The grid of perturbed reconstructions: means beside the plain reconstruction, and a heat table per metric."""
    parts, plain, means = [], section.get("plain") or {}, section.get("means") or {}
    label, value = section.get("label"), section.get("value")
    if value is not None:
        label = f"{label}: {metric_name('rfid').number(value)}"
    if label:
        parts.append(f"<p><strong>{text(label)}</strong></p>")
    rows = []
    for metric in sort_names(set(means)):
        name, change = metric_name(metric), (section.get("changes") or {}).get(metric)
        sign = "+" if change is not None and change > 0 else ""
        rows.append(
            [
                metric_title(metric),
                name.number(plain.get(metric)),
                name.number(means[metric]),
                sign + name.number(change),
            ]
        )
    if rows:
        parts.append(table(["Metric", "Unperturbed", "Mean of the grid", "Change"], rows))
    grids: dict[str, dict[tuple[str, str], float]] = {}
    for cell in section.get("cells", ()):
        for metric, number in cell.get("metrics", {}).items():
            if number is not None:
                grids.setdefault(metric, {})[text(cell.get("alpha")), text(cell.get("delta"))] = number
    heats = [heat_table(grids[metric], "α", "δ", metric) for metric in sort_names(set(grids))]
    if heats:
        note = "α: share of the tokens replaced; δ: number of nearest codes a replacement comes from. Darker is worse."
        parts.append(f'<div class="heats">{"".join(heats)}</div><p class="note">{note}</p>')
    return "".join(parts) + rest(section, {"label", "value", "plain", "means", "changes", "cells"})


def tokbench(section: Mapping[str, Any]) -> str:
    """Text and faces: every row by size, with who judged and whether it may be compared with published numbers."""
    parts = []
    for name, part in section.items():
        if isinstance(part, Mapping) and isinstance(part.get("rows"), Mapping):
            parts.append(_tokbench_part(str(name), part))
    known = {name for name, part in section.items() if isinstance(part, Mapping) and "rows" in part}
    return "".join(parts) + rest(section, known)


def _tokbench_part(title: str, part: Mapping[str, Any]) -> str:
    size = f" at {text(part['size'])} × {text(part['size'])}" if "size" in part else ""
    parts = [f"<h3>{heading(title)}{size}</h3>"]
    if "comparable" in part:
        verdict = "Comparable" if part["comparable"] else "Not comparable"
        reason = f": {text(part['reason'])}" if part.get("reason") else ""
        parts.append(f"<p>{verdict} with published numbers{reason}.</p>")
    counts = part.get("counts") or {}
    for score in dict.fromkeys(score for row in part["rows"].values() for score in row):
        known = (part.get("kind"), score)
        label, scale = _TOKBENCH.get(known, (heading(score), 1.0))
        buckets = list(dict.fromkeys(bucket for row in part["rows"].values() for bucket in row.get(score, {})))
        head = [label, *(heading(b) + (f" (N = {text(counts[b])})" if b in counts else "") for b in buckets)]
        rows = [
            [heading(row), *(_score(values.get(score, {}).get(bucket), scale) for bucket in buckets)]
            for row, values in part["rows"].items()
        ]
        parts.append(table(head, rows))
    return "".join(parts) + rest(part, {"rows", "size", "comparable", "reason", "kind"})


_TOKBENCH = {
    ("text", "accuracy"): ("T-ACC ↑, %", 100.0),
    ("text", "similarity"): ("T-NED ↑, %", 100.0),
    ("faces", "similarity"): ("F-Sim ↑", 1.0),
}


def _score(value: float | None, scale: float) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{scale * value:.{1 if scale == 100 else 3}f}".replace("-", "−")


def linear_probe(section: Any) -> str:
    """Accuracy of every feature that was probed, beside what guessing gets."""
    records = list(section.values()) if isinstance(section, Mapping) and "top1" not in section else [section]
    records = [record for record in records if isinstance(record, Mapping) and "top1" in record]
    if not records:
        return anything(section)
    rows = [
        [
            text(record.get("feature")),
            *(_score(record.get(share), 100.0) for share in ("top1", "top5", "majority")),
            *(text(record.get(name)) for name in ("num_classes", "num_train", "num_val", "dim", "epochs")),
        ]
        for record in records
    ]
    head = [
        "Feature",
        "Top-1 ↑, %",
        "Top-5 ↑, %",
        "Commonest class, %",
        "Classes",
        "N train",
        "N val",
        "Width",
        "Epochs",
    ]
    shown = {"feature", "top1", "top5", "majority", "num_classes", "num_train", "num_val", "dim", "epochs"}
    others = "".join(
        f"<h3>{heading(record.get('feature'))}: how it was trained</h3>{rest(record, shown)}" for record in records
    )
    return table(head, rows) + others


def token_model(section: Mapping[str, Any]) -> str:
    """Bits of the tokens under the model, beside those of single frequencies and of a fixed rate."""
    rows = []
    for title, prefix, end in (
        ("Autoregressive model", "", "_ar"),
        ("Frequencies of single codes", "unigram_", ""),
        ("Fixed rate", "fixed_", ""),
    ):
        keys = [f"{prefix}bits_per_token", f"{prefix}bits_per_image", f"{prefix}bits_per_pixel{end}"]
        if any(key in section for key in keys):
            rows.append((keys, [title, *(text(section.get(key)) for key in keys)]))
    if not rows:
        return anything(section)
    head = ["Bits by", "Bits per token ↓", "Bits per image ↓", "Bits per pixel ↓"]
    caption = f"On N = {text(section.get('num_test'))} images that the model did not see"
    return table(head, [row for _, row in rows], caption) + rest(section, {key for keys, _ in rows for key in keys})


Renderer = Callable[[Any], str]
SECTIONS: dict[str, tuple[str, Renderer]] = {
    "rate_distortion": ("Rate and distortion", rate_distortion),
    "adaptive_length": ("Tokens that single images need", adaptive_length),
    "pfid": ("Perturbed tokens", pfid),
    "tokbench": ("TokBench: text and faces", tokbench),
    "linear_probe": ("Linear probe", linear_probe),
    "token_model": ("Autoregressive token model", token_model),
}


DETAILS: dict[str, Renderer] = {"codebook": codebook, "token_language": token_language}


def details(name: str, data: Any) -> str:
    """HTML of the tables and curves that a metric left."""
    return DETAILS.get(name, anything)(data) if isinstance(data, Mapping) else anything(data)


def section(name: str, data: Any) -> tuple[str, str]:
    """Title and HTML of a section of ``results.json``."""
    title, render = SECTIONS.get(name, (heading(name), anything))
    if not isinstance(data, Mapping):
        render = anything
    return title, render(data)
