"""Pictures in the report: pairs of the plain reconstruction, and a slider over those of other variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..results import Results, VariantResult
from .gallery import Gallery, Picture
from .markup import heading, picture, text
from .names import metric_name

KINDS = {
    "reconstruction": "Reconstruction",
    "length": "Lengths",
    "perturbed": "Perturbed tokens",
    "codec": "Codecs",
}


def pictures(results: Results, galleries: Mapping[str, Gallery]) -> str:
    """All pictures of all variants, as HTML; empty if there are none."""
    parts = []
    for variant in results.variants:
        if variant.kind == "reconstruction" and variant.name in galleries:
            parts.append(_main_pictures(variant, galleries[variant.name].pictures()))
    for kind in dict.fromkeys(variant.kind for variant in results.variants):
        variants = [variant for variant in results.variants if variant.kind == kind and variant.name in galleries]
        if kind != "reconstruction" and variants:
            parts.append(_frames(KINDS.get(kind, heading(kind)), variants, galleries))
    return "".join(parts)


def _main_pictures(variant: VariantResult, kept: Sequence[Picture]) -> str:
    titles = {
        "preview": "Original left, reconstruction right",
        "best": "The best by {}",
        "worst": "The worst by {}",
    }
    parts = []
    for kind, title in titles.items():
        chosen = [one for one in kept if one.kind == kind]
        if chosen:
            judge = text(metric_name(chosen[0].value_name).title)
            figures = "".join(_pair(one) for one in chosen)
            parts.append(f'<h3>{title.format(judge)}</h3><div class="pairs">{figures}</div>')
    return "".join(parts)


def _pair(one: Picture) -> str:
    value = f"<b>{text(_judged(one))}</b>" if one.value is not None else ""
    return (
        f'<figure class="pair"><div>{picture(one.original, f"original of {one.key}")}'
        f"{picture(one.reconstruction, f'reconstruction of {one.key}')}</div>"
        f"<figcaption><span>{text(one.key)}</span>{value}</figcaption></figure>"
    )


def _judged(one: Picture) -> str:
    name = metric_name(one.value_name)
    return f"{name.title.split(' (')[0]} {name.text(one.value)}"


def _frames(title: str, variants: list[VariantResult], galleries: Mapping[str, Gallery]) -> str:
    """The previews of several variants, one strip per image: a slider on the screen, a row on paper."""
    by_image: dict[int, dict[str, Picture]] = {}
    for variant in variants:
        for one in galleries[variant.name].pictures():
            if one.kind == "preview":
                by_image.setdefault(one.index, {})[variant.name] = one
    strips = []
    for shown in by_image.values():
        first = next(iter(shown.values()))
        frames = [
            f"<figure>{picture(first.original, f'original of {first.key}')}<figcaption>original</figcaption></figure>"
        ]
        for variant in variants:
            one = shown.get(variant.name)
            inner = "" if one is None else picture(one.reconstruction, f"{variant.name} of {first.key}")
            caption = variant.name if one is None or one.value is None else f"{variant.name}: {_judged(one)}"
            frames.append(
                f'<figure class="frame" data-name="{text(_frame_name(variant))}">{inner}'
                f"<figcaption>{text(caption)}</figcaption></figure>"
            )
        strips.append(f'<div class="strip">{"".join(frames)}<p>{text(first.key)}</p></div>')
    if not strips:
        return ""
    last = len(variants) - 1
    control = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{text(title)}"><output></output>'
    return (
        f'<h3>{text(title)}</h3><div class="frames"><div class="control">{control}</div>'
        f'<div class="strips">{"".join(strips)}</div></div>'
    )


def _frame_name(variant: VariantResult) -> str:
    rate = variant.bits_per_pixel
    return variant.name if rate is None else f"{variant.name}, {metric_name('bits_per_pixel').text(rate)}"
