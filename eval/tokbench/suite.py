"""TokBench (arXiv:2505.18142) of a tokenizer, as a section of its results: official data or generated pages of text."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ...data.files import cache_folder
from ..variants import Codes
from .annotations import Annotations, read_text, tokbench_faces, tokbench_text
from .benchmark import run_faces, run_text
from .embedder import make_embedder
from .recognizer import make_recognizer
from .synthetic import synthetic_text

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that is not shown."""
    yield lambda images: None


def tokbench(
    codes: Codes | Path,
    size: int,
    folder: Path,
    *,
    data: Path | None = None,
    recognizer: str = "rapidocr",
    recognizer_weights: Path | None = None,
    embedder: str | None = None,
    embedder_weights: Path | None = None,
    pages: int = 24,
    save: str = "memory",
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    subject: str = "",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Text, and faces if there is an embedder.

    Args:
        codes: the tokenizer, or a folder of reconstructions that somebody saved under the names of the images.
        size: side of the square that images are fitted into.
        folder: keeps what was found, so that a run that is killed goes on.
        data: folder of the official benchmark, or a JSON or JSONL file that annotates words in images beside it;
            generated pages of text if ``None``.
        recognizer: what reads words.
        recognizer_weights: see :func:`~.recognizer.make_recognizer`.
        embedder: what compares faces; no faces if ``None``.
        embedder_weights: see :func:`~.embedder.make_embedder`.
        pages: number of generated pages.
        save: ``memory``, or ``jpeg75-if-jpg`` for the lossy files that published numbers contain.
        batch_size: images at a time.
        device: of the tokenizer.
        subject: names the weights of the tokenizer; a run goes on only for the same.
        progress: opens a progress bar.

    Returns:
        ``text`` and perhaps ``faces``, see :func:`~.benchmark.run_text` and :func:`~.benchmark.run_faces`.

    Raises:
        MetricUnavailable: if a package, a program or weights are missing.
        FileNotFoundError: if the data are not where they should be.
        ValueError: for data that cannot be understood, faces without data, or a size without buckets.
    """
    if embedder is not None and (data is None or data.is_file()):
        raise ValueError("faces need data: the folder of the official benchmark, which annotates them")
    reader = make_recognizer(recognizer, recognizer_weights, device=str(device))
    comparer = None if embedder is None else make_embedder(embedder, embedder_weights)
    if data is None:
        words = synthetic_text(pages, size)
    else:
        words = read_text(data) if data.is_file() else tokbench_text(data)
    reconstruct = codes if isinstance(codes, Path) else codes.reconstruct
    common = {"subject": subject, "device": device, "batch_size": batch_size, "save": save}

    with _bar(progress, "TokBench text", words) as advance:
        cache = cache_folder() / "tokbench"
        run = folder / "tokbench" / "text"
        sections = {"text": run_text(reconstruct, words, size, reader, run, cache=cache, advance=advance, **common)}
    if comparer is not None:
        faces = tokbench_faces(data)
        with _bar(progress, "TokBench faces", faces) as advance:
            run = folder / "tokbench" / "faces"
            sections["faces"] = run_faces(reconstruct, faces, size, comparer, run, advance=advance, **common)
    return sections


def forget(folder: Path) -> None:
    """Remove what :func:`tokbench` keeps for a run that is killed, and the folder if nothing else is in it."""
    shutil.rmtree(folder / "tokbench", ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def summary(sections: dict[str, Any]) -> str:
    """The scores as a small table of text; a dash where there was nothing to read or to compare."""
    lines = []
    for kind, part in sections.items():
        rows: dict[str, dict[str, dict[str, float | None]]] = part.get("rows", {})
        for score in dict.fromkeys(score for scores in rows.values() for score in scores):
            title, scale, decimals = _SCORES.get((kind, score), (f"{kind} {score}", 1.0, 3))
            buckets = list(next(iter(rows.values()))[score])
            lines.append(f"{title:<12}" + "".join(f"{bucket:>9}" for bucket in buckets))
            for row, scores in rows.items():
                cells = (scores[score][bucket] for bucket in buckets)
                lines.append(f"  {row:<10}" + "".join(f"{_cell(cell, scale, decimals):>9}" for cell in cells))
        counts = part.get("counts", {})
        if counts:
            lines.append(f"  {'N':<10}" + "".join(f"{count:>9,}" for count in counts.values()))
        if not part.get("comparable", True):
            lines.append(f"not comparable with published numbers: {part['reason']}")
    return "\n".join(lines)


_SCORES = {
    ("text", "accuracy"): ("T-ACC, %", 100.0, 1),
    ("text", "similarity"): ("T-NED, %", 100.0, 1),
    ("faces", "similarity"): ("F-Sim", 1.0, 3),
}


def _cell(value: float | None, scale: float, decimals: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{scale * value:.{decimals}f}"


def _bar(progress: Progress, title: str, annotations: Annotations) -> AbstractContextManager[Callable[[int], None]]:
    return progress(title, len(annotations.images))
