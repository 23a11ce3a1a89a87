"""``vistok convert``: a released checkpoint of another project to a folder of ours."""

from __future__ import annotations

from pathlib import Path


def convert(
    source: str,
    *,
    out: Path,
    filename: str = "",
    model: str = "",
    overwrite: bool = False,
) -> int:
    """Write a released tokenizer as config.json, model.safetensors and a model card, with its origin and licence.

    The folder appears whole or not at all.

    Args:
        source: Published name (vistok models lists them), repository, folder, or a lone file of weights.
        out: The folder to write.
        filename: Of the weights, in a folder or repository that holds several.
        model: Published name of what the weights are, where neither a config nor the file name tells.
        overwrite: Replace an export that is there.

    Returns:
        0.

    Raises:
        CommandError: if there is nothing to convert, or the folder exists.
        OSError: if the weights cannot be fetched or the folder cannot be written.
    """
    from ..hub.load import load_with_source
    from ..hub.save import save
    from .batches import refuse_existing
    from .errors import user_errors

    refuse_existing([out], overwrite)
    with user_errors():
        loaded = load_with_source(source, filename=filename or None, model=model or None)
        folder = save(loaded.tokenizer, out, metadata=loaded.metadata, crop=loaded.crop)
    print(f"{loaded.source} -> {folder}")
    return 0
