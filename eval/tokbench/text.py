"""How much of the text survives: T-ACC and T-NED of TokBench (arXiv:2505.18142).

A word is cut out along its box, without margin or rotation, and read. It counts as correct if it is read exactly,
upper and lower case told apart; T-NED is one minus the edit distance per character of the longer string. Words of all
sets are pooled in three buckets of size.

Words that the recogniser cannot even read on the original say nothing about a tokenizer. Refining keeps those that it
reads exactly; the benchmark's annotations are refined by its own recogniser, so every other one has to refine again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from .annotations import AnnotatedImage, Word
from .buckets import NAMES, Buckets, bucket_means
from .journal import Journal, pixels_sha256
from .letterbox import letterbox, restore
from .rebuild import Rebuild, Save, as_saved
from .recognizer import TextRecognizer

ROWS = ("model", "resize", "original")


def crop(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The part of an image ``(H, W, 3)`` inside left, top, right, bottom."""
    return image[box[1] : box[3], box[0] : box[2]]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: fewest characters to insert, delete or replace to get from one string to the other."""
    above = list(range(len(b) + 1))
    for i, first in enumerate(a, 1):
        row = [i]
        for j, second in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (first != second)))
        above = row
    return above[-1]


def compare(target: str, prediction: str) -> tuple[bool, float]:
    """Whether a word was read exactly, and one minus the normalised edit distance, in [0, 1].

    Spaces that a recogniser puts into a word that has none are taken out.
    """
    if " " not in target:
        prediction = prediction.replace(" ", "")
    longest = max(len(target), len(prediction))
    return prediction == target, 1 - edit_distance(target, prediction) / longest if longest else 1.0


class TextJudge:
    """Reads the words of images on the original, after letterboxing alone, and on the reconstruction.

    Args:
        recognizer: reads.
        size: side of the square that tokenizers get.
        buckets: which words count.
        refine: leave out words that the recogniser does not read exactly on the original.
        save: how files that the reconstructions would be written to change them.
        readings: where readings of originals and letterboxed originals are kept from run to run; ``None`` for nowhere.
    """

    def __init__(
        self,
        recognizer: TextRecognizer,
        size: int,
        buckets: Buckets,
        refine: bool,
        save: Save = "memory",
        readings: Journal | None = None,
    ) -> None:
        self.recognizer = recognizer
        self.size = size
        self.buckets = buckets
        self.refine = refine
        self.save: Save = save
        self.readings = readings

    def counts(self, image: AnnotatedImage) -> bool:
        """Whether any word of an image belongs to a bucket."""
        return any(self.buckets.find(word.ratio) is not None for word in image.instances)

    def judge(
        self, images: list[AnnotatedImage], originals: list[np.ndarray], rebuild: Rebuild
    ) -> list[dict[str, Any]]:
        """One entry per image: ``words`` holds bucket, text and what each of :data:`ROWS` was read as.

        Words that refining leaves out have ``None`` for the model.
        """
        words = [[word for word in image.instances if self.buckets.find(word.ratio) is not None] for image in images]
        before = self._before(images, originals, words)
        read = [
            [not self.refine or compare(w.text, text)[0] for w, text in zip(part, texts["original"], strict=True)]
            for part, texts in zip(words, before, strict=True)
        ]
        wanted = [number for number, keep in enumerate(read) if any(keep)]
        rebuilt = rebuild([images[i] for i in wanted], [originals[i] for i in wanted]) if wanted else []
        kept = [[word for word, keep in zip(words[i], read[i], strict=True) if keep] for i in wanted]
        texts = iter(self._read(rebuilt, kept))
        entries = []
        for number, image in enumerate(images):
            model = [next(texts) if keep else None for keep in read[number]]
            rows = zip(words[number], model, before[number]["resize"], before[number]["original"], strict=True)
            entries.append(
                {
                    "image": image.name,
                    "group": image.group,
                    "sha256": before[number]["sha256"],
                    "words": [[self.buckets.find(word.ratio), word.text, *texts_] for word, *texts_ in rows],
                }
            )
        return entries

    def _before(
        self, images: list[AnnotatedImage], originals: list[np.ndarray], words: list[list[Word]]
    ) -> list[dict[str, Any]]:
        """Readings of the original and of the letterboxed original of every image."""
        hashes = [pixels_sha256(image) for image in originals]
        known = [self._known(image.name, sha) for image, sha in zip(images, hashes, strict=True)]
        new = [number for number, entry in enumerate(known) if entry is None]
        resized = [as_saved(restore(*letterbox(originals[i], self.size)), images[i].name, self.save) for i in new]
        unread = [words[i] for i in new]
        original, resize = iter(self._read([originals[i] for i in new], unread)), iter(self._read(resized, unread))
        for i in new:
            known[i] = {
                "image": images[i].name,
                "sha256": hashes[i],
                "original": [next(original) for _ in words[i]],
                "resize": [next(resize) for _ in words[i]],
            }
        if self.readings is not None and new:
            self.readings.append([known[i] for i in new])
        return known

    def _known(self, name: str, sha256: str) -> dict[str, Any] | None:
        entry = None if self.readings is None else self.readings.find(name)
        return entry if entry is not None and entry["sha256"] == sha256 else None

    def _read(self, images: list[np.ndarray], words: list[list[Word]]) -> list[str]:
        """All words of some images, in their order."""
        crops = [crop(image, word.box) for image, part in zip(images, words, strict=True) for word in part]
        visible = [part for part in crops if part.size]  # a stated size can be larger than the image
        texts = self.recognizer.read(visible) if visible else []
        if len(texts) != len(visible):
            raise ValueError(f"the recognizer must give one text per crop; got {len(texts)} for {len(visible)}")
        found = iter(texts)
        return [next(found) if part.size else "" for part in crops]


def text_summary(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Scores of all entries that :meth:`TextJudge.judge` made.

    Returns:
        ``rows``: by row ``accuracy`` and ``similarity``, each by bucket and as ``mean``; ``groups``: the row of the
        model by set; ``counts``: words by bucket, and ``unrefined``: before refining; ``readable``: share of words that
        refining keeps; ``empty``: buckets without words.
    """
    found: Counter[int] = Counter()
    tallies: dict[tuple[str, str], _Tally] = {}
    groups: dict[str, None] = {}
    for entry in entries:
        groups.setdefault(entry["group"])
        for bucket, target, *texts in entry["words"]:
            found[bucket] += 1
            if texts[0] is None:
                continue
            for row, text in zip(ROWS, texts, strict=True):
                for group in ("", entry["group"]) if row == "model" and entry["group"] else ("",):
                    tallies.setdefault((row, group), _Tally()).add(bucket, *compare(target, text))
    pooled = {row: tallies.get((row, ""), _Tally()) for row in ROWS}
    counts = pooled["model"].counts
    return {
        "rows": {row: tally.table() for row, tally in pooled.items()},
        "groups": {
            group: tally.table() | {"counts": {name: tally.counts[i] for i, name in enumerate(NAMES)}}
            for group in groups
            if group and (tally := tallies.get(("model", group), _Tally()))
        },
        "counts": {name: counts[i] for i, name in enumerate(NAMES)},
        "unrefined": {name: found[i] for i, name in enumerate(NAMES)},
        "readable": counts.total() / found.total() if found else math.nan,
        "empty": [name for i, name in enumerate(NAMES) if not counts[i]],
    }


class _Tally:
    """Sums of both scores by bucket."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self._correct: Counter[int] = Counter()
        self._similar: Counter[int] = Counter()

    def add(self, bucket: int, correct: bool, similar: float) -> None:
        self.counts[bucket] += 1
        self._correct[bucket] += correct
        self._similar[bucket] += similar

    def table(self) -> dict[str, dict[str, float]]:
        return {
            "accuracy": bucket_means(self._correct, self.counts),
            "similarity": bucket_means(self._similar, self.counts),
        }
