"""``vistok reconstruct``: images beside what the tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import CommandError
from .parser import Lengths, Size

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokenizers.base import Tokenizer

SHEET = "reconstructions.png"


def reconstruct(
    inputs: list[str],
    *,
    tokenizer: str,
    out: Path,
    batch_size: int = 32,
    device: str = "auto",
    size: Size = None,
    crop: Literal["auto", "center", "adm"] = "auto",
    num_tokens: Lengths = None,
    num_workers: int = 2,
    overwrite: bool = False,
) -> int:
    """Write original and reconstruction side by side, with PSNR and bits per pixel, and print a table.

    One PNG per image, and all together (the first 32) as reconstructions.png. PSNR is over the pixels that the
    tokenizer saw, after resizing and cropping.

    Args:
        inputs: Image files, folders (searched to the bottom) or glob patterns.
        tokenizer: Folder, training checkpoint, run folder, repository or published name of the tokenizer.
        out: The folder to write to.
        batch_size: Images at a time.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        size: Size to bring the images to, one number or height,width; the tokenizer's own by default.
        crop: How images of another shape are cut: center, adm, or auto for what the tokenizer was trained with.
        num_tokens: Decode these numbers of tokens beside one another, such as 1,8,32,256; for tokenizers of variable
            length.
        num_workers: Processes that read images; 0 reads in this one.
        overwrite: Replace pictures that exist.

    Returns:
        The number of images that could not be read.

    Raises:
        CommandError: for mistakes in the arguments, or if no image could be read.
        OSError: if a picture cannot be written.
    """
    import torch

    from ..data.images import IMAGE_SUFFIXES, save_png
    from ..eval.reconstruction import psnr
    from . import batches
    from .inputs import find_images, png_paths
    from .pictures import SHEET_PAIRS, contact_sheet

    batches.check_counts(batch_size=batch_size, num_workers=num_workers)
    files = find_images(inputs, IMAGE_SUFFIXES)
    paths = png_paths([file.name for file in files], out, IMAGE_SUFFIXES, taken=[SHEET])
    batches.refuse_existing([*paths, out / SHEET], overwrite)
    batches.prepare_folder(out)
    target = batches.pick_device(device)
    loaded = batches.open_tokenizer(tokenizer, target)
    batches.check_context(tokenizer, loaded)
    transform = batches.image_transform(loaded, size, crop)
    if num_tokens:
        batches.check_discrete(tokenizer, loaded)
        available = sum(stream.length for stream in loaded.tokenizer.layout(transform.size))
        batches.check_lengths(tokenizer, loaded, num_tokens, available)

    path_of = dict(zip(files, paths, strict=True))
    columns = _columns(loaded.tokenizer, transform.size, num_tokens)
    rows, pictures, skipped = [], [], 0
    with batches.progress("reconstruct", len(files)) as advance, torch.inference_mode():
        for batch in batches.read_batches(files, transform, batch_size, num_workers):
            batches.report_failures(batch.failures)
            skipped += len(batch.failures)
            if batch.images is not None:
                images = batches.as_floats(batch.images, target)
                decoded = _decode(loaded.tokenizer, images, num_tokens)  # one (B, 3, H, W) per column
                values = torch.stack([psnr(part, images) for part in decoded], 1).tolist()  # (B, columns)
                parts = torch.stack([images, *decoded], 1).cpu()  # (B, 1 + columns, 3, H, W)
                for file, part, numbers in zip(batch.files, parts, values, strict=True):
                    picture = _picture(part, columns, numbers)
                    path_of[file].parent.mkdir(parents=True, exist_ok=True)
                    save_png(picture, path_of[file])
                    rows.append((file.name, numbers))
                    if len(pictures) < SHEET_PAIRS:
                        pictures.append(picture)
            advance(len(batch))
    batches.report_skipped(skipped, len(files))
    if not rows:
        raise CommandError(f"none of the {len(files)} images could be read; nothing is written")
    save_png(contact_sheet(pictures, 1 + len(columns)), out / SHEET)
    print(_lengths_table(rows, columns) if num_tokens else _table(rows, columns[0].rate))
    print(f"pictures in {out}, all together in {out / SHEET}")
    return skipped


@dataclass(frozen=True)
class _Column:
    """What is shown of every image: ``length`` tokens (0: all) at ``rate`` bits per pixel (``None``: continuous)."""

    length: int
    rate: float | None

    @property
    def title(self) -> str:
        return f"{self.length} token{'s' if self.length > 1 else ''}"


def _columns(tokenizer: Tokenizer, size: tuple[int, int], lengths: Sequence[int] | None) -> list[_Column]:
    layout = tokenizer.layout(size)
    if not layout:
        return [_Column(0, None)]
    bits = [stream.bits for stream in layout for _ in range(stream.length)]
    pixels = size[0] * size[1]
    return [_Column(length, sum(bits[: length or None]) / pixels) for length in lengths or [0]]


def _decode(tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int] | None) -> list[Tensor]:
    """The images from all their tokens, or from each number of them; encoded once."""
    if not tokenizer.layout():
        return [tokenizer(images).decoded.clamp(0, 1)]
    tokens = tokenizer.encode(images)
    if lengths is None:
        return [tokenizer.decode(tokens)]
    return [tokenizer.decode(tokens.truncate(length)) for length in lengths]


def _picture(parts: Tensor, columns: Sequence[_Column], values: Sequence[float]) -> Tensor:
    """An image and its reconstructions ``(1 + columns, 3, H, W)`` with what they cost and how close they are."""
    from .pictures import pair, row

    if columns[0].length == 0:
        rate = "" if columns[0].rate is None else f"   {columns[0].rate:.4g} bpp"
        return pair(parts[0], parts[1], f"{values[0]:.2f} dB{rate}")
    captions = [
        f"{column.title}\n{value:.2f} dB\n{column.rate:.4g} bpp" for column, value in zip(columns, values, strict=True)
    ]
    return row(list(zip(parts, ["original", *captions], strict=True)))


def _table(rows: list[tuple[str, list[float]]], rate: float | None) -> str:
    """Name, PSNR and rate of every image, and their mean."""
    rows = [*rows, ("mean", _means(rows))]
    width = max(len("image"), *(len(name) for name, _ in rows))
    lines = [f"{'image':<{width}}  PSNR (dB)" + ("" if rate is None else "  bits/pixel")]
    for name, (value,) in rows:
        lines.append(f"{name:<{width}}  {value:9.2f}" + ("" if rate is None else f"  {rate:10.4g}"))
    return "\n".join(lines)


def _lengths_table(rows: list[tuple[str, list[float]]], columns: Sequence[_Column]) -> str:
    """PSNR of every image at every length, their means, and the rates."""
    cells = [("PSNR (dB)", [column.title for column in columns])]
    cells += [(name, [f"{value:.2f}" for value in values]) for name, values in [*rows, ("mean", _means(rows))]]
    cells.append(("bits/pixel", [f"{column.rate:.4g}" for column in columns]))
    first = max(len(name) for name, _ in cells)
    widths = [max(len(texts[i]) for _, texts in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(texts, widths, strict=True))])
        for name, texts in cells
    )


def _means(rows: list[tuple[str, list[float]]]) -> list[float]:
    return [sum(values) / len(rows) for values in zip(*(values for _, values in rows), strict=True)]
