"""Checkpoints that other projects released, read into Vistok's own tokenizers.

There are weights (safetensors, or a pickle that is read without running anything), and a config as the authors wrote
it: ``config.json`` or a YAML file beside the weights, or the catalogue's where the authors give none. The shape of the
config tells the family; a family file maps the published names. Maps are strict in both directions: every published
tensor is used or belongs to training only, and every parameter is filled.

Where an original fixes sizes in its source that neither config nor weights reveal (attention heads, say), they can be
given as overrides, or stand in ``meta.json`` beside the config as ``arch.*`` entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tokenizers.base import Tokenizer
from . import gigatok, maskgit, titok, vqgan
from .catalog import PublishedModel, of_file
from .format import WEIGHT_SUFFIXES
from .pickled import read_pickle, weights_of
from .weights import read_safetensors

State = dict[str, Tensor]
Reader = Callable[[dict[str, Any], Mapping[str, Any], State, dict[str, Any]], tuple[Tokenizer, State]]

CONFIG_FILES = ("config.json", "config.yaml", "model.yaml", "meta.json")
_STANDARD_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.ckpt")


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one code base are read.

    Attributes:
        recognise: whether a config is of this family.
        read: config, ``arch.*`` entries, weights and overrides to a tokenizer and the weights under its names.
        containers: keys under which a pickle holds the weights, the preferred one first.
    """

    recognise: Callable[[dict[str, Any]], bool]
    read: Reader
    containers: tuple[str, ...] = ("state_dict", "model")


FAMILIES: dict[str, Family] = {
    "TiTok": Family(titok.recognise, titok.read),
    "MaskGIT VQGAN": Family(maskgit.recognise, maskgit.read),
    # GigaTok's and LlamaGen's own scripts take the averaged weights where there are any.
    "GigaTok": Family(gigatok.recognise, gigatok.read, ("ema", "model", "state_dict")),
    "LlamaGen VQ": Family(vqgan.recognise_llamagen, vqgan.read_llamagen, ("ema", "model", "state_dict")),
    "taming VQGAN": Family(vqgan.recognise_taming, vqgan.read_taming),
}


def load_published(
    folder: str | Path,
    filename: str | None = None,
    model: PublishedModel | None = None,
    known: PublishedModel | None = None,
    **overrides: Any,
) -> Tokenizer:
    """Read a released checkpoint; returns the tokenizer in eval mode on the CPU.

    Args:
        folder: holds the weights in their published layout, and the config if there is one.
        filename: of the weights; the only ones, or those under a standard name, if ``None``.
        model: an entry of the catalogue, whose config counts instead of one in the folder.
        known: an entry whose config counts if the folder has none of a known family.
        overrides: constructor arguments that the published files do not state.

    Raises:
        ValueError: for a family that is not known, several files of weights, an override that the family does not
            take, or tensors that do not match one to one.
        FileNotFoundError: if the weights are missing.
    """
    folder = Path(folder)
    config, family = (model.config, FAMILIES[model.family]) if model else _find_config(folder, filename, known)
    weights = folder / (filename or choose_weights(_names(folder), str(folder)))
    if not weights.is_file():
        raise FileNotFoundError(f"there is no file {weights}; the folder holds {_names(folder)}")
    state = _read_weights(weights, family)
    try:
        with torch.device("meta"):
            tokenizer, state = family.read(config, _architecture(folder / "meta.json"), state, dict(overrides))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{weights}: config or weights lack what this family has: {error!r}") from error
    _fill(tokenizer, state, weights)
    return tokenizer.eval()


def choose_weights(names: Sequence[str], place: str) -> str:
    """The weights among the files of a folder or repository: a standard name, else the only ones.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if there are several; lists them.
    """
    names = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))
    standard = [name for name in _STANDARD_WEIGHTS if name in names]
    if standard or len(names) == 1:
        return (standard or names)[0]
    if not names:
        raise FileNotFoundError(f"{place} holds no weights; looked for {', '.join(_STANDARD_WEIGHTS)}")
    known = {name: of_file(name) for name in names}
    listed = ", ".join(f"{name} ({model.name})" if model else name for name, model in known.items())
    raise ValueError(f"{place} holds several files of weights, give one of them as filename: {listed}")


def _find_config(folder: Path, filename: str | None, known: PublishedModel | None) -> tuple[dict[str, Any], Family]:
    """The config in the folder if it is of a known family, else the one that the catalogue has for the weights."""
    path = next((folder / name for name in CONFIG_FILES[:3] if (folder / name).is_file()), None)
    config = {} if path is None else _read_config(path)
    family = next((family for family in FAMILIES.values() if family.recognise(config)), None)
    if family is not None:
        return config, family
    if known is not None:
        return known.config, FAMILIES[known.family]
    if path is not None:
        raise ValueError(
            f"{path} is neither a Vistok config nor one of a known family ({', '.join(FAMILIES)}); its keys are "
            f"{sorted(map(str, config))}"
        )
    raise ValueError(
        f"{folder} holds no config of a known family ({' or '.join(CONFIG_FILES[:3])}), and "
        f"{filename or choose_weights(_names(folder), str(folder))} is not a file name that Vistok knows; say which "
        f"model it is, model='titok-l-32' for instance (vistok models lists the names)"
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _fill(tokenizer: Tokenizer, state: State, file: Path) -> None:
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
        raise ValueError(f"{file}: the weights do not match the model: {'; '.join(problems[:10])}{more}")
    tokenizer.load_state_dict(state, strict=True, assign=True)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            config = json.loads(text)
        else:
            import yaml

            config = yaml.safe_load(text)
    except Exception as error:  # yaml has errors of its own
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object of keys and values; got {type(config).__name__}")
    return config


def _architecture(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return {key[5:]: value for key, value in _read_config(path).items() if key.startswith("arch.")}


def _read_weights(path: Path, family: Family) -> State:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    return weights_of(read_pickle(path), family.containers, path)
