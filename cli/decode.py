"""``vistok decode``: a token file to images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CommandError, user_errors

if TYPE_CHECKING:
    from ..hub.load import Loaded
    from ..hub.token_files import TokenFile


def decode(
    tokens: Path,
    *,
    tokenizer: str,
    out: Path,
    batch_size: int = 32,
    device: str = "auto",
    num_tokens: int = 0,
    original_size: bool = False,
    force: bool = False,
    overwrite: bool = False,
) -> int:
    """Decode a token file to one PNG per image, under the names that the images had.

    Args:
        tokens: The token file.
        tokenizer: Folder, training checkpoint, run folder, repository or published name of the tokenizer that wrote it.
        out: The folder to write to.
        batch_size: Images at a time.
        device: auto (the accelerator if there is one), cpu, cuda, cuda:1 ...
        num_tokens: Decode only this many tokens of every image; for tokenizers of variable length. 0 decodes all.
        original_size: Give every image the resolution of its original. What the crop cut off stays off.
        force: Go on with tokens of another tokenizer, if their layout fits.
        overwrite: Replace images that exist.

    Returns:
        0: there is nothing that could be skipped.

    Raises:
        CommandError: for mistakes in the arguments, tokens of another tokenizer, or names that lead out of the folder.
        OSError: if an image cannot be written.
    """
    import torch

    from ..data.images import IMAGE_SUFFIXES, save_png
    from ..data.transforms import resize
    from ..hub.token_files import load_tokens
    from . import batches
    from .inputs import png_paths

    batches.check_counts(batch_size=batch_size, num_tokens=num_tokens)
    with user_errors():
        file = load_tokens(tokens)
    paths = png_paths(file.names, out, IMAGE_SUFFIXES)
    batches.refuse_existing(paths, overwrite)
    target = batches.pick_device(device)
    loaded = batches.open_tokenizer(tokenizer, target)
    if not force:
        _check_fingerprint(tokens, file, tokenizer, loaded)
    batches.check_discrete(tokenizer, loaded)
    batches.check_context(tokenizer, loaded)
    if num_tokens:
        batches.check_lengths(tokenizer, loaded, [num_tokens], sum(stream.length for stream in file.tokens.layout))
    batches.prepare_folder(out)

    with batches.progress("decode", len(paths)) as advance, torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            rows = slice(start, start + batch_size)
            with user_errors():
                kept = file.tokens[rows].truncate(num_tokens) if num_tokens else file.tokens[rows]
                images = loaded.tokenizer.decode(kept.to(target)).cpu()
            for image, path, original in zip(images, paths[rows], file.original_sizes[rows], strict=True):
                if original_size:
                    image = resize(image, cropped_size(original, (image.shape[1], image.shape[2])))
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(image, path)
            advance(len(images))
    print(f"{out}: {len(paths)} images")
    return 0


def cropped_size(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """``(H, W)`` that a crop of ``size`` had in its original, before that was resized to cover the crop."""
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(1, round(size[0] / scale)), max(1, round(size[1] / scale))


def _check_fingerprint(path: Path, file: TokenFile, name: str, loaded: Loaded) -> None:
    if file.fingerprint != loaded.fingerprint:
        writer = file.metadata.get("tokenizer", "tokenizer")
        raise CommandError(
            f"{path} was written by another tokenizer: a {writer} with fingerprint {file.fingerprint[:16]}, but {name} "
            f"is a {type(loaded.tokenizer).__name__} with fingerprint {loaded.fingerprint[:16]}. Give the one that "
            f"wrote the tokens, or --force to decode them all the same"
        )
