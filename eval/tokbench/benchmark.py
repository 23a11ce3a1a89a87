"""TokBench (arXiv:2505.18142): how much text and how many faces survive a tokenizer.

Every result stands beside what letterboxing to the tokenizer's resolution alone leaves, says which recogniser or
embedder judged, and whether it may be compared with published numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .annotations import Annotations
from .buckets import Buckets, face_buckets, text_buckets
from .embedder import FaceEmbedder
from .faces import FaceJudge, face_summary
from .journal import Journal
from .rebuild import FolderRebuild, Rebuild, Save, TokenizerRebuild
from .recognizer import TextRecognizer
from .text import TextJudge, text_summary

PUBLISHED_RECOGNIZER = "parseq-56125471"
PUBLISHED_EMBEDDER = "glintr100 of antelopev2"
_PUBLISHED_EMBEDDER_SHA256 = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"
Reconstruct = Callable[[Tensor], Tensor]


def run_text(
    reconstruct: Reconstruct | str | Path,
    annotations: Annotations,
    size: int,
    recognizer: TextRecognizer,
    folder: str | Path,
    *,
    subject: str = "",
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    refine: bool | None = None,
    save: Save = "memory",
    cache: str | Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """T-ACC and T-NED.

    Args:
        reconstruct: uint8 ``(B, 3, S, S)`` to uint8 of the same shape, or a folder of reconstructions of the original
            sizes under the names of the images.
        annotations: the words.
        size: S, side of the square that tokenizers get.
        recognizer: reads words.
        folder: keeps what was found on every image, so that a run that is killed goes on.
        subject: what is evaluated; a run goes on only for the same one.
        device: that ``reconstruct`` gets its images on.
        batch_size: images at a time.
        refine: leave out words that the recogniser does not read on the original; if ``None``, unless the annotations
            were made with this recogniser.
        save: ``jpeg75-if-jpg`` for the lossy files of the benchmark's scripts, which published numbers contain.
        cache: folder where readings of the originals are kept for other tokenizers; ``None`` for nowhere.
        advance: told how many images are done, at a time.

    Returns:
        JSON data: :func:`~vistok.eval.tokbench.text.text_summary` beside ``kind``, ``size``, ``buckets``,
        ``recognizer``, ``annotations``, ``refined``, ``save``, ``comparable`` and the ``reason`` why not.

    Raises:
        ValueError: for wrong arguments, or a folder of another run.
        FileNotFoundError: if reconstructions are missing.
    """
    buckets = text_buckets(size)
    made_for = annotations.name == "tokbench" and recognizer.id == PUBLISHED_RECOGNIZER
    refine = not made_for if refine is None else refine
    judged_by = _identity(recognizer)
    judge = TextJudge(recognizer, size, buckets, refine, save)
    if cache is not None:
        judge.readings = _readings(Path(cache), judged_by, annotations, size, save)
    settings = {"kind": "text", "recognizer": judged_by, "refined": refine}
    head, journal, names = _run(
        judge, settings, reconstruct, annotations, buckets, folder, subject, device, batch_size, save, advance
    )
    reasons = _reasons(annotations, buckets, head["save"])
    if recognizer.id != PUBLISHED_RECOGNIZER:
        reasons.insert(0, f"read by {recognizer.id}, published numbers by {PUBLISHED_RECOGNIZER}")
    elif refine:
        reasons.append("the annotations were refined once more")
    return head | text_summary(journal.entries(names)) | _verdict(reasons)


def run_faces(
    reconstruct: Reconstruct | str | Path,
    annotations: Annotations,
    size: int,
    embedder: FaceEmbedder,
    folder: str | Path,
    *,
    subject: str = "",
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    save: Save = "memory",
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """F-Sim; arguments and errors as for :func:`run_text`.

    Returns:
        JSON data: :func:`~vistok.eval.tokbench.faces.face_summary` beside ``kind``, ``size``, ``buckets``,
        ``embedder``, ``annotations``, ``centered``, ``save``, ``comparable`` and the ``reason`` why not.

    Raises:
        MetricUnavailable: if there are too few faces for an embedder that centres.
    """
    buckets = face_buckets(size)
    judge = FaceJudge(embedder, size, buckets, save)
    settings = {"kind": "faces", "embedder": _identity(embedder), "centered": embedder.center}
    head, journal, names = _run(
        judge, settings, reconstruct, annotations, buckets, folder, subject, device, batch_size, save, advance
    )
    reasons = _reasons(annotations, buckets, head["save"])
    if embedder.weights_sha256 != _PUBLISHED_EMBEDDER_SHA256:
        reasons.insert(0, f"embedded by {embedder.id}, published numbers by {PUBLISHED_EMBEDDER}")
    return head | face_summary(lambda: journal.entries(names), embedder.center) | _verdict(reasons)


def _run(
    judge: TextJudge | FaceJudge,
    settings: dict[str, Any],
    reconstruct: Reconstruct | str | Path,
    annotations: Annotations,
    buckets: Buckets,
    folder: str | Path,
    subject: str,
    device: str | torch.device,
    batch_size: int,
    save: Save,
    advance: Callable[[int], None] | None,
) -> tuple[dict[str, Any], Journal, list[str]]:
    """The pass over all images: what the result begins with, and where the entries of which images are."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    wanted = [image for image in annotations.images if judge.counts(image)]
    if isinstance(reconstruct, (str, Path)):
        rebuild: Rebuild = FolderRebuild(reconstruct, wanted)
        saved = "files"
    else:
        rebuild, saved = TokenizerRebuild(reconstruct, judge.size, device, save), save
    described = {"name": annotations.name, "images": len(annotations.images), "sha256": annotations.sha256}
    settings = settings | {"size": judge.size, "save": saved, "annotations": described, "subject": subject}
    journal = Journal(Path(folder) / f"{settings['kind']}.jsonl", settings)
    todo = [image for image in wanted if image.name not in journal]
    if advance is not None:
        advance(len(annotations.images) - len(todo))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        with torch.no_grad():
            journal.append(judge.judge(batch, [image.load() for image in batch], rebuild))
        if advance is not None:
            advance(len(batch))
    names = [image.name for image in wanted]
    digest = hashlib.sha256("".join(entry["sha256"] for entry in journal.entries(names)).encode())
    head = settings | {"buckets": buckets.table(), "images": len(wanted), "pixels_sha256": digest.hexdigest()}
    return head, journal, names


def _readings(cache: Path, judged_by: dict[str, str], annotations: Annotations, size: int, save: Save) -> Journal:
    """Where readings of originals are kept: one file per recogniser, annotations and size."""
    settings = {"recognizer": judged_by, "annotations": annotations.sha256, "size": size, "save": save}
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
    return Journal(cache / f"readings-{key}.jsonl", settings)


def _identity(judge: TextRecognizer | FaceEmbedder) -> dict[str, str]:
    return {"id": judge.id, "version": judge.version, "weights_sha256": judge.weights_sha256}


def _reasons(annotations: Annotations, buckets: Buckets, saved: str) -> list[str]:
    """What keeps a result from being comparable, whoever judged."""
    reasons = []
    if not annotations.complete:
        whole = "only a part of TokBench" if annotations.name == "tokbench" else f"{annotations.name} is not TokBench"
        reasons.append(whole)
    if not buckets.official:
        reasons.append("published sizes are 256, 512 and 1024 pixels")
    if saved == "memory":
        reasons.append("published numbers contain the JPEG files of the benchmark's scripts (save='jpeg75-if-jpg')")
    return reasons


def _verdict(reasons: list[str]) -> dict[str, Any]:
    return {"comparable": not reasons, "reason": "; ".join(reasons)}
