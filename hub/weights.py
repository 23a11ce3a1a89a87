"""Weights between a module and a file: every tensor once, contiguous, checked against the module by name and shape."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..layers.configurable import Configurable, build
from .format import CheckpointError


def collect_weights(module: Configurable) -> dict[str, Tensor]:
    """The state dict as safetensors wants it: on the CPU, contiguous, every tensor once, each in its own storage."""
    weights, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied: the loader builds the same tie
            continue
        seen.add(id(tensor))
        plain = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        weights[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
    return weights


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. It may be missing, truncated or foreign") from error


def fill_weights(module: Configurable, weights: dict[str, Tensor], file: Path) -> None:
    """Give a module on the meta device its weights, every one of them.

    A tied weight stands in the state dict under several names; its first one is enough, and it stays one object.
    """
    own = module.state_dict(keep_vars=True)
    first_names: dict[int, str] = {}
    for name, tensor in own.items():
        first_names.setdefault(id(tensor), name)
    problems = [f"missing {name}" for name in sorted(set(first_names.values()) - set(weights))]
    problems += [f"unexpected {name}" for name in sorted(set(weights) - set(own))]
    for name in sorted(set(own) & set(weights)):
        found, expected = weights[name], own[name]
        if found.shape != expected.shape:
            problems.append(f"{name} has shape {tuple(found.shape)}, the module needs {tuple(expected.shape)}")
        elif found.is_floating_point() != expected.is_floating_point():
            problems.append(f"{name} is {found.dtype}, the module needs {expected.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{file}: the weights do not fit the config: {'; '.join(problems[:5])}{more}")
    loaded: dict[int, Tensor] = {}
    for key, name in first_names.items():
        tensor, target = weights[name], own[name]
        loaded[key] = nn.Parameter(tensor, target.requires_grad) if isinstance(target, nn.Parameter) else tensor
    module.load_state_dict({name: loaded[id(tensor)] for name, tensor in own.items()}, strict=True, assign=True)
    _fill_constants(module)


def _fill_constants(module: Configurable) -> None:
    """Compute the buffers that no file holds: their constructors ran on the meta device."""
    empty = [name for name, buffer in module.named_buffers(remove_duplicate=False) if buffer.is_meta]
    if not empty:
        return
    with torch.random.fork_rng(devices=[]):
        computed = dict(build(module.config).named_buffers(remove_duplicate=False))
    for name in empty:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, computed[name])
