"""Pages of words made here: a benchmark of text that needs no download, for tests and for watching a training.

Words, numbers and random strings in every bucket of size lie dark on light and light on dark, on textured ground. The
font is the one inside Pillow, so the pages depend on a seed and on Pillow's version alone; results carry a hash of the
pixels. Numbers are comparable with none of TokBench's (arXiv:2505.18142), whose photographs are harder.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..metric import MetricUnavailable
from .annotations import AnnotatedImage, Annotations, Word, text_ratio
from .buckets import text_buckets

_WORDS = (
    "about above after again apple bread bridge bright candle carbon castle center circle cloud coffee copper corner "
    "county danger desert dinner double dragon eastern engine family finger flower forest garden ginger golden ground "
    "hammer harbor header holiday hotel island jacket jungle kitchen ladder lemon letter library magnet market meadow "
    "melody minute mirror moment monday museum napkin nature needle number object ocean office orange oxygen palace "
    "parade pepper planet pocket purple quarter quick rabbit record ribbon river rocket saddle salmon school season "
    "shadow silver simple spider spring station summer sunday tablet temple thunder ticket timber tomato travel tunnel "
    "turtle valley velvet village violet walnut water weather window winter wonder yellow yogurt zebra zipper"
).split()
_CLEAR = [c for c in string.ascii_letters + string.digits if c not in "0OoIl1cCsSvVwWxXzZuUkKpP"]
SMALLEST_SIZE = 64  # below, even short words of the largest bucket are longer than a page
_STRETCH = 1.6  # large words reach up to this multiple of where their bucket begins


@dataclass(frozen=True)
class _Print:
    """A word where it is printed: ``(x, y)`` is PIL's anchor, colours are RGB."""

    text: str
    x: int
    y: int
    font_size: int
    ink: tuple[int, int, int]
    plate: tuple[int, int, int] | None
    box: tuple[int, int, int, int]


def synthetic_text(pages: int = 24, size: int = 256, seed: int = 0) -> Annotations:
    """Annotated pages.

    Args:
        pages: how many.
        size: side of the square that tokenizers will get: words are as large as its buckets ask for.
        seed: other seeds make other pages.

    Raises:
        ValueError: for fewer than one page.
        MetricUnavailable: for a size at which the words of the largest bucket are longer than a page.
    """
    if pages < 1:
        raise ValueError(f"pages must be at least 1; got {pages}")
    if size < SMALLEST_SIZE:
        raise MetricUnavailable(f"generated pages of text need images of at least {SMALLEST_SIZE} pixels; got {size}")
    images = []
    for number in range(pages):
        width, height, prints = _layout(number, size, seed)
        words = tuple(Word(p.text, p.box, text_ratio(p.text, p.box, width, height)) for p in prints)
        load = partial(_paint, number, size, seed)
        images.append(AnnotatedImage(f"page-{number:03d}.png", "", words, load))
    return Annotations("synthetic", tuple(images))


def _layout(number: int, size: int, seed: int) -> tuple[int, int, list[_Print]]:
    """Width and height of a page and what is printed on it, line by line until it is full."""
    random = np.random.RandomState([seed, size, number])  # a stream that NumPy promises never to change
    width, height = _page_size(size)
    margin = width // 64
    dark = bool(random.randint(2))
    edges = text_buckets(size).edges
    highs = (edges[1], edges[2], min(edges[2] * _STRETCH, edges[3]))
    prints, found = [], [0, 0, 0]
    x, y, line, bucket = margin, margin, 0, 0
    while True:
        if x == margin:
            bucket = found.index(min(found))  # a line of what the page has least of
        text = _word(random)
        low, high = edges[bucket], highs[bucket]
        advance = np.exp(random.uniform(np.log(low * 1.04), np.log(high * 0.96))) * width  # pixels per character
        font_size = _font_size(text, advance)
        left, top, right, bottom = (round(v) for v in _font(font_size).getbbox(text))
        pad = max(2, font_size // 8)
        if x + right - left + 2 * pad > width - margin:
            if x == margin:
                continue  # too long for any line
            x, y, line = margin, y + line + margin // 2, 0
            continue
        if y + bottom - top + 2 * pad > height - margin:
            return width, height, prints
        ink, plate = _colors(random, dark)
        box = (x + pad, y + pad, x + pad + right - left, y + pad + bottom - top)
        prints.append(_Print(text, box[0] - left, box[1] - top, font_size, ink, plate, box))
        found[bucket] += 1
        x, line = box[2] + pad + margin // 2, max(line, bottom - top + 2 * pad)


def _paint(number: int, size: int, seed: int) -> np.ndarray:
    """The pixels of a page, uint8 ``(H, W, 3)``."""
    width, height, prints = _layout(number, size, seed)
    random = np.random.RandomState([seed, size, number, 1])
    dark = bool(np.random.RandomState([seed, size, number]).randint(2))
    page = Image.fromarray(_ground(random, width, height, dark))
    draw = ImageDraw.Draw(page)
    for p in prints:
        if p.plate is not None:
            pad = max(2, p.font_size // 8)
            draw.rectangle((p.box[0] - pad, p.box[1] - pad, p.box[2] + pad, p.box[3] + pad), fill=p.plate)
        draw.text((p.x, p.y), p.text, fill=p.ink, font=_font(p.font_size))
    return np.array(page)


def _page_size(size: int) -> tuple[int, int]:
    """Pages are larger than what tokenizers get of them, as photographs are."""
    width = max(1280, 2 * size)
    return width, width * 3 // 4


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which synthetic pages need")
    return font


def _font_size(text: str, advance: float) -> int:
    """Size at which a word's box is ``advance`` pixels long per character."""
    left, top, right, bottom = _font(100).getbbox(text)
    return max(6, round(100 * advance * len(text) / max(right - left, bottom - top)))


def _word(random: np.random.RandomState) -> str:
    kind = random.randint(10)
    if kind < 6:
        word = _WORDS[random.randint(len(_WORDS))]
        return (word, word.capitalize(), word.upper())[random.randint(3)]
    if kind < 8:
        return "".join(_CLEAR[random.randint(len(_CLEAR))] for _ in range(random.randint(4, 9)))
    if kind == 8:
        return f"{random.randint(1, 999)}.{random.randint(10, 99)}"
    return str(random.randint(1000, 10000000))


def _colors(random: np.random.RandomState, dark: bool) -> tuple[tuple[int, int, int], tuple[int, int, int] | None]:
    """Ink, and the plate under a third of the words, which is of the other kind than the page."""
    plate = random.randint(3) == 0
    light_ink = dark != plate
    low, high = random.randint(0, 60, 3), random.randint(195, 256, 3)
    ink, ground = (high, low) if light_ink else (low, high)
    return tuple(ink.tolist()), tuple(ground.tolist()) if plate else None


def _ground(random: np.random.RandomState, width: int, height: int, dark: bool) -> np.ndarray:
    """A coloured ground with soft blotches and fine grain, uint8 ``(H, W, 3)``; the same arithmetic everywhere."""
    base = random.randint(20, 70, 3) if dark else random.randint(180, 230, 3)
    blotches = Image.fromarray(random.randint(0, 50, (6, 8, 3), dtype=np.uint8))
    soft = np.array(blotches.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16) - 25
    grain = random.randint(-8, 9, (height, width, 1), dtype=np.int16)
    return np.clip(base + soft + grain, 0, 255).astype(np.uint8)
