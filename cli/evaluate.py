"""``vistok evaluate``: measure a tokenizer, or reconstructions that somebody made, and compare results."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import CommandError, Interrupted, user_errors
from .parser import Lengths, Size

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..data.source import ImageSource
    from ..eval.evaluate import Subject
    from ..eval.protocol import Protocol
    from ..eval.runner import Pass
    from ..eval.suites import Settings, Suite
    from ..eval.weights import Weights
    from ..hub.load import Loaded

Preset = Literal["torch-fidelity", "adm", "titok", "pytorch-fid", "clean-fid"]
SuiteName = Literal["quick", "standard", "full"]
Recognizer = Literal["rapidocr", "tesseract", "parseq"]
Embedder = Literal["insightface", "dlib"]

_NAMED = 20  # unreadable images that are named on stderr; the results name all


def evaluate(
    tokenizer: str,
    *,
    data: str,
    out: Path,
    suite: SuiteName = "quick",
    protocol: Preset = "torch-fidelity",
    size: Size = None,
    crop: Literal["auto", "center", "adm"] = "auto",
    num_images: int | None = None,
    num_tokens: Lengths = None,
    weights: Path | None = None,
    no_download: bool = False,
    any_weights: bool = False,
    reference: Path | None = None,
    probe_data: str | None = None,
    raw_weights: bool = False,
    precision: Literal["32", "bf16", "fp16"] = "32",
    batch_size: int = 32,
    num_workers: int = 2,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Measure a tokenizer on a dataset and write results.json, per_image.parquet and report.html.

    To share the work among processes: torchrun --nproc-per-node 8 --no-python vistok evaluate ...

    Args:
        tokenizer: Folder, training checkpoint, run folder, repository or published name of the tokenizer.
        data: Folder of images, or webdataset shards such as val-{000000..000003}.tar.
        out: The folder to write to.
        suite: quick (rFID, PSNR, SSIM, LPIPS, codebook), standard (more metrics, token language, lengths, codecs) or
            full (also pFID, DISTS, DINO and CLIP similarity, synthetic TokBench, a token model).
        protocol: Convention behind rFID and the crop: torch-fidelity, adm, titok, pytorch-fid or clean-fid.
        size: Size to bring the images to, one number or height,width; the tokenizer's own by default.
        crop: How images of another shape are cut: center, adm, or auto for what the protocol says.
        num_images: Evaluate so many, spread evenly over the dataset; the result is marked as partial.
        num_tokens: Decode these numbers of tokens, such as 1,8,32,256; for tokenizers of variable length.
        weights: Folder with the weights of the judging networks; torch's hub cache is looked into as well.
        no_download: Do not fetch missing weights; what needs them is skipped.
        any_weights: Take weights of another hash than the published one; the result says so.
        reference: Statistics file (npz with mu and sigma) to measure rFID against, instead of the images themselves.
        probe_data: Labelled training images for a linear probe, given as the data; there is none without.
        raw_weights: Of a training checkpoint, evaluate the raw weights instead of their moving average.
        precision: Of the tokenizer; bf16 and fp16 run it under autocast.
        batch_size: Images at a time.
        num_workers: Processes that read images; 0 reads in this one.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        seed: Of perturbations and subsets.
        resume: Continue an interrupted evaluation.
        overwrite: Replace results that exist.

    Returns:
        The number of images that could not be read.

    Raises:
        CommandError: for mistakes in the arguments, or a dataset that does not suffice.
        OSError: if the results cannot be written.
    """
    import torch

    from ..eval.sections import TokenizerSections
    from ..eval.suites import tokenizer_suite
    from ..eval.variants import Codes
    from . import batches

    job = _Job(out, batch_size, num_workers, device, resume, overwrite, num_images, reference, seed)
    with user_errors():
        loaded = _load(tokenizer, not raw_weights)
        loaded.tokenizer.to(job.device)
        batches.check_context(tokenizer, loaded)
        plan = _protocol(protocol, crop, size or loaded.tokenizer.image_size)
        transform = batches.image_transform(loaded, size, plan.crop)
        plan = replace(plan, precision=precision, seed=seed, weights="raw" if raw_weights else "released")
        source = _source("--data", data)
        probe = None if probe_data is None else _source("--probe-data", probe_data)
    if num_tokens:
        batches.check_discrete(tokenizer, loaded)
        available = sum(stream.length for stream in loaded.tokenizer.layout(transform.size))
        batches.check_lengths(tokenizer, loaded, num_tokens, available)
    autocast = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    codes = Codes(loaded.tokenizer, plan.rounding, autocast)
    with user_errors():
        settings = job.settings(source, suite, plan, _weights(weights, no_download, any_weights), num_tokens)
        sections = TokenizerSections(
            settings,
            codes,
            source,
            transform,
            out,
            probe_source=probe,
            batch_size=batch_size,
            num_workers=num_workers,
            subject=loaded.fingerprint,
            progress=batches.progress,
        )
        planned = tokenizer_suite(settings, codes)
    subject = _tokenizer_subject(tokenizer, loaded, data, transform.size)
    return job.run(source, transform, planned, subject, sections)


