"""The numbers of an evaluation as lines for a terminal, with what they rest on and what is missing from them."""

from __future__ import annotations

from typing import Any

from ..eval.report.names import metric_name, sort_names
from ..eval.results import Results
from ..eval.tokbench.suite import summary as tokbench_summary
from ..eval.tokens.pfid import PUBLISHED_IMAGES


def summary(results: Results) -> str:
    """The numbers of the reconstruction and, shortly, of the sections; reasons of what was skipped."""
    plan = results.protocol
    lines = [
        f"{results.subject['name']} on {results.evaluated} images of {plan.width}x{plan.height}, protocol "
        f"{plan.preset} {plan.hash}"
    ]
    if results.partial:
        lines.append(f"PARTIAL: {results.partial}")
    if plan.other_weights:
        lines.append(f"NOT the published weights: {plan.other_weights}; comparable only where these are the same")
    main = results.main
    lines += _metrics(main.metrics | ({} if main.bits_per_pixel is None else {"bits_per_pixel": main.bits_per_pixel}))
    if "rfid" in main.metrics and results.evaluated < PUBLISHED_IMAGES:
        lines.append(f"  rFID falls as images are added: published values rest on {PUBLISHED_IMAGES:,}")
    lines += _lengths(results) + _sections(results.sections)
    reasons: dict[str, list[str]] = {}
    for name in sort_names(set(results.skipped)):
        reasons.setdefault(results.skipped[name], []).append(name)
    lines += [f"skipped {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def _metrics(values: dict[str, float]) -> list[str]:
    """One line each, digits of whole numbers and units below each other."""
    names = sort_names(set(values))
    numbers = {name: metric_name(name).number(values[name]) for name in names}
    width, digits = (max(map(len, texts), default=0) for texts in (names, numbers.values()))
    lines = []
    for name in names:
        shown = metric_name(name)
        lines.append(f"  {name:<{width}} {shown.arrow or ' '} {numbers[name]:>{digits}} {shown.unit}".rstrip())
    return lines


def _lengths(results: Results) -> list[str]:
    """A table of what prefixes of the tokens score."""
    variants = [variant for variant in results.variants if variant.kind == "length"]
    if not variants:
        return []
    names = sort_names({name for variant in variants for name in variant.metrics} - {"bytes"})
    rows = [["tokens", *names]]
    for variant in variants:
        values = [metric_name(name).number(variant.metrics.get(name)) for name in names]
        rows.append([str(variant.settings.get("num_tokens", variant.name)), *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _sections(sections: dict[str, Any]) -> list[str]:
    lines = []
    pfid = sections.get("pfid", {})
    if pfid.get("value") is not None:
        lines.append(f"  {pfid['label']}: {metric_name('rfid').number(pfid['value'])}")
    for record in sections.get("linear_probe", {}).values():
        scores = (f"{name} {_percent(record[name])}" for name in ("top1", "top5", "majority") if name in record)
        lines.append(f"  linear probe on {record['feature']}: {', '.join(scores)}")
    model = sections.get("token_model", {})
    if "bits_per_token" in model:
        bits = (f"{model[f'{prefix}bits_per_token']:.3f} {said}" for prefix, said in _MODELS.items())
        lines.append(f"  bits per token: {', '.join(bits)}")
    if "tokbench" in sections:
        lines += [f"  {line}" for line in tokbench_summary(sections["tokbench"]).splitlines()]
    return lines


_MODELS = {
    "": "by an autoregressive model",
    "unigram_": "by single frequencies",
    "fixed_": "at a fixed rate",
}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
