"""Load a tokenizer: an export, a training checkpoint, a repository of the Hub, or what another project released.

Nothing in a file is executed: weights come from safetensors, or from a pickle that may hold only tensors and plain
data, and the config can name only Vistok's own classes. The tokenizer is built on the meta device, so no time goes into
initialising weights that the file replaces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..data.files import cache_folder
from ..layers.configurable import build
from ..tokenizers.base import Tokenizer
from .catalog import PublishedModel, find, of_file, of_name, of_repository, suggestion
from .fetch import fetch
from .format import (
    CONFIG_FILE,
    CROPS,
    FORMAT_VERSION,
    WEIGHT_SUFFIXES,
    WEIGHTS_FILE,
    CheckpointError,
    fingerprint,
    is_own_config,
)
from .repository import Repository, is_repo_id
from .weights import fill_weights, read_safetensors


@dataclass(frozen=True)
class Loaded:
    """A tokenizer and what is known about it.

    Attributes:
        tokenizer: in eval mode.
        source: where it came from, for people.
        fingerprint: recorded at export, or computed where there is no export.
        crop: how images were brought to its size in training, ``"center"`` or ``"adm"``.
        metadata: what was stored at export; the training step and the choice of weights for a training checkpoint.
    """

    tokenizer: Tokenizer
    source: str
    fingerprint: str
    crop: str = "center"
    metadata: dict[str, Any] = field(default_factory=dict)


def load(
    path_or_repo_id: str | Path,
    *,
    filename: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ema: bool = True,
    **overrides: Any,
) -> Tokenizer:
    """Load a tokenizer in eval mode.

    Args:
        path_or_repo_id: a folder that :func:`vistok.save` wrote; a ``.ckpt`` of a training run, or the folder of the
            run (its last checkpoint is taken); the name of a published model (``vistok models`` lists them); a
            repository ``"organisation/name"`` of the Hub; or a folder, repository or lone file with a released
            checkpoint of a known family.
        filename: of the weights, in a folder or repository that holds several.
        model: name of the published model that the weights are of, where neither a config nor the file name tells.
        revision: branch, tag or commit of the repository.
        token: access token for the Hub; the one that is logged in if ``None``.
        cache_dir: where downloads are kept; the Hub's own cache (and Vistok's, for other addresses) if ``None``.
        local_files_only: take downloads from the cache and never ask the network; ``HF_HUB_OFFLINE=1`` likewise.
        device: where the tokenizer goes.
        dtype: what floating-point weights are cast to; as stored if ``None``.
        ema: take the averaged weights of a training checkpoint that holds them.
        overrides: constructor arguments that a released checkpoint of another project does not state.

    Returns:
        The tokenizer; its parameters can be trained further.

    Raises:
        FileNotFoundError: if there is nothing to load under that name.
        CheckpointError: (a ``ValueError``) if what is there cannot be loaded; names the file and the reason.
        ValueError: for ``overrides``, ``filename``, ``model`` or ``ema=False`` where they mean nothing.
    """
    loaded = load_with_source(
        path_or_repo_id,
        filename=filename,
        model=model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        ema=ema,
        **overrides,
    )
    return loaded.tokenizer.to(device=device, dtype=dtype)


def load_with_source(
    path_or_repo_id: str | Path,
    *,
    filename: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    ema: bool = True,
    **overrides: Any,
) -> Loaded:
    """:func:`load`, on the CPU, with what is known about the tokenizer besides."""
    given = None if model is None else find(model)
    path, entry, origin = Path(path_or_repo_id).expanduser(), None, ""
    if not path.exists():
        path, filename, entry, origin = _download(
            str(path_or_repo_id), filename, revision, token, cache_dir, local_files_only
        )
    elif path.is_file():
        if filename is not None:
            raise ValueError(f"filename chooses in a folder or repository, but {path} is a file; leave it out")
        if given is None and of_file(path.name) is None and path.suffix not in WEIGHT_SUFFIXES[:-1]:
            # A lone .ckpt is one of ours unless its name is known.
            return _load_training_checkpoint(_without(path, overrides), ema)
        path, filename = path.parent, path.name
    released = given or entry or filename
    checkpoint = None if released else _last_checkpoint(path)
    if checkpoint is not None:
        return _load_training_checkpoint(_without(checkpoint, overrides), ema)
    if not ema:
        raise ValueError(f"ema=False is for training checkpoints; {path_or_repo_id} holds one set of weights")
    config = None if given else _read_config(path / CONFIG_FILE)
    if config is None and not released and not any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir()):
        raise CheckpointError(f"{path} is no checkpoint: it holds neither {CONFIG_FILE} nor checkpoints/*.ckpt")
    if is_own_config(config) and filename in (None, WEIGHTS_FILE):
        return _load_export(_without(path, overrides), config, origin or f"folder {path}")
    from .published import load_published

    entry = entry or (of_file(filename) if filename else None)
    try:
        tokenizer = load_published(path, filename, given, entry, **overrides)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    entry, place = given or entry, path / filename if filename else f"folder {path}"
    return Loaded(
        tokenizer,
        f"released checkpoint, {origin or place}",
        fingerprint(tokenizer),
        crop=entry.crop if entry else "center",
        metadata=entry.metadata if entry else {},
    )


def _without(path: Path, overrides: dict[str, Any]) -> Path:
    """The path, of something that says itself how it is built: overrides are refused."""
    if overrides:
        raise ValueError(
            f"{path} says itself how its tokenizer is built; arguments such as {sorted(overrides)} are only for "
            f"released checkpoints of other projects"
        )
    return path


def _read_config(path: Path) -> Any:
    """The parsed ``config.json``; ``None`` if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a text file: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def _load_export(folder: Path, config: dict[str, Any], source: str) -> Loaded:
    """Load a folder that :func:`vistok.save` wrote."""
    file = folder / CONFIG_FILE
    _check_version(config["format_version"], file)
    tokenizer = _build(config["tokenizer"], file)
    weights, note = read_safetensors(folder / WEIGHTS_FILE)
    recorded = config.get("fingerprint")
    if not isinstance(recorded, str) or note.get("fingerprint") != recorded:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} belong to different exports (fingerprints {recorded!r} and "
            f"{note.get('fingerprint')!r})"
        )
    fill_weights(tokenizer, weights, folder / WEIGHTS_FILE)
    image, metadata = config.get("image"), config.get("metadata")
    crop = image.get("crop") if isinstance(image, dict) else None
    return Loaded(
        tokenizer.eval(),
        source,
        recorded,
        crop if crop in CROPS else "center",
        metadata if isinstance(metadata, dict) else {},
    )


