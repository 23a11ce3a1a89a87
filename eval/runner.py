"""One pass over a dataset that feeds every metric of every variant, in one process or many, killed and resumed at will.

The images still to do are dealt to the ranks by number, without padding and without dropping any. Every process saves
what its metrics have gathered as a *part*: a file that appears whole or not at all and names the images it covers. A
run that resumes computes the images that no part covers, whatever its number of processes; the last step merges all
parts, so there is one path to the result and nothing to send over a network but a barrier.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.images import ImageError
from ..data.source import ImageSource
from .interrupts import postponed_interrupts
from .metric import EvaluationError, Metric, MetricUnavailable, Originals
from .parts import covered, prepare_parts, read_parts, write_part
from .processes import Processes
from .variants import Variant

_DIGEST = 16  # bytes of the hash of one image
_SAVE_SHARE = 0.05  # of the time, at most, goes into saving parts


@dataclass
class Evaluation:
    """A variant and the metrics that judge it, in the order in which they see a batch."""

    variant: Variant
    metrics: dict[str, Metric]


@dataclass
class Pass:
    """What a pass over the data found.

    Attributes:
        evaluations: with metrics that hold everything, ready to compute.
        index: int64 ``(N,)`` ascending, the images that were evaluated.
        keys: what they are called.
        labels: int64 ``(N,)``, -1 if unknown.
        dataset: hash of their original pixels, whatever their order and names.
        expected: images that should have been evaluated.
        unreadable: why others could not be read, one line each.
        timing: seconds by stage, summed over processes.
        unavailable: metrics that gave up on a batch, and are not among the evaluations -> why.
    """

    evaluations: list[Evaluation]
    index: Tensor
    keys: list[str]
    labels: Tensor
    dataset: str
    expected: int
    unreadable: list[str]
    timing: dict[str, float]
    unavailable: dict[str, str] = field(default_factory=dict)

    def metric(self, variant: str, name: str) -> Metric | None:
        """A metric of a variant, if it took part."""
        for evaluation in self.evaluations:
            if evaluation.variant.name == variant:
                return evaluation.metrics.get(name)
        return None


@dataclass
class _Progress:
    """What one process has done so far."""

    index: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    unavailable: dict[str, dict[str, str]] = field(default_factory=dict)  # variant -> metric -> why
    timing: dict[str, float] = field(default_factory=dict)
    size: list[int] = field(default_factory=list)  # height and width of the images, once there is one

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - start


def run_pass(
    source: ImageSource,
    transform: Callable[[Tensor], Tensor],
    build: Callable[[], list[Evaluation]],
    folder: Path,
    *,
    plan: dict[str, Any],
    chosen: Sequence[int] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    save_seconds: float = 60.0,
    processes: Processes | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Pass | None:
    """Evaluate a dataset.

    Args:
        source: the images.
        transform: uint8 ``(3, H, W)`` of a file to uint8 ``(3, h, w)``, the same size for all.
        build: makes the evaluations, with empty metrics; called once to gather and once to merge.
        folder: where parts are kept; all processes must see it.
        plan: what the parts depend on, as JSON data; a resumed run must have the same.
        chosen: numbers of the images to evaluate; all if ``None``.
        batch_size: images at a time.
        num_workers: processes that read images.
        device: where metrics and variants compute.
        resume: continue with the parts that are there, instead of refusing them.
        save_seconds: how often to save, less often if saving takes long; 0 saves after every batch.
        processes: those that share the work; this one alone if ``None``.
        advance: called with numbers of images done, those of an earlier run first; on rank 0 it speaks for all ranks.

    Returns:
        The merged result on rank 0, ``None`` on other ranks.

    Raises:
        FileExistsError: if there are parts and ``resume`` is off.
        EvaluationError: if the parts are of another plan, or damaged, or do not add up, or images differ in size.
    """
    processes = processes or Processes()
    source.prepare()
    numbers = np.arange(len(source)) if chosen is None else np.unique(np.asarray(chosen, dtype=np.int64))
    parts = folder / "parts"
    if processes.rank == 0:
        prepare_parts(parts, plan, resume)
    processes.barrier()
    earlier = read_parts(parts)
    done = covered(earlier)
    generation = 1 + max((part["generation"] for part in earlier), default=-1)
    remaining = np.setdiff1d(numbers, done)[processes.rank :: processes.world_size]
    if processes.rank == 0:
        advance(len(done))
    processes.barrier()  # nobody writes a part before everybody has read the old ones

    name = f"{generation:04d}-{processes.rank:04d}"
    worker = _Worker(build(), folder, parts / f"{name}.pt", name, generation, torch.device(device))
    loader = DataLoader(
        _Images(source, transform, remaining),
        batch_size,
        num_workers=min(num_workers, max(0, (len(remaining) - 1) // batch_size)),
        collate_fn=list,
        pin_memory=worker.device.type == "cuda",
        generator=torch.Generator(),  # the loader seeds workers from it; the state of everybody's generator stays
    )
    worker.run(loader, save_seconds, lambda images: advance(images * processes.world_size))
    del worker, earlier  # what metrics hold is on disk now, and is about to be held again
    processes.barrier()
    return _merge(build(), folder, numbers) if processes.rank == 0 else None


class _Images(Dataset):
    """Samples by position: read, cropped, and hashed where it is done in parallel."""

    def __init__(self, source: ImageSource, transform: Callable[[Tensor], Tensor], numbers: np.ndarray) -> None:
        self.source, self.transform, self.numbers = source, transform, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Any]:
        number = int(self.numbers[position])
        try:
            sample = self.source.read(number)
        except ImageError as error:
            return {"number": number, "error": str(error)}
        image = self.transform(sample.image).contiguous()
        target = sample.target
        if target is not None and target.shape != image.shape:
            problem = (  # raised by the main process: an error here would come out of a worker with its traceback
                f"{sample.key}: the reconstruction has {target.shape[2]}x{target.shape[1]} pixels, the reference "
                f"{image.shape[2]}x{image.shape[1]}; give --size and --crop that bring references to the size of the "
                f"reconstructions"
            )
            return {"number": number, "problem": problem}
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=_DIGEST).digest()
        return {
            "number": number,
            "image": image,
            "target": target,
            "label": sample.label,
            "key": sample.key.encode(errors="surrogateescape").decode(errors="replace"),  # names may be no UTF-8
            "digest": digest,
        }


class _Worker:
    """The work of one process."""

    def __init__(
        self, evaluations: list[Evaluation], folder: Path, path: Path, name: str, generation: int, device: torch.device
    ) -> None:
        self.evaluations, self.path, self.generation, self.device = evaluations, path, generation, device
        self.progress = _Progress()
        self.torn = False  # some metrics have seen a batch that others have not
        for evaluation in evaluations:
            for metric, folder_of_metric in _metrics(evaluation, folder):
                metric.open(folder_of_metric, name)

    def run(self, loader: DataLoader, save_seconds: float, advance: Callable[[int], None]) -> None:
        last, interval = time.monotonic(), save_seconds
        batches = iter(loader)
        try:
            while True:
                with self.progress.stage("read"):
                    items = next(batches, None)
                if items is None:
                    break
                with postponed_interrupts():
                    self.take(items)
                advance(len(items))
                if time.monotonic() - last > interval:
                    start = time.monotonic()
                    self.save()
                    last = time.monotonic()
                    interval = max(save_seconds, (last - start) / _SAVE_SHARE) if save_seconds else 0.0
            self.save()
        except KeyboardInterrupt:
            if not self.torn:  # else what was saved last is what counts
                self.save()
            raise

    @torch.no_grad()
    def take(self, items: list[dict[str, Any]]) -> None:
        """Evaluate one batch; it counts as done only when every metric has seen it."""
        for item in items:
            if "problem" in item:
                raise EvaluationError(item["problem"])
        self.torn = True
        good = [item for item in items if "error" not in item]
        if good:
            originals = self._originals(good)
            for evaluation in self.evaluations:
                self._judge(evaluation, originals)
        for item in good:
            self.progress.index.append(item["number"])
            self.progress.keys.append(item["key"])
            self.progress.labels.append(item["label"])
            self.progress.digests.append(item["digest"])
        self.progress.unreadable |= {item["number"]: item["error"] for item in items if "error" in item}
        self.torn = False

    def _judge(self, evaluation: Evaluation, originals: Originals) -> None:
        """Let the metrics of a variant see a batch; those that cannot say anything about it are out."""
        with self.progress.stage(f"reconstruct/{evaluation.variant.kind}"):
            pairs = evaluation.variant.reconstruct(originals)
        for name, metric in list(evaluation.metrics.items()):
            try:
                with self.progress.stage(f"metric/{name}"):
                    metric.update(pairs)
            except MetricUnavailable as reason:
                self.progress.unavailable.setdefault(evaluation.variant.name, {})[name] = str(reason)
                del evaluation.metrics[name]

    def _originals(self, good: list[dict[str, Any]]) -> Originals:
        sizes = {tuple(item["image"].shape[1:]) for item in good}
        _check_sizes(sizes | {tuple(self.progress.size)} if self.progress.size else sizes)
        self.progress.size = list(sizes.pop())
        targets = None
        if good[0]["target"] is not None:
            targets = torch.stack([item["target"] for item in good]).to(self.device, non_blocking=True)
        return Originals(
            torch.tensor([item["number"] for item in good]),
            [item["key"] for item in good],
            torch.tensor([item["label"] for item in good]),
            torch.stack([item["image"] for item in good]).to(self.device, non_blocking=True),
            targets,
        )

    def save(self) -> None:
        """Write the part of this process, whole or not at all."""
        progress = self.progress
        if not progress.index and not progress.unreadable:
            return
        part = {
            "generation": self.generation,
            "index": torch.tensor(progress.index, dtype=torch.int64),
            "keys": progress.keys,
            "labels": torch.tensor(progress.labels, dtype=torch.int64),
            "digests": torch.frombuffer(bytearray(b"".join(progress.digests)), dtype=torch.uint8)
            if progress.digests
            else torch.empty(0, dtype=torch.uint8),
            "unreadable": progress.unreadable,
            "unavailable": progress.unavailable,
            "timing": progress.timing,
            "size": progress.size,
            "states": {
                evaluation.variant.name: {name: metric.state_dict() for name, metric in evaluation.metrics.items()}
                for evaluation in self.evaluations
            },
        }
        write_part(self.path, part)


def _metrics(evaluation: Evaluation, folder: Path) -> Iterator[tuple[Metric, Path]]:
    """The metrics of a variant and the folder of each."""
    for name, metric in evaluation.metrics.items():
        yield metric, folder / "rows" / quote(evaluation.variant.name, safe="=,+") / name


def _check_sizes(sizes: set[tuple[int, ...]]) -> None:
    if len(sizes) > 1:
        found = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
        raise EvaluationError(f"images differ in size ({found} pixels); give a crop that brings them to one size")


def _merge(evaluations: list[Evaluation], folder: Path, chosen: np.ndarray) -> Pass:
    """Bring all parts together.

    Raises:
        EvaluationError: if they do not cover every chosen image once, or images differ in size.
    """
    parts = read_parts(folder / "parts")
    _check_cover(covered(parts), chosen, folder)
    _check_sizes({tuple(part["size"]) for part in parts if part["size"]})
    unavailable = _without_unavailable(evaluations, parts)
    for evaluation in evaluations:
        for metric, folder_of_metric in _metrics(evaluation, folder):
            metric.open(folder_of_metric, "merged")
    unreadable: dict[int, str] = {}
    timing: dict[str, float] = {}
    for part in parts:
        unreadable |= part["unreadable"]
        for stage, seconds in part["timing"].items():
            timing[stage] = timing.get(stage, 0.0) + seconds
        for evaluation in evaluations:
            for name, metric in evaluation.metrics.items():
                metric.merge(part["states"][evaluation.variant.name][name])
    numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(part["index"] for part in parts)])
    labels = torch.cat([torch.empty(0, dtype=torch.int64), *(part["labels"] for part in parts)])
    keys = [key for part in parts for key in part["keys"]]
    pixels = sorted(bytes(row) for part in parts for row in part["digests"].view(-1, _DIGEST).numpy())
    order = numbers.argsort()
    return Pass(
        evaluations,
        numbers[order],
        [keys[i] for i in order.tolist()],
        labels[order],
        hashlib.sha256(b"".join(pixels)).hexdigest(),
        len(chosen),
        [unreadable[number] for number in sorted(unreadable)],
        timing,
        unavailable,
    )


def _check_cover(done: np.ndarray, chosen: np.ndarray, folder: Path) -> None:
    if len(np.unique(done)) != len(done):
        raise EvaluationError(f"{folder}: an image was evaluated twice; was a part copied? Begin in another --out")
    if not np.array_equal(np.sort(done), chosen):
        raise EvaluationError(
            f"{folder}: the parts there are of {len(done)} images instead of the {len(chosen)} to evaluate; was one "
            f"removed, or does another evaluation write there? Continue with --resume"
        )


def _without_unavailable(evaluations: list[Evaluation], parts: list[dict[str, Any]]) -> dict[str, str]:
    """Take out the metrics that gave up in any part; returns why."""
    reasons: dict[str, str] = {}
    for part in parts:
        for evaluation in evaluations:
            for name, reason in part["unavailable"].get(evaluation.variant.name, {}).items():
                evaluation.metrics.pop(name, None)
                reasons[name] = reason
    return reasons
