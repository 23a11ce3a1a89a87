"""``vistok reconstruct``: images beside what the tokenizer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .errors import CommandError
from .parser import Size

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
    num_workers: int = 2,
    overwrite: bool = False,
) -> int:
    """Write original and reconstruction side by side, with PSNR and bits per pixel, and print a table.

    One PNG per image, and all together (the first 32) as reconstructions.png. PSNR is over the pixels that the
    tokenizer saw, after resizing and cropping.

    Args:
        inputs: Image files, folders (searched to the bottom) or glob patterns.
        tokenizer: Folder, training checkpoint, run folder or repository of the tokenizer.
        out: The folder to write to.
        batch_size: Images at a time.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        size: Size to bring the images to, one number or height,width; the tokenizer's own by default.
        crop: How images of another shape are cut: center, adm, or auto for what the tokenizer was trained with.
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
    from .pictures import SHEET_PAIRS, contact_sheet, pair

    batches.check_counts(batch_size=batch_size, num_workers=num_workers)
    files = find_images(inputs, IMAGE_SUFFIXES)
    paths = png_paths([file.name for file in files], out, IMAGE_SUFFIXES, taken=[SHEET])
    batches.refuse_existing([*paths, out / SHEET], overwrite)
    batches.prepare_folder(out)
    target = batches.pick_device(device)
    loaded = batches.open_tokenizer(tokenizer, target)
    transform = batches.image_transform(loaded, size, crop)

    path_of = dict(zip(files, paths, strict=True))
    rate = batches.bits_per_pixel(loaded.tokenizer, transform.size)
    rows, pairs, skipped = [], [], 0
    with batches.progress("reconstruct", len(files)) as advance, torch.inference_mode():
        for batch in batches.read_batches(files, transform, batch_size, num_workers):
            batches.report_failures(batch.failures)
            skipped += len(batch.failures)
            if batch.images is not None:
                images = batches.as_floats(batch.images, target)
                decoded = loaded.tokenizer.decode(loaded.tokenizer.encode(images))
                values = psnr(decoded, images).tolist()
                for file, original, other, value in zip(batch.files, images.cpu(), decoded.cpu(), values, strict=True):
                    picture = pair(original, other, f"{value:.2f} dB   {rate:.4g} bpp")
                    path_of[file].parent.mkdir(parents=True, exist_ok=True)
                    save_png(picture, path_of[file])
                    rows.append((file.name, value))
                    if len(pairs) < SHEET_PAIRS:
                        pairs.append(picture)
            advance(len(batch))
    batches.report_skipped(skipped, len(files))
    if not rows:
        raise CommandError(f"none of the {len(files)} images could be read; nothing is written")
    save_png(contact_sheet(pairs), out / SHEET)
    _print_table(rows, rate)
    print(f"pictures in {out}, all together in {out / SHEET}")
    return skipped


def _print_table(rows: list[tuple[str, float]], rate: float) -> None:
    """Name, PSNR and rate of every image, and their mean."""
    rows = [*rows, ("mean", sum(value for _, value in rows) / len(rows))]
    width = max(len("image"), *(len(name) for name, _ in rows))
    print(f"{'image':<{width}}  PSNR (dB)  bits/pixel")
    for name, value in rows:
        print(f"{name:<{width}}  {value:9.2f}  {rate:10.4g}")
