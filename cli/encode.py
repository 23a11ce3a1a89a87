"""``vistok encode``: images to a token file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .errors import CommandError
from .parser import Size


def encode(
    inputs: list[str],
    *,
    tokenizer: str,
    out: Path,
    batch_size: int = 32,
    device: str = "auto",
    size: Size = None,
    crop: Literal["auto", "center", "adm"] = "auto",
    num_tokens: int = 0,
    num_workers: int = 2,
    overwrite: bool = False,
) -> int:
    """Encode images and write their tokens, names and sizes to one file.

    The file appears when all images are done, whole or not at all. Images that cannot be read are named and skipped.

    Args:
        inputs: Image files, folders (searched to the bottom) or glob patterns.
        tokenizer: Folder, training checkpoint, run folder, repository or published name of the tokenizer.
        out: The token file to write.
        batch_size: Images at a time.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        size: Size to bring the images to, one number or height,width; the tokenizer's own by default.
        crop: How images of another shape are cut: center, adm, or auto for what the tokenizer was trained with.
        num_tokens: Keep only this many tokens of every image; for tokenizers of variable length. 0 keeps all.
        num_workers: Processes that read images; 0 reads in this one.
        overwrite: Replace the file if it exists.

    Returns:
        The number of images that could not be read.

    Raises:
        CommandError: for mistakes in the arguments, before anything is encoded, or if no image could be read.
        OSError: if the file cannot be written.
    """
    import torch

    from ..data.images import IMAGE_SUFFIXES
    from ..hub.token_files import save_tokens
    from ..tokenizers.base import Tokens
    from . import batches
    from .inputs import find_images

    batches.check_counts(batch_size=batch_size, num_workers=num_workers, num_tokens=num_tokens)
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder; give the name of a file, such as {out / 'tokens.safetensors'}")
    batches.refuse_existing([out], overwrite)
    files = find_images(inputs, IMAGE_SUFFIXES)
    batches.prepare_folder(out.parent)
    target = batches.pick_device(device)
    loaded = batches.open_tokenizer(tokenizer, target)
    batches.check_discrete(tokenizer, loaded)
    transform = batches.image_transform(loaded, size, crop)
    if num_tokens:
        available = sum(stream.length for stream in loaded.tokenizer.layout(transform.size))
        batches.check_lengths(tokenizer, loaded, [num_tokens], available)

    parts, names, sizes, skipped = [], [], [], 0
    with batches.progress("encode", len(files)) as advance, torch.inference_mode():
        for batch in batches.read_batches(files, transform, batch_size, num_workers):
            batches.report_failures(batch.failures)
            skipped += len(batch.failures)
            if batch.images is not None:
                tokens = loaded.tokenizer.encode(batches.as_floats(batch.images, target))
                parts.append((tokens.truncate(num_tokens) if num_tokens else tokens).to("cpu"))
                names += [file.name for file in batch.files]
                sizes += batch.sizes
            advance(len(batch))
    batches.report_skipped(skipped, len(files))
    if not parts:
        raise CommandError(f"none of the {len(files)} images could be read; {out} is not written")
    tokens = Tokens.cat(parts)
    save_tokens(
        out,
        tokens,
        names=names,
        sizes=sizes,
        tokenizer_fingerprint=loaded.fingerprint,
        image_size=transform.size,
        metadata={"tokenizer": type(loaded.tokenizer).__name__, "crop": transform.crop},
    )
    length = sum(stream.length for stream in tokens.layout)
    height, width = transform.size
    print(
        f"{out}: {len(tokens)} images of {height}x{width}, {length} tokens each, {tokens.bits:g} bits "
        f"({tokens.bits / (height * width):.4g} per pixel)"
    )
    return skipped
