"""How much of a face's identity survives: F-Sim of TokBench (arXiv:2505.18142).

The cosine of the embeddings of a face on the original and on the reconstruction, both aligned by the annotated
landmarks, so that nothing has to be detected on a poor reconstruction. Faces are pooled in three buckets of size.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..metric import MetricUnavailable
from .annotations import AnnotatedImage, Face
from .buckets import NAMES, Buckets, bucket_means
from .embedder import FaceEmbedder
from .journal import pixels_sha256
from .letterbox import letterbox, restore
from .rebuild import Rebuild, Save, as_saved

ROWS = ("model", "resize")


class FaceJudge:
    """Embeds the faces of images on the original, after letterboxing alone, and on the reconstruction.

    Args:
        embedder: embeds.
        size: side of the square that tokenizers get.
        buckets: which faces count.
        save: how files that the reconstructions would be written to change them.
    """

    def __init__(self, embedder: FaceEmbedder, size: int, buckets: Buckets, save: Save = "memory") -> None:
        self.embedder = embedder
        self.size = size
        self.buckets = buckets
        self.save: Save = save

    def counts(self, image: AnnotatedImage) -> bool:
        """Whether any face of an image belongs to a bucket."""
        return any(self.buckets.find(face.ratio) is not None for face in image.instances)

    def judge(
        self, images: list[AnnotatedImage], originals: list[np.ndarray], rebuild: Rebuild
    ) -> list[dict[str, Any]]:
        """One entry per image: ``faces`` holds the bucket and the embeddings on original, reconstruction and resize."""
        entries = []
        for image, original, rebuilt in zip(images, originals, rebuild(images, originals), strict=True):
            resized = as_saved(restore(*letterbox(original, self.size)), image.name, self.save)
            faces = [
                [self.buckets.find(face.ratio), *(self._embed(pixels, face) for pixels in (original, rebuilt, resized))]
                for face in image.instances
                if self.buckets.find(face.ratio) is not None
            ]
            entries.append(
                {"image": image.name, "group": image.group, "sha256": pixels_sha256(original), "faces": faces}
            )
        return entries

    def _embed(self, pixels: np.ndarray, face: Face) -> str:
        vector = np.asarray(self.embedder.embed(pixels, np.array(face.landmarks)), "<f4")
        return base64.b64encode(vector.tobytes()).decode()


def face_summary(entries: Callable[[], Iterable[dict[str, Any]]], center: bool) -> dict[str, Any]:
    """Scores of all entries that :meth:`FaceJudge.judge` made.

    Args:
        entries: gives them one at a time, from the beginning whenever it is called.
        center: subtract the mean embedding of the originals first.

    Returns:
        ``rows``: by row ``similarity`` by bucket and as ``mean``; ``counts``: faces by bucket; ``empty``: buckets
        without faces.

    Raises:
        MetricUnavailable: if there are too few faces to center.
    """
    mean = _mean(entries()) if center else 0.0
    counts: Counter[int] = Counter()
    sums = {row: Counter() for row in ROWS}
    for bucket, (original, *others) in _embeddings(entries()):
        counts[bucket] += 1
        for row, vector in zip(ROWS, others, strict=True):
            sums[row][bucket] += _cosine(original - mean, vector - mean)
    return {
        "rows": {row: {"similarity": bucket_means(sums[row], counts)} for row in ROWS},
        "counts": {name: counts[i] for i, name in enumerate(NAMES)},
        "empty": [name for i, name in enumerate(NAMES) if not counts[i]],
    }


def _mean(entries: Iterable[dict[str, Any]]) -> np.ndarray:
    """Mean embedding of the original faces."""
    total, count = 0.0, 0
    for _, (original, *_) in _embeddings(entries):
        total, count = total + original, count + 1
    if count < 2:
        raise MetricUnavailable(f"centred embeddings need at least 2 faces in the buckets; there are {count}")
    return total / count


def _embeddings(entries: Iterable[dict[str, Any]]) -> Iterator[tuple[int, list[np.ndarray]]]:
    for entry in entries:
        for bucket, *texts in entry["faces"]:
            yield bucket, [np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64) for text in texts]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors; 0 if one has no direction."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 0 else 0.0
