"""Rates in the report: curves of quality against rate, and how many tokens single images need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .charts import Axis, Series, bar_chart, line_chart
from .markup import axis_label, charts, metric_title, rest, table, text
from .names import metric_name, sort_names

_BEST_SCALE = "/best scale"


def rate_distortion(section: Mapping[str, Any]) -> str:
    """Curves of quality against rate, one chart per metric, and what they amount to."""
    curves = [curve for curve in section.get("curves", ()) if isinstance(curve, Mapping) and curve.get("points")]
    families = _shown(str(curve.get("family")) for curve in curves)
    figures = []
    for metric in sort_names({str(curve.get("metric")) for curve in curves}):
        series = [
            Series(
                str(curve["family"]).removesuffix(_BEST_SCALE),
                [(p.get("bits_per_pixel"), p.get("value"), str(p.get("label") or "")) for p in curve["points"]],
            )
            for curve in sorted(curves, key=lambda curve: str(curve.get("family")) != "tokenizer")
            if str(curve.get("metric")) == metric and str(curve.get("family")) in families
        ]
        if sum(len(one.points) for one in series) > 1:
            title = f"{metric_name(metric).title} against rate"
            svg = line_chart(series, Axis("bits per pixel, logarithmic", log=True), Axis(axis_label(metric)), title)
            figures.append((metric_name(metric).title, svg))
    parts = [charts(figures)]
    scaled = [family.removesuffix(_BEST_SCALE) for family in families if family.endswith(_BEST_SCALE)]
    if scaled:
        note = "at every rate the best of all scales to which images were reduced before they were coded."
        parts.append(f'<p class="note">{text(scaled)}: {note}</p>')
    compared = [record for record in section.get("comparisons", ()) if record.get("family") in families]
    if compared:
        parts += ["<h3>Compared with codecs, where the curves overlap</h3>", _comparisons(compared)]
    if section.get("targets"):
        parts += ["<h3>Bits per pixel needed to reach a quality</h3>", _targets(section["targets"], families)]
    return "".join(parts) + rest(section, {"curves", "comparisons", "targets"})


def _shown(families: Iterable[str]) -> list[str]:
    """The families without the scales of a codec for which there is a best of all scales."""
    families = list(dict.fromkeys(families))
    scaled = {family.removesuffix(_BEST_SCALE) for family in families if family.endswith(_BEST_SCALE)}
    return [family for family in families if family.endswith(_BEST_SCALE) or family.partition("/")[0] not in scaled]


def _comparisons(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in records:
        name = metric_name(str(record.get("metric")))
        low, high = record.get("range") or (None, None)
        rows.append(
            [
                metric_title(str(record.get("metric"))),
                text(str(record.get("family")).removesuffix(_BEST_SCALE)),
                "–" if low is None else f"{low:.3g} to {high:.3g}",
                name.number(record.get("tokenizer_area")),
                name.number(record.get("family_area")),
                name.number(record.get("difference")),
                "–" if record.get("rate_ratio") is None else f"{record['rate_ratio']:.3g}",
            ]
        )
    head = ["Metric", "Codec", "bpp", "Tokenizer, mean", "Codec, mean", "Difference", "Bits of tokenizer / codec"]
    return table(head, rows, kinds=["t", "t", "", "", "", "", ""])


def _targets(records: Sequence[Mapping[str, Any]], families: Sequence[str]) -> str:
    rows = []
    for record in records:
        name, cells = metric_name(str(record.get("metric"))), []
        for family in families:
            reached = record.get("families", {}).get(family)
            rate = reached.get("bits_per_pixel") if reached else None
            tokens = reached.get("num_tokens") if reached else None
            unit = "token" if tokens == 1 else "tokens"
            cells.append("–" if rate is None else f"{rate:.3g}" + (f" ({text(tokens)} {unit})" if tokens else ""))
        sign = {True: "≥", False: "≤", None: "="}[name.higher_is_better]
        rows.append([f"{text(name.title)} {sign} {text(record.get('target'))} {text(name.unit)}".strip(), *cells])
    return table(["Target", *(text(family.removesuffix(_BEST_SCALE)) for family in families)], rows)


def adaptive_length(section: Mapping[str, Any]) -> str:
    """How many tokens single images need, and how often more tokens make one worse."""
    parts, known = [], set()
    for metric, found in section.items():
        if not isinstance(found, Mapping) or "adaptive" not in found:
            continue
        known.add(metric)
        name, figures, rows = metric_name(metric), [], []
        for rule in found["adaptive"]:
            sign = {True: "≥", False: "≤", None: "="}[name.higher_is_better]
            goal = f"{name.title} {sign} {text(rule.get('target'))}"
            if rule.get("rule") == "full length":
                goal = f"{name.title} within {text(rule.get('target'))} of the full length"
            bars = [(text(length), count) for length, count in rule.get("histogram", ())]
            if any(count for _, count in bars):
                svg = bar_chart(bars, "shortest number of tokens", Axis("images", whole=True), goal)
                figures.append((goal, svg))
            mean = rule.get("mean_tokens")
            tokens = "–" if mean is None else f"{mean:,.1f}"
            rows.append([text(goal), tokens, name.number(rule.get("mean_value")), text(rule.get("unreached"))])
        worse = (found.get("violations") or {}).get("images")
        parts.append(f"<h3>{metric_title(metric)}</h3>")
        if worse is not None:
            parts.append(f"<p>{100 * worse:.1f} % of the images get worse at some step when tokens are added.</p>")
        head = ["Every image gets the fewest tokens for", "Mean tokens", "Mean value", "Images that never reach it"]
        parts += [table(head, rows), charts(figures)]
    return "".join(parts) + rest(section, known)
