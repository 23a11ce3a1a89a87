"""What the commands share once torch is there: opening tokenizers, choosing a device, reading images in batches."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.images import ImageError, read_image
from ..data.transforms import EvalTransform
from ..hub.load import Loaded, load_with_source
from .errors import CommandError, user_errors
from .inputs import ImageFile


@dataclass
class ImageBatch:
    """Images that were read together, without the ones that could not be.

    Attributes:
        files: of the B images.
        images: uint8 ``(B, 3, H, W)``; ``None`` if B = 0.
        sizes: ``(H, W)`` of the files.
        failures: why the others could not be read, one line each.
    """

    files: list[ImageFile]
    images: Tensor | None
    sizes: list[tuple[int, int]]
    failures: list[str]

    def __len__(self) -> int:
        """Images asked for, read or not."""
        return len(self.files) + len(self.failures)


class _ImageFiles(Dataset):
    def __init__(self, files: Sequence[ImageFile], transform: EvalTransform) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, tuple[int, int], str]:
        try:
            image = read_image(self.files[index].path)
        except ImageError as error:
            return index, None, (0, 0), str(error)
        return index, self.transform(image), (image.shape[1], image.shape[2]), ""


def read_batches(
    files: Sequence[ImageFile], transform: EvalTransform, batch_size: int, num_workers: int
) -> Iterator[ImageBatch]:
    """Read, resize and crop images, in their order; one that cannot be read is reported in its batch and left out.

    Args:
        files: what to read.
        transform: brings every image to one size.
        batch_size: images at a time.
        num_workers: processes that read; no more are started than there are batches.
    """
    loader = DataLoader(
        _ImageFiles(files, transform),
        batch_size,
        num_workers=min(num_workers, (len(files) - 1) // batch_size),
        collate_fn=list,
    )
    for items in loader:
        good = [item for item in items if item[1] is not None]
        yield ImageBatch(
            [files[index] for index, _, _, _ in good],
            torch.stack([image for _, image, _, _ in good]) if good else None,
            [size for _, _, size, _ in good],
            [reason for _, image, _, reason in items if image is None],
        )


def as_floats(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float in [0, 1] on a device."""
    return images.to(device).float() / 255


def open_tokenizer(name: str, device: torch.device) -> Loaded:
    """Load a tokenizer and move it to a device.

    Raises:
        CommandError: if it cannot be loaded.
    """
    with user_errors():
        loaded = load_with_source(name)
    loaded.tokenizer.to(device)
    return loaded


def pick_device(name: str) -> torch.device:
    """The device of that name; for ``"auto"`` the accelerator if there is one.

    Raises:
        CommandError: for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        unknown = "at start of device string" in str(error)  # torch goes on to list twenty kinds
        reason = "there is no such kind of device" if unknown else str(error).split(". ")[0]
        raise CommandError(f"--device {name!r} cannot be used here: {reason}; try auto or cpu") from error
    return device


def image_transform(loaded: Loaded, size: tuple[int, int] | None, crop: str) -> EvalTransform:
    """The transform that brings images to a size the tokenizer takes.

    Args:
        loaded: the tokenizer.
        size: ``(H, W)``; the tokenizer's own if ``None``.
        crop: ``"auto"`` for the crop it was trained with, ``"center"`` or ``"adm"``.

    Raises:
        CommandError: for a size that the tokenizer does not take.
    """
    size = loaded.tokenizer.image_size if size is None else size
    with user_errors():
        loaded.tokenizer.check_images(torch.empty(1, 3, *size, device="meta"))
        return EvalTransform(size, loaded.crop if crop == "auto" else crop)


def check_lengths(name: str, loaded: Loaded, lengths: Sequence[int], available: int) -> None:
    """Raise unless a tokenizer decodes prefixes of these lengths.

    Args:
        name: what the user calls the tokenizer.
        loaded: the tokenizer.
        lengths: numbers of tokens asked for.
        available: number of tokens that there are.
    """
    kind = type(loaded.tokenizer).__name__
    if not loaded.tokenizer.variable_length:
        raise CommandError(
            f"--num-tokens is for tokenizers that are trained on prefixes, such as One-D-Piece; {name} is a {kind} of "
            f"{available} tokens, and decodes no fewer"
        )
    wrong = [length for length in lengths if not 1 <= length <= available]
    if wrong:
        raise CommandError(f"--num-tokens must lie between 1 and {available} here; got {wrong[0]}")


def check_discrete(name: str, loaded: Loaded) -> None:
    """Raise for a tokenizer without tokens."""
    if not loaded.tokenizer.layout():
        raise CommandError(
            f"{name} is a {type(loaded.tokenizer).__name__}, whose latents are continuous: it has no tokens. "
            f"From Python, tokenizer.encode_latents(images) gives the latents"
        )


def check_context(name: str, loaded: Loaded) -> None:
    """Raise for a tokenizer whose decoder needs more than tokens."""
    if loaded.tokenizer.takes_context:
        raise CommandError(
            f"the decoder of {name} reads text features besides tokens, which commands do not make. From Python: "
            f"tokenizer.decode(tokens, context=features)"
        )


def check_counts(**counts: int) -> None:
    """Raise for a ``batch_size`` below 1, or ``num_workers`` or ``num_tokens`` below 0."""
    for name, value in counts.items():
        lowest = 1 if name == "batch_size" else 0
        if value < lowest:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {lowest}; got {value}")


def prepare_folder(folder: Path) -> None:
    """Make an output folder and see that files can be written there, before any work is done.

    Raises:
        CommandError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise CommandError(f"{folder} is a file, not a folder; choose another --out") from error
    except OSError as error:
        raise CommandError(f"cannot write to the folder {folder}: {error.strerror}; choose another --out") from error


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise if an output exists already and may not be overwritten."""
    existing = [] if overwrite else [path for path in paths if path.exists()]
    if existing:
        more = f" (and {len(existing) - 1} more files)" if len(existing) > 1 else ""
        raise CommandError(f"{existing[0]} exists{more}; choose another --out, or give --overwrite")


@contextmanager
def progress(title: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields a function that counts images."""
    console = Console(stderr=True)
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), remaining)
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
        speed_estimate_period=3600,  # a batch of a full evaluation takes minutes; rich looks back 30 seconds
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda images: bar.advance(task, images)


def report_failures(failures: Sequence[str], most: int | None = None) -> None:
    """Name unreadable images on stderr, at ``most`` so many."""
    for failure in failures[:most]:
        print(f"vistok: skipped {failure}", file=sys.stderr)
    if most is not None and len(failures) > most:
        print(f"vistok: skipped {len(failures) - most} more", file=sys.stderr)


def report_skipped(skipped: int, total: int) -> None:
    """Count unreadable images on stderr, at the end."""
    if skipped:
        print(f"vistok: {skipped} of {total} images could not be read", file=sys.stderr)