def evaluate_images(
    *,
    rec: str,
    ref: str,
    out: Path,
    name: str | None = None,
    suite: SuiteName = "quick",
    protocol: Preset = "torch-fidelity",
    size: Size = None,
    crop: Literal["none", "center", "adm"] = "none",
    num_images: int | None = None,
    allow_missing: bool = False,
    weights: Path | None = None,
    no_download: bool = False,
    any_weights: bool = False,
    reference: Path | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Measure reconstructions that another project made, by the same code and protocol.

    Args:
        rec: Folder of the reconstructions.
        ref: Folder of the originals; names are the same, up to the suffix.
        out: The folder to write to.
        name: What to call the reconstructions in tables; the name of their folder by default.
        suite: quick, standard or full; see vistok evaluate.
        protocol: Convention behind rFID: torch-fidelity, adm, titok, pytorch-fid or clean-fid.
        size: Size of the reconstructions, to bring the originals to; needed with a crop.
        crop: How originals are brought to that size: none (they have it), center or adm.
        num_images: Evaluate so many, spread evenly over the pairs; the result is marked as partial.
        allow_missing: Evaluate the pairs there are if some images have no partner; the result is marked as partial.
        weights: Folder with the weights of the judging networks; torch's hub cache is looked into as well.
        no_download: Do not fetch missing weights; what needs them is skipped.
        any_weights: Take weights of another hash than the published one; the result says so.
        reference: Statistics file (npz with mu and sigma) to measure rFID against, instead of the images themselves.
        batch_size: Images at a time.
        num_workers: Processes that read images; 0 reads in this one.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        seed: Of subsets.
        resume: Continue an interrupted evaluation.
        overwrite: Replace results that exist.

    Returns:
        The number of images that could not be read.

    Raises:
        CommandError: for mistakes in the arguments, or images that do not pair up.
        OSError: if the results cannot be written.
    """
    from ..data.transforms import EvalTransform
    from ..eval.evaluate import Subject
    from ..eval.given import GivenReconstructions
    from ..eval.suites import images_suite

    job = _Job(out, batch_size, num_workers, device, resume, overwrite, num_images, reference, seed)
    if (crop == "none") != (size is None):
        raise CommandError("--crop and --size go together: originals are brought to the size of the reconstructions")
    with user_errors():
        source = GivenReconstructions(rec, ref, allow_missing)
        source.prepare()
        transform = _unchanged if size is None else EvalTransform(size, crop)
        height, width = _first_size(source) if size is None else size
        plan = _preset(protocol, crop=crop, height=height, width=width, rounding="given", seed=seed)
        settings = job.settings(source, suite, plan, _weights(weights, no_download, any_weights))
        planned = images_suite(settings)
    facts = {"name": name or Path(rec).resolve().name, "kind": "images", "source": rec}
    return job.run(source, transform, planned, Subject(facts, {"name": ref}), None, source.missing)


def evaluate_compare(
    results: list[str],
    *,
    metrics: str | None = None,
    force: bool = False,
    format: Literal["text", "markdown", "csv", "html"] = "text",
    out: Path | None = None,
) -> int:
    """Put results side by side; those of different protocols are refused.

    Args:
        results: The results.json files, or the folders they are in.
        metrics: Which to show, in their order, such as rfid,psnr,lpips_alex; all by default.
        force: Compare results of different protocols all the same; the table says so.
        format: Of the table: text, markdown, csv or html.
        out: Write the table to this file instead of printing it.

    Returns:
        0.

    Raises:
        CommandError: for files that are no results, results that must not be compared, or metrics they do not have.
    """
    from ..data.files import atomic_write
    from ..eval.evaluate import RESULTS
    from ..eval.report.compare import ProtocolMismatch, compare

    paths = [Path(path) / RESULTS if Path(path).is_dir() else Path(path) for path in results]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise CommandError(f"no results at {', '.join(missing)}; vistok evaluate writes them")
    chosen = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    with user_errors():
        try:
            comparison = compare(paths, force=force, metrics=chosen)
        except ProtocolMismatch as error:
            head, *fields, _ = str(error).splitlines()
            differences = "; ".join(field.strip() for field in fields)
            raise CommandError(f"{head} {differences}. Evaluate them in one way, or give --force") from error
    table = getattr(comparison, format)()
    if out is None:
        print(table)
    else:
        with atomic_write(out) as file:
            file.write(table.encode() + b"\n")
    return 0


def evaluate_tokbench(
    tokenizer: str,
    *,
    out: Path,
    data: Path | None = None,
    saved: bool = False,
    size: int | None = None,
    recognizer: Recognizer = "rapidocr",
    recognizer_weights: Path | None = None,
    embedder: Embedder | None = None,
    embedder_weights: Path | None = None,
    pages: int = 24,
    save: Literal["memory", "jpeg75-if-jpg"] = "memory",
    batch_size: int = 8,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Measure how legible text and how recognisable faces are after the tokenizer (TokBench, arXiv:2505.18142).

    A run that was interrupted goes on where it was.

    Args:
        tokenizer: Folder, training checkpoint, run folder, repository or published name of the tokenizer.
        out: The folder to write tokbench.json to.
        data: The TokBench folder (images/ and annotations/), or a JSON or JSONL file that annotates the words of images
            beside it; pages of generated text if there is none.
        saved: TOKENIZER is a folder of reconstructions that somebody saved under the names of the images.
        size: Side of the square that images are fitted into; the tokenizer's own by default.
        recognizer: What reads words: rapidocr, tesseract, or parseq, which published numbers are made with.
        recognizer_weights: docTR's parseq-56125471.pt, for parseq.
        embedder: What compares faces: insightface, which published numbers are made with, or dlib; none by default.
        embedder_weights: Folder of antelopev2, or dlib's file.
        pages: Number of generated pages.
        save: jpeg75-if-jpg passes reconstructions through JPEG where the original is one, as published numbers do.
        batch_size: Images at a time.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        overwrite: Replace results that exist, and begin anew.

    Returns:
        0.

    Raises:
        CommandError: for mistakes in the arguments, or missing packages and weights.
        OSError: if the results cannot be written.
    """
    from ..eval.evaluate import UNFINISHED
    from ..eval.metric import MetricUnavailable
    from ..eval.tokbench.suite import forget, summary, tokbench
    from ..eval.variants import Codes
    from . import batches

    path, work = out / "tokbench.json", out / UNFINISHED
    batches.check_counts(batch_size=batch_size)
    if size is not None and size < 1:
        raise CommandError(f"--size must be at least 1; got {size}")
    batches.refuse_existing([path], overwrite)
    batches.prepare_folder(out)
    target = batches.pick_device(device)
    with user_errors():
        if saved:
            if size is None or data is None:
                raise CommandError("--saved needs --size, of the reconstructions, and --data, what they are of")
            codes, source, subject = Path(tokenizer), tokenizer, str(Path(tokenizer).resolve())
        else:
            loaded = _load(tokenizer, True)
            loaded.tokenizer.to(target)
            batches.check_context(tokenizer, loaded)
            size = size or loaded.tokenizer.image_size[0]
            batches.image_transform(loaded, (size, size), "center")
            codes, source, subject = Codes(loaded.tokenizer), loaded.source, loaded.fingerprint
        if overwrite:
            forget(work)
        try:
            section = tokbench(
                codes,
                size,
                work,
                data=data,
                recognizer=recognizer,
                recognizer_weights=recognizer_weights,
                embedder=embedder,
                embedder_weights=embedder_weights,
                pages=pages,
                save=save,
                batch_size=batch_size,
                device=target,
                subject=subject,
                progress=batches.progress,
            )
        except (MetricUnavailable, FileNotFoundError) as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is done is kept in {out}: give the command again to go on") from None
    _write_json(path, {"subject": {"name": tokenizer, "source": source}, **section})
    forget(work)
    print(summary(section))
    print(f"results in {path}")
    return 0


class _Job:
    """What all evaluations share: the folder, the device, the processes, and what is printed.

    Raises:
        CommandError: for mistakes in the arguments, or results that exist.
    """

    def __init__(
        self,
        out: Path,
        batch_size: int,
        num_workers: int,
        device: str,
        resume: bool,
        overwrite: bool,
        num_images: int | None,
        reference: Path | None,
        seed: int,
    ) -> None:
        from ..eval.evaluate import PER_IMAGE, REPORT, RESULTS
        from ..eval.processes import from_environment
        from . import batches

        batches.check_counts(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if num_images is not None and num_images < 1:
            raise CommandError(f"--num-images must be at least 1; got {num_images}")
        if reference is not None and not reference.is_file():
            raise CommandError(f"--reference: there is no file {str(reference)!r}")
        if resume and overwrite:
            raise CommandError("--resume continues an evaluation and --overwrite begins anew; give one of them")
        self.processes = from_environment()
        if self.processes.rank == 0:
            written = (RESULTS,) if resume else (RESULTS, REPORT, PER_IMAGE)  # the results come last: a kill before
            batches.refuse_existing([out / name for name in written], overwrite)
            batches.prepare_folder(out)
        self.processes.barrier()
        self.out, self.batch_size, self.num_workers = out, batch_size, num_workers
        self.device = batches.pick_device(_device_of_rank(device))
        self.resume, self.overwrite, self.num_images, self.reference = resume, overwrite, num_images, reference

    def settings(
        self,
        source: ImageSource,
        suite: SuiteName,
        plan: Protocol,
        weights: Weights,
        lengths: tuple[int, ...] | None = None,
    ) -> Settings:
        """The suite's settings for the images of a source."""
        from ..eval.evaluate import choose, manifest
        from ..eval.suites import Settings

        source.prepare()
        return Settings(
            suite,
            plan,
            weights,
            self.device,
            choose(len(source), self.num_images),
            manifest(source),
            self.reference,
            lengths,
        )

    def run(
        self,
        source: ImageSource,
        transform: Callable[[Tensor], Tensor],
        suite: Suite,
        subject: Subject,
        sections: Callable[[Pass], tuple[dict[str, Any], dict[str, str]]] | None,
        missing: list[str] | None = None,
    ) -> int:
        """Evaluate, print the numbers; returns the number of images that could not be evaluated."""
        from ..eval.evaluate import choose, evaluate
        from ..eval.metric import EvaluationError
        from . import batches
        from .summary import summary

        total = len(choose(len(source), self.num_images))
        if self.overwrite:
            if self.processes.rank == 0:
                _begin_anew(self.out)
            self.processes.barrier()
        try:
            with _interruptible(), batches.progress("evaluate", total, show=self.processes.rank == 0) as advance:
                results = evaluate(
                    source,
                    transform,
                    suite,
                    subject,
                    self.out,
                    num_images=self.num_images,
                    sections=sections,
                    missing=missing or (),
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    device=self.device,
                    resume=self.resume,
                    processes=self.processes,
                    advance=advance,
                )
        except (EvaluationError, FileExistsError) as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is done is kept in {self.out}: continue with --resume") from None
        if results is None:
            return 0
        batches.report_failures(results.unreadable, most=_NAMED)
        print(summary(results))
        print(f"report in {self.out / 'report.html'}")
        return len(results.unreadable)


def open_source(text: str) -> ImageSource:
    """A folder of images, or webdataset shards, named as on the command line.

    Raises:
        ValueError: for what is neither.
        FileNotFoundError: if it is not there.
    """
    from ..data.folder import ImageFolder
    from ..data.webdataset import WebDataset

    path = Path(text).expanduser()
    source = ImageFolder(text) if path.is_dir() or not (".tar" in text or "://" in text or "::" in text) else None
    source = source or WebDataset(text)
    source.prepare()
    return source


def _source(option: str, text: str) -> ImageSource:
    """The images that an option names; a mistake is told with the option."""
    try:
        return open_source(text)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).removeprefix("root: ").removeprefix("shards: ")
        raise CommandError(f"{option}: {reason}") from error


def _load(tokenizer: str, ema: bool) -> Loaded:
    from ..hub.load import load_with_source

    try:
        return load_with_source(tokenizer, ema=ema)
    except ValueError as error:
        raise CommandError(str(error).replace("ema=False", "--raw-weights")) from error


def _preset(name: str, **changes: Any) -> Protocol:
    from ..eval.protocol import preset

    return preset(name, **changes)


def _protocol(name: str, crop: str, size: tuple[int, int]) -> Protocol:
    """A preset at a size; where nothing else is asked for, shapes that are not square are cut from the centre."""
    plan = _preset(name, height=size[0], width=size[1])
    if crop == "auto":
        crop = plan.crop if size[0] == size[1] else "center"
    return replace(plan, crop=crop)


def _weights(folder: Path | None, no_download: bool, any_weights: bool) -> Weights:
    from ..eval.weights import Weights

    if folder is not None and not folder.is_dir():
        raise CommandError(f"--weights: there is no folder {str(folder)!r}")
    return Weights(folder, download=not no_download, check=not any_weights)


def _tokenizer_subject(name: str, loaded: Loaded, data: str, size: tuple[int, int]) -> Subject:
    from ..eval.evaluate import Subject
    from .info import tokenizer_facts

    facts = tokenizer_facts(loaded)
    layout = loaded.tokenizer.layout(size)
    subject = {
        "name": name,
        "kind": "tokenizer",
        "class": facts["class"].rsplit(".", 1)[-1],
        "source": loaded.source,
        "fingerprint": loaded.fingerprint,
        "parameters": facts["parameters"]["total"],
        "tokens": sum(stream.length for stream in layout),
        "codebooks": {stream.name: list(stream.codebook_sizes) for stream in layout},
        "bits_per_image": sum(stream.length * stream.bits for stream in layout),
    }
    return Subject(subject, {"name": data}, loaded.fingerprint)


def _first_size(source: ImageSource) -> tuple[int, int]:
    """``(H, W)`` of the first image that can be read."""
    from ..data.images import ImageError

    reason = "there are none"
    for index in range(len(source)):
        try:
            image = source.read(index).image
        except ImageError as error:
            reason = str(error)
            continue
        return image.shape[1], image.shape[2]
    raise CommandError(f"no image can be read: {reason}")


def _unchanged(image: Tensor) -> Tensor:
    return image


def _device_of_rank(device: str) -> str:
    """Every process of a machine takes an accelerator of its own unless one is named."""
    import os

    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a polite kill (a scheduler's SIGTERM) end a run as Ctrl-C does: what is done gets saved."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _begin_anew(out: Path) -> None:
    """Remove earlier results and what an unfinished run left, and nothing else.

    Raises:
        CommandError: if another evaluation is at work there.
    """
    import shutil

    from ..eval.evaluate import PER_IMAGE, REPORT, RESULTS, UNFINISHED
    from ..eval.parts import claimed

    with user_errors(), claimed(out / UNFINISHED):
        for name in (RESULTS, REPORT, PER_IMAGE):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    import json

    from ..data.files import atomic_write
    from ..eval.results import finite

    with atomic_write(path) as file:
        file.write(json.dumps(finite(values), indent=1, allow_nan=False).encode() + b"\n")
