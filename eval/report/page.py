"""The report of an evaluation: one HTML file with every number, its protocol, pictures and charts.

Nothing is loaded from anywhere: style, script, pictures and charts are inside, and a content policy forbids the page
everything else, so a report can be mailed, archived and opened years later. It reads on a screen, on a phone, in the
dark and on paper. What comes from outside (names of files, reasons, JSON) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ...data.files import atomic_write
from ..results import Results, VariantResult
from .gallery import Gallery
from .markup import definitions, heading, metric_title, page, table, text
from .names import metric_name, sort_names
from .pictures import KINDS, pictures
from .sections import details, section

_CARDS = (
    "rfid",
    "psnr",
    "ssim",
    "lpips_alex",
    "lpips_vgg",
    "ris",
    "dino_similarity",
    "usage",
    "perplexity",
    "bits_per_pixel",
)
_SHARE = 0.005  # of the time, that a stage needs for a line of its own
_COLUMNS = 8  # metrics in one table of variants, so that it fits on paper
_ON_THE_SAME_IMAGES = ("rate_distortion", "adaptive_length", "pfid")  # the other sections have images of their own


def write_report(path: str | Path, results: Results, galleries: Mapping[str, Gallery] | None = None) -> None:
    """Write the report, whole or not at all.

    Args:
        path: of the HTML file; replaced if it exists.
        results: what was found.
        galleries: the pictures of variants, by their name.

    Raises:
        ValueError: for a gallery of a variant that the results do not have.
    """
    with atomic_write(path) as file:
        file.write(report(results, galleries).encode())


def report(results: Results, galleries: Mapping[str, Gallery] | None = None) -> str:
    """The page that :func:`write_report` writes."""
    galleries = galleries or {}
    unknown = set(galleries) - {variant.name for variant in results.variants}
    if unknown:
        raise ValueError(f"galleries must belong to variants of the results; got {', '.join(sorted(unknown))}")
    parts = [
        ("Key numbers", _basis(results), _cards(results) + _skipped(results)),
        ("Reconstructions", "", pictures(results, galleries)),
        ("All numbers", _basis(results), _numbers(results)),
    ]
    for name, data in results.sections.items():
        title, body = section(name, data)
        parts.append((title, _basis(results) if name in _ON_THE_SAME_IMAGES else "", body))
    parts += [
        ("Behind the numbers", _basis(results), _details(results)),
        ("Every variant", _basis(results), _other_variants(results)),
        ("Protocol and subject", "", _protocol(results)),
        ("Images that could not be read", "", _unreadable(results)),
        ("Time", "", _timing(results)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#part-{number}">{part[0]}</a>' for number, part in enumerate(parts))
    body = "".join(
        f'<section id="part-{number}"><h2>{title}</h2>{basis}{content}</section>'
        for number, (title, basis, content) in enumerate(parts)
    )
    version = f" {text(results.version)}" if results.version else ""
    return page(
        str(results.subject.get("name", "Evaluation")),
        f"{_header(results)}<nav>{links}</nav></header><main>{body}</main>"
        f'<footer>Written by Vistok{version}. Protocol <span class="hash">{results.protocol.hash}</span>: numbers '
        f"may stand in one table only where this is equal.</footer>",
    )


def _evaluated(results: Results) -> str:
    """How many images the numbers rest on, of how many."""
    total = results.data.get("num_images", results.expected) if results.partial else results.evaluated
    return f"{results.evaluated:,}" + (f" of {text(total)}" if total != results.evaluated else "")


def _basis(results: Results) -> str:
    """What the numbers of a section rest on."""
    name, protocol = text(results.data.get("name", "unknown data")), results.protocol
    partial = " (partial)" if results.partial else ""
    return (
        f'<p class="basis">N = {_evaluated(results)} images{partial}, {name}, protocol {text(protocol.preset)} '
        f'<span class="hash">{protocol.hash}</span></p>'
    )


def _header(results: Results) -> str:
    protocol = results.protocol
    facts = {
        "Data": text(results.data.get("name", "–")),
        "Images": _evaluated(results),
        "Resolution": f"{protocol.width} × {protocol.height}",
        "Protocol": f'{text(protocol.preset)} <span class="hash">{protocol.hash}</span>',
        "Reference": text(protocol.reference),
    }
    if results.variants and results.main.bits_per_pixel is not None:
        facts["Rate"] = metric_name("bits_per_pixel").text(results.main.bits_per_pixel)
    entries = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    banner = ""
    if results.partial:
        reason = f"{text(results.partial)}. Not comparable with results on all images."
        banner = f'<div class="banner" role="note"><strong>PARTIAL</strong> {reason}</div>'
    if protocol.other_weights:
        reason = f"judged by {text(protocol.other_weights)}. Comparable only where these are the same."
        banner += f'<div class="banner" role="note"><strong>NOT THE PUBLISHED WEIGHTS</strong> {reason}</div>'
    name = text(results.subject.get("name", "Evaluation"))
    return f'<header><p class="eyebrow">Vistok evaluation</p><h1>{name}</h1>{banner}<dl class="facts">{entries}</dl>'


def _cards(results: Results) -> str:
    if not results.variants:
        return ""
    main, parts = results.main, []
    metrics = {"bits_per_pixel": main.bits_per_pixel, **main.metrics}
    shown = [metric for metric in _CARDS if metrics.get(metric) is not None]
    for metric in shown or sort_names(set(main.metrics))[:8]:
        name = metric_name(metric)
        unit = f" <small>{text(name.unit)}</small>" if name.unit else ""
        title = metric_title(metric).replace(f", {name.unit}", "") if name.unit else metric_title(metric)
        parts.append(
            f'<div class="card"><h3>{title}</h3><p>{name.number(metrics[metric])}{unit}</p>'
            f'<p class="n">N = {results.evaluated:,}{", partial" if results.partial else ""}</p></div>'
        )
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def _skipped(results: Results) -> str:
    """What was not computed, and why; one entry per reason."""
    reasons: dict[str, list[str]] = {}
    for metric, reason in results.skipped.items():
        reasons.setdefault(reason, []).append(metric_name(metric).title)
    entries = "".join(
        f"<li><b>{text(', '.join(names))}</b> <span>{text(reason)}</span></li>" for reason, names in reasons.items()
    )
    return f'<div class="missing"><h3>Not computed</h3><ul>{entries}</ul></div>' if entries else ""


def _numbers(results: Results) -> str:
    if not results.variants:
        return ""
    main = results.main
    values = {**main.metrics, "bits_per_pixel": main.bits_per_pixel}
    rows = [
        [metric_title(metric), metric_name(metric).number(values[metric]), text(metric_name(metric).definition)]
        for metric in sort_names(set(values))
    ]
    return table(["Metric", "Value", "Meaning"], rows, text(main.name), ["t", "", "t soft"]) if rows else ""


def _other_variants(results: Results) -> str:
    """The numbers of lengths, codecs and perturbed tokens, a table per kind: long, so behind the charts."""
    parts = []
    for kind in dict.fromkeys(variant.kind for variant in results.variants[1:]):
        variants = [variant for variant in results.variants[1:] if variant.kind == kind]
        metrics = sort_names({metric for variant in variants for metric in variant.metrics} - {"bits_per_pixel"})
        parts.append(f"<h3>{KINDS.get(kind, heading(kind))}</h3>")
        for start in range(0, max(1, len(metrics)), _COLUMNS):
            parts.append(_variants(variants, metrics[start : start + _COLUMNS]))
    return "".join(parts)


def _variants(variants: list[VariantResult], metrics: list[str]) -> str:
    rated = [] if all(variant.bits_per_pixel is None for variant in variants) else ["bits_per_pixel"]
    rows = []
    for variant in variants:
        values = {**variant.metrics, "bits_per_pixel": variant.bits_per_pixel}
        rows.append(
            [text(variant.name), *(metric_name(metric).number(values.get(metric)) for metric in [*rated, *metrics])]
        )
    return table(["Variant", *(metric_title(metric) for metric in [*rated, *metrics])], rows)


def _details(results: Results) -> str:
    """Tables and curves of single metrics of the plain reconstruction."""
    if not results.variants:
        return ""
    return "".join(
        f"<h3>{heading(metric)}</h3>{details(metric, found)}" for metric, found in results.main.details.items() if found
    )


def _protocol(results: Results) -> str:
    protocol = definitions({**asdict(results.protocol), "hash": results.protocol.hash})
    subject = definitions(results.subject)
    data = definitions(results.data)
    return (
        f'<div class="columns"><div><h3>Protocol</h3>{protocol}</div>'
        f"<div><h3>Subject</h3>{subject}<h3>Data</h3>{data}</div></div>"
    )


def _unreadable(results: Results) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in results.unreadable)
    return f'<ul class="lines">{lines}</ul>' if lines else ""


def _timing(results: Results) -> str:
    """Seconds by stage, the longest first; stages of less than a two hundredth together."""
    total = sum(results.timing.values())
    stages = sorted(results.timing.items(), key=lambda item: -item[1])
    shown = [(_stage(name), seconds) for name, seconds in stages if seconds >= _SHARE * total]
    if len(shown) < len(stages):
        shown.append((f"{len(stages) - len(shown)} more", sum(seconds for _, seconds in stages[len(shown) :])))
    rows = [
        [text(stage), f"{seconds:,.1f}", f"{100 * seconds / total:.1f}" if total else "–"] for stage, seconds in shown
    ]
    return table(["Stage", "Seconds", "%"], rows) if rows else ""


def _stage(name: str) -> str:
    """``metric/rfid`` and the like, in words."""
    kind, _, part = name.partition("/")
    if kind == "metric":
        return metric_name(part).title
    return f"reconstruct: {KINDS.get(part, part).lower()}" if kind == "reconstruct" else name
