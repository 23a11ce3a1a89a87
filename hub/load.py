"""Load a tokenizer: an export, a training checkpoint, a repository of the Hub, or what another project released.

Nothing in a file is executed: weights come from safetensors, or from a pickle that may hold only tensors and plain
data, and the config can name only Vistok's own classes. The tokenizer is built on the meta device, so no time goes into
initialising weights that the file replaces.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..layers.configurable import build
from ..tokenizers.base import Tokenizer
from .format import CONFIG_FILE, CROPS, FORMAT_VERSION, WEIGHTS_FILE, CheckpointError, fingerprint, is_own_config
from .weights import fill_weights, read_safetensors

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Everything that a released checkpoint may consist of; an export of ours needs only its two files.
_PUBLISHED_PATTERNS = ["*.json", "*.yaml", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"]


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
            run (its last checkpoint is taken); a repository ``"organisation/name"`` of the Hub; or a folder or
            repository with a released checkpoint of a known family.
        revision: branch, tag or commit of the repository.
        token: access token for the Hub; the one that is logged in if ``None``.
        cache_dir: where downloads are kept; the Hub's own cache if ``None``.
        local_files_only: take the repository from the cache and never ask the network.
        device: where the tokenizer goes.
        dtype: what floating-point weights are cast to; as stored if ``None``.
        ema: take the averaged weights of a training checkpoint that holds them.
        overrides: constructor arguments that a released checkpoint of another project does not state.

    Returns:
        The tokenizer; its parameters can be trained further.

    Raises:
        FileNotFoundError: if there is nothing to load under that name.
        CheckpointError: (a ``ValueError``) if what is there cannot be loaded; names the file and the reason.
        ValueError: for ``overrides`` or ``ema=False`` where they mean nothing.
    """
    loaded = load_with_source(
        path_or_repo_id,
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
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    ema: bool = True,
    **overrides: Any,
) -> Loaded:
    """:func:`load`, on the CPU, with what is known about the tokenizer besides."""
    path, origin = Path(path_or_repo_id).expanduser(), ""
    if not path.exists():
        path, origin = _download(str(path_or_repo_id), revision, token, cache_dir, local_files_only)
    checkpoint = path if path.is_file() else _last_checkpoint(path)
    if checkpoint is not None:
        if overrides:
            raise _refused_overrides(checkpoint, overrides)
        return _load_training_checkpoint(checkpoint, ema)
    if not ema:
        raise ValueError(f"ema=False is for training checkpoints; {path_or_repo_id} holds one set of weights")
    config = _read_config(path / CONFIG_FILE)
    if is_own_config(config):
        if overrides:
            raise _refused_overrides(path, overrides)
        return _load_export(path, config, origin or f"folder {path}")
    from .published import load_published

    try:
        tokenizer = load_published(path, **overrides)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return Loaded(tokenizer, f"released checkpoint, {origin or f'folder {path}'}", fingerprint(tokenizer))


def _refused_overrides(path: Path, overrides: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{path} says itself how its tokenizer is built; arguments such as {sorted(overrides)} are only for released "
        f"checkpoints of other projects"
    )


def _read_config(path: Path) -> Any:
    """The parsed ``config.json``."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is no checkpoint: it holds neither {CONFIG_FILE} nor checkpoints/*.ckpt"
        ) from error
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
        raise CheckpointError(f"{path} is not a checkpoint of a Vistok training run (it has no 'vistok' entry)")
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
    if not (folder / CONFIG_FILE).exists():  # beside a config.json, a .ckpt belongs to a released checkpoint
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
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> tuple[Path, str]:
    """The local folder of a repository, and its name with the commit."""
    if not _REPO_ID.fullmatch(name):
        raise FileNotFoundError(
            f"nothing to load at {name!r}: accepted are a folder written by vistok.save, a .ckpt of a training run, "
            f"the folder of a run, or a repository 'organisation/name' of the Hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetch(patterns: list[str]) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
        return Path(folder)

    try:
        folder = fetch([CONFIG_FILE])
        own = (folder / CONFIG_FILE).is_file() and is_own_config(_read_config(folder / CONFIG_FILE))
        folder = fetch([CONFIG_FILE, WEIGHTS_FILE] if own else _PUBLISHED_PATTERNS)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {name!r}, and the repository of that name cannot be fetched: {_first_line(error)}"
        ) from error
    return folder, f"repository {name} at {folder.name}"


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