def _load_training_checkpoint(path: Path, ema: bool) -> Loaded:
    """Load the tokenizer out of a ``.ckpt`` that training wrote."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch raises its own and pickle's errors, of many kinds, for a file it cannot read
        raise CheckpointError(
            f"{path} is not a training checkpoint, or is damaged: {_first_line(error)}. Accepted: a folder written by "
            f"vistok.save, a .ckpt of a training run, a run folder, or a repository id"
        ) from error
    entry = checkpoint.get("vistok") if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is not a checkpoint of a Vistok training run (it has no 'vistok' entry). If another project "
            f"released it, say which model it is: model='taming-f16-1024', for instance"
        )
    _check_version(entry.get("format_version"), path)
    try:
        tree = json.loads(entry["tokenizer"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its 'tokenizer' entry is not the JSON of a config: {error}") from error
    tokenizer = _build(tree, path)
    state = checkpoint["state_dict"]
    averaged = ema and any(str(name).startswith("ema_tokenizer.") for name in state)
    prefix = "ema_tokenizer." if averaged else "tokenizer."
    # Copied, because training may write over the file that the mapped tensors lie in.
    weights = {
        name[len(prefix) :]: tensor.clone()
        for name, tensor in state.items()
        if isinstance(name, str) and name.startswith(prefix) and isinstance(tensor, Tensor)
    }
    fill_weights(tokenizer, weights, path)
    step = entry.get("global_step")
    kind = "averaged (EMA) weights" if averaged else "raw weights"
    return Loaded(
        tokenizer.eval(),
        f"training checkpoint {path}, step {step}, {kind}",
        fingerprint(tokenizer),
        metadata={"training_step": step, "weights": "ema" if averaged else "raw"},
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """``last.ckpt`` of a run folder (or of its checkpoints folder), else the newest; ``None`` if there is none."""
    places = [folder / "checkpoints"]
    # Beside a config of another project, a .ckpt is a released checkpoint. (A config.yaml may be that of a run.)
    if not any((folder / name).exists() for name in (CONFIG_FILE, "model.yaml")):
        places.append(folder)
    for place in places:
        found = [file for file in place.glob("*.ckpt") if file.is_file()]
        if found:
            last = place / "last.ckpt"
            return last if last in found else max(found, key=lambda file: (file.stat().st_mtime_ns, file.name))
    return None


def _check_version(version: Any, file: Path) -> None:
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version {version!r} is unknown; Vistok {__version__} reads {FORMAT_VERSION}. "
            f"A newer Vistok may have written it"
        )


def _build(tree: Any, file: Path) -> Tokenizer:
    """The tokenizer that a config describes, on the meta device."""
    try:
        with torch.device("meta"):
            tokenizer = build(tree)
    except Exception as error:  # a hostile or foreign config can make a constructor fail in any way
        raise CheckpointError(f"{file}: the tokenizer that it describes cannot be built: {error}") from error
    if not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(f"{file} describes a {type(tokenizer).__name__}, which is not a tokenizer")
    return tokenizer


def _download(
    name: str,
    filename: str | None,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> tuple[Path, str | None, PublishedModel | None, str]:
    """The local folder of a published model or repository, the weights in it, its entry, and where it came from."""
    entry = of_name(name)
    if entry is not None:
        if filename is not None:
            raise ValueError(f"filename chooses in a folder or repository, but {name} is one model; leave it out")
        if entry.is_address:
            path = Path(cache_dir or cache_folder() / "downloads").expanduser() / entry.files[0]
            if entry.by_hand and not path.is_file():
                raise FileNotFoundError(
                    f"{name} has to be fetched by hand: get {entry.files[0]} from {entry.source} in a browser, and "
                    f"load its path or put it at {path}"
                )
            path = fetch(entry.source, path, sha256=entry.sha256, local_files_only=local_files_only)
            return path.parent, path.name, entry, f"{entry.source} as {path}"
        name, filename = entry.source, entry.filename
    elif not is_repo_id(name):
        raise FileNotFoundError(
            f"nothing to load at {name!r}{suggestion(name)}: accepted are a folder written by vistok.save, a .ckpt of "
            f"a training run, the folder of a run, the name of a published model (vistok models lists them), or a "
            f"repository 'organisation/name' of the Hub"
        )
    entry = entry or of_repository(name, filename)
    folder = Repository(name, revision, token, cache_dir, local_files_only).fetch(filename)
    return folder, filename, entry, f"repository {name} at {folder.name}"


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
