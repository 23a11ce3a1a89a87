"""Checkpoints that other projects released, read into Vistok's own tokenizers.

A folder holds ``config.json`` as its authors wrote it and the weights (``model.safetensors``, or a pickle that is read
with ``weights_only=True``). The shape of the config tells the family; a family file maps the published names. Maps are
strict in both directions: every published tensor is used or belongs to training only, and every parameter is filled.

Where an original fixes sizes in its source that neither config nor weights reveal (attention heads, say), they can be
given as overrides, or stand in ``meta.json`` beside the config as ``arch.*`` entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tokenizers.base import Tokenizer
from . import titok, vqgan

State = dict[str, Tensor]
Family = Callable[[dict[str, Any], Mapping[str, Any], State, dict[str, Any]], tuple[Tokenizer, State]]

_FAMILIES: dict[str, tuple[Callable[[dict[str, Any]], bool], Family]] = {
    "TiTok": (titok.recognise, titok.read),
    "LlamaGen VQ": (vqgan.recognise_llamagen, vqgan.read_llamagen),
    "taming VQGAN": (vqgan.recognise_taming, vqgan.read_taming),
}
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt")


def load_published(folder: str | Path, **overrides: Any) -> Tokenizer:
    """Read a released checkpoint; returns the tokenizer in eval mode on the CPU.

    Args:
        folder: holds ``config.json`` and the weights in their published layout.
        overrides: constructor arguments that the published files do not state.

    Raises:
        ValueError: for a family that is not known, an override that the family does not take, or tensors that do not
            match one to one.
        FileNotFoundError: if the weights are missing.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    architecture = _architecture(folder / "meta.json")
    read = next((read for recognise, read in _FAMILIES.values() if recognise(config)), None)
    if read is None:
        raise ValueError(
            f"{folder / 'config.json'} is neither a Vistok config nor one of a known family "
            f"({', '.join(_FAMILIES)}); its keys are {sorted(config)}"
        )
    with torch.device("meta"):
        tokenizer, state = read(config, architecture, _read_weights(folder), dict(overrides))
    _fill(tokenizer, state, folder)
    tokenizer.after_load()
    return tokenizer.eval()


def _fill(tokenizer: Tokenizer, state: State, folder: Path) -> None:
    own = tokenizer.state_dict()
    problems = [f"not used: {name}" for name in sorted(set(state) - set(own))]
    problems += [f"missing: {name}" for name in sorted(set(own) - set(state))]
    problems += [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in sorted(set(own) & set(state))
        if own[name].shape != state[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise ValueError(f"{folder}: the weights do not match the model: {'; '.join(problems[:10])}{more}")
    tokenizer.load_state_dict(state, strict=True, assign=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def _architecture(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return {key[5:]: value for key, value in _read_json(path).items() if key.startswith("arch.")}


def _read_weights(folder: Path) -> State:
    for name in _WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state.get("state_dict", state.get("model", state)))
    raise FileNotFoundError(f"{folder} holds no weights; looked for {', '.join(_WEIGHT_FILES)}")
