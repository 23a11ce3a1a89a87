"""TokBench (arXiv:2505.18142) of a tokenizer, as a section of its results: official data or generated pages of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


def summary(sections: dict[str, Any]) -> str:
    """The scores as a small table of text."""
    lines = []
    for kind, part in sections.items():
        for score in next(iter(part["rows"].values())):
            buckets = list(next(iter(part["rows"].values()))[score])
            lines.append(f"{kind} {score:<12}" + "".join(f"{bucket:>9}" for bucket in buckets))
            for row, scores in part["rows"].items():
                cells = (scores[score][bucket] for bucket in buckets)
                lines.append(f"  {row:<16}" + "".join(f"{cell:9.3f}" for cell in cells))
        if not part["comparable"]:
            lines.append(f"not comparable with published numbers: {part['reason']}")
    return "\n".join(lines)


def _bar(progress: Progress, title: str, annotations: Annotations) -> AbstractContextManager[Callable[[int], None]]:
    return progress(title, len(annotations.images))
