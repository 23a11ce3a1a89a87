"""An evaluation from images to report: the plan, the pass over the data, and what is written.

:func:`evaluate` writes ``results.json``, ``per_image.parquet`` and ``report.html`` into a folder. Until they are there
the folder holds the parts of the pass, and an interrupted evaluation continues from them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data.source import ImageSource
from .length import adaptive_section
from .metric import EvaluationError, MetricUnavailable, PerImageMetric
from .parts import claimed
from .processes import Processes
from .rate_distortion import rate_distortion
from .report.gallery import Gallery
from .report.page import write_report
from .report.per_image import write_per_image
from .results import Results, VariantResult
from .runner import Evaluation, Pass, run_pass
from .suites import Suite
from .tokens.pfid import pfid_section

UNFINISHED = "unfinished"  # folder of what an interrupted run continues from, below that of the results
KEPT = (UNFINISHED,)  # what may go when an evaluation begins anew
RESULTS, PER_IMAGE, REPORT = "results.json", "per_image.parquet", "report.html"


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what, in words.

    Attributes:
        subject: see :attr:`Results.subject <vistok.eval.results.Results.subject>`.
        data: see :attr:`Results.data <vistok.eval.results.Results.data>`.
        fingerprint: changes with the weights; a resumed run must have the same.
    """

    subject: dict[str, Any]
    data: dict[str, Any]
    fingerprint: str = ""


