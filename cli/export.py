"""``vistok export``: a training run to a folder, and to the Hub."""

from __future__ import annotations

from pathlib import Path


def export(
    run: str,
    *,
    out: Path,
    push: str = "",
    private: bool = False,
    no_ema: bool = False,
) -> int:
    """Write the tokenizer of a training run as config.json, model.safetensors and a model card.

    An earlier export in the same folder is replaced.

    Args:
        run: Run folder (its last checkpoint is taken), a checkpoint, or whatever else can be loaded.
        out: The folder to write to.
        push: Upload to this repository of the Hub too, as organisation/name.
        private: Make the repository private, if the upload makes it.
        no_ema: Take the raw weights instead of their moving average.

    Returns:
        0.

    Raises:
        CommandError: if there is nothing to export, or the folder holds something else.
        OSError: if the folder cannot be written or the upload fails.
    """
    from ..hub.load import load_with_source
    from ..hub.save import push as upload
    from ..hub.save import save
    from .errors import user_errors

    with user_errors():
        loaded = load_with_source(run, ema=not no_ema)
        folder = save(loaded.tokenizer, out, metadata=loaded.metadata, crop=loaded.crop, name=push or None)
    print(f"{loaded.source} -> {folder}")
    if push:
        with user_errors():
            address = upload(loaded.tokenizer, push, private=private, metadata=loaded.metadata, crop=loaded.crop)
        print(address)
    return 0
