"""Write a tokenizer as ``config.json``, ``model.safetensors`` and a model card, to a folder or to the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..data.files import atomic_folder
from ..layers.configurable import resolve_class
from ..tokenizers.base import Tokenizer
from .card import model_card
from .format import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, describe, is_own_config
from .weights import collect_weights


def save(
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    metadata: dict[str, Any] | None = None,
    crop: str = "center",
    name: str | None = None,
) -> Path:
    """Write a tokenizer to a folder that :func:`vistok.load` reads.

    The folder appears whole or not at all. An earlier export at the same place is replaced.

    Args:
        tokenizer: what to write; its mode and device do not matter.
        path: the folder. It must not exist, be empty, or hold an export of Vistok and nothing else.
        metadata: JSON-able data kept in ``config.json``. The card shows ``license``, ``datasets``, ``base_model``,
            ``language``, ``tags`` and ``metrics`` (name to value).
        crop: how images were brought to the tokenizer's size in training, ``"center"`` or ``"adm"``.
        name: what the card tells a reader to load; the folder's name if ``None``.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``path`` holds anything other than an export.
        OSError: if it cannot be written; nothing half-written stays behind.
        TypeError: for metadata that JSON cannot hold.
        ValueError: for a tokenizer with parts from outside Vistok (it could not be loaded again), or an unknown
            ``crop``.
    """
    path = Path(path).expanduser().resolve()  # a link stays a link: what it points to is replaced
    _check_components(tokenizer.config)
    _check_target(path)
    metadata = dict(metadata or {})
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be plain JSON data (and finite numbers): {error}; got {metadata!r}") from error
    config = {**describe(tokenizer, crop=crop), "metadata": metadata}
    with atomic_folder(path) as folder:
        save_file(
            collect_weights(tokenizer), folder / WEIGHTS_FILE, {"format": "pt", "fingerprint": config["fingerprint"]}
        )
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(model_card(config, name or path.name), encoding="utf-8")
    return path


def push(
    tokenizer: Tokenizer,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload tokenizer",
    endpoint: str | None = None,
    metadata: dict[str, Any] | None = None,
    crop: str = "center",
) -> str:
    """Upload a tokenizer to a model repository of the Hugging Face Hub, made if it does not exist.

    Args:
        tokenizer: what to upload.
        repo_id: ``"organisation/name"``.
        private: make a new repository private.
        token: access token; the one that is logged in if ``None``.
        revision: branch to write to, made if it does not exist; the main branch if ``None``.
        commit_message: first line of the commit.
        endpoint: address of another hub; ``HF_ENDPOINT`` or the public one if ``None``.
        metadata: see :func:`save`.
        crop: see :func:`save`.

    Returns:
        The address of the commit.

    Raises:
        OSError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(tokenizer, Path(temporary) / "export", metadata=metadata, crop=crop, name=repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url


def _check_components(config: Any) -> None:
    """Refuse, before anything is written, a config that :func:`vistok.load` would refuse."""
    if isinstance(config, list):
        for item in config:
            _check_components(item)
    elif isinstance(config, dict):
        if "class_path" in config:
            resolve_class(config["class_path"])
        for item in config.values():
            _check_components(item)


def _check_target(path: Path) -> None:
    """Raise if ``path`` holds something that a save must not replace."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"cannot save to {path}: it is a file; give a new folder or an earlier export")
    names = {file.name for file in path.iterdir()}
    if not names:
        return
    others = sorted(names - {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE})
    if not others and CONFIG_FILE in names:
        try:
            if is_own_config(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))):
                return
        except ValueError:
            pass  # not JSON, so not an export
    shown = ", ".join((others or sorted(names))[:5])
    raise FileExistsError(
        f"cannot save to {path}: it holds something other than an export of Vistok ({shown}); give a new folder, or "
        f"an earlier export to replace"
    )