def evaluate(
    source: ImageSource,
    transform: Callable[[Tensor], Tensor],
    suite: Suite,
    subject: Subject,
    out: Path,
    *,
    num_images: int | None = None,
    sections: Callable[[Pass], tuple[dict[str, Any], dict[str, str]]] | None = None,
    missing: Sequence[str] = (),
    note: str = "",
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    processes: Processes | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Results | None:
    """Evaluate and write what was found.

    Args:
        source: the images, with reconstructions as targets if they were made before.
        transform: brings every image to the size of the protocol.
        suite: what to measure, and how.
        subject: what is evaluated.
        out: folder for the results.
        num_images: evaluate so many, spread evenly over the dataset; all if ``None``.
        sections: makes further sections of the results, and reasons for those that it had to skip, from the pass.
        missing: images that should be there and are not, one line each.
        note: why the result is partial in any case.
        batch_size: images at a time.
        num_workers: processes that read.
        device: to compute on.
        resume: continue what an interrupted run left in ``out``.
        processes: those that share the work.
        advance: called with numbers of images done.

    Returns:
        What was written; ``None`` on ranks other than 0.

    Raises:
        EvaluationError: if the dataset holds fewer than ``num_images``, no image can be read, or ``out`` was begun with
            other settings or is at work for another evaluation.
        FileExistsError: if ``out`` holds an unfinished evaluation and ``resume`` is off.
    """
    source.prepare()
    chosen = choose(len(source), num_images)
    plan = {
        "protocol": vars(suite.protocol),
        "subject": subject.subject.get("name"),
        "weights": subject.fingerprint,
        "data": subject.data.get("name"),
        "manifest": suite.manifest,
        "num_images": len(chosen),
        "of": len(source),
        "suite": suite.plan,
    }
    work, processes = out / UNFINISHED, processes or Processes()
    with claimed(work) if processes.rank == 0 else nullcontext():
        found = run_pass(
            source,
            transform,
            suite.build,
            work,
            plan=plan,
            chosen=chosen,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            resume=resume,
            processes=processes,
            advance=advance,
        )
        if found is None:
            return None
        if not len(found.index):
            raise EvaluationError(f"none of the {len(chosen)} images could be read; the first: {found.unreadable[0]}")
        suite.finish(found)
        results = collect(found, suite, subject, len(source), missing, note)
        if sections is not None:
            made, skipped = sections(found)
            results.sections |= made
            results.skipped |= skipped
        write(results, found, out)
        shutil.rmtree(work, ignore_errors=True)
    return results


def choose(available: int, num_images: int | None) -> np.ndarray:
    """The images to evaluate: all, or ``num_images`` spread evenly over the dataset.

    Raises:
        EvaluationError: if there are not so many, or none at all.
    """
    if not available:
        raise EvaluationError("the dataset is empty: there is no image to evaluate")
    if num_images is None:
        return np.arange(available)
    if not 1 <= num_images <= available:
        raise EvaluationError(
            f"num_images must lie between 1 and {available}, the size of the dataset; got {num_images}"
        )
    return np.arange(num_images) * available // num_images


def manifest(source: ImageSource) -> str:
    """A hash of what a dataset consists of: the paths and sizes of its files, or the shards and their samples.

    Empty for sources that cannot say without reading everything.
    """
    listed = source.manifest()
    return "" if listed is None else hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()


def collect(
    found: Pass,
    suite: Suite,
    subject: Subject,
    available: int,
    missing: Sequence[str] = (),
    note: str = "",
) -> Results:
    """Compute every metric, and the sections that follow from them."""
    skipped = suite.skipped | found.unavailable
    variants = [
        _variant_result(evaluation, skipped)
        for evaluation in found.evaluations
        if evaluation.variant.kind != "originals"
    ]
    protocol = replace(suite.protocol, dataset=found.dataset, num_images=len(found.index))
    data = {**subject.data, "num_images": available}
    results = Results(
        subject.subject,
        data,
        protocol,
        len(found.index),
        found.expected,
        variants,
        skipped=skipped,
        unreadable=[*found.unreadable, *missing],
        partial=_partial(found, available, missing, note),
        timing=found.timing,
        version=__version__,
    )
    if any(variant.kind in ("length", "codec") for variant in variants):
        curves = [variant for variant in variants if variant.kind != "perturbed"]
        results.sections["rate_distortion"] = rate_distortion(curves)
    if any(variant.kind == "perturbed" for variant in variants):
        results.sections["pfid"] = pfid_section(variants, len(found.index))
    tables = _length_tables(found)
    if tables:
        results.sections["adaptive_length"] = adaptive_section(tables)
    return results


def write(results: Results, found: Pass, out: Path) -> None:
    """Write report, per-image table and, last, the results: a folder with ``results.json`` is whole."""
    columns: dict[str, Tensor] = {"label": found.labels}
    for evaluation in found.evaluations:
        if evaluation.variant.kind in ("originals", "perturbed"):
            continue
        prefix = "" if evaluation.variant.kind == "reconstruction" else f"{evaluation.variant.name}/"
        for metric in evaluation.metrics.values():
            if isinstance(metric, PerImageMetric):
                _, values = metric.table()
                columns |= {f"{prefix}{name}": column for name, column in zip(metric.names, values.T, strict=True)}
    out.mkdir(parents=True, exist_ok=True)
    write_per_image(out / PER_IMAGE, found.index, found.keys, columns)
    galleries = {
        evaluation.variant.name: metric
        for evaluation in found.evaluations
        for metric in evaluation.metrics.values()
        if isinstance(metric, Gallery)
    }
    write_report(out / REPORT, results, galleries)
    results.save(out / RESULTS)


def _variant_result(evaluation: Evaluation, skipped: dict[str, str]) -> VariantResult:
    """Compute the metrics of a variant; those that cannot be go to ``skipped`` with their reason."""
    variant = evaluation.variant
    values: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, metric in evaluation.metrics.items():
        try:
            values |= metric.compute()
        except MetricUnavailable as reason:
            skipped.setdefault(name, str(reason))
            continue
        found = metric.details()
        if found:
            details[name] = found
    rate = values.pop("bits_per_pixel", None)
    return VariantResult(variant.name, variant.kind, dict(variant.settings), rate, values, details)


def _partial(found: Pass, available: int, missing: Sequence[str], note: str) -> str:
    """Why a result is not a whole one."""
    reasons = [note] if note else []
    if found.expected < available:
        reasons.append(f"a subset: {found.expected} of {available} images")
    if found.unreadable:
        reasons.append(f"{len(found.unreadable)} of {found.expected} images could not be read")
    if missing:
        reasons.append(f"{len(missing)} image{'s' if len(missing) > 1 else ''} without a partner")
    return "; ".join(reasons)


def _length_tables(found: Pass) -> dict[str, dict[int, Tensor]]:
    """Metric -> length -> value of every image, of the variants that decode prefixes."""
    tables: dict[str, dict[int, Tensor]] = {}
    for evaluation in found.evaluations:
        if evaluation.variant.kind != "length":
            continue
        for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg"):
            metric = evaluation.metrics.get(name)
            if isinstance(metric, PerImageMetric):
                _, values = metric.table()
                tables.setdefault(name, {})[evaluation.variant.settings["num_tokens"]] = values[:, 0]
    return tables
