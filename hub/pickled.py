"""Weights out of a pickle, without running anything that the pickle asks for.

Checkpoints of training scripts name classes besides: old Lightning keys the states of callbacks by class, others keep
the parsed command line. torch's safe reader refuses those; a few names that are known and of no use are read as empty
stand-ins, which keep nothing and do nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_INERT = ("pytorch_lightning.", "lightning.", "argparse.Namespace")


class _StandIn:
    """Takes whatever a pickle gives an object, and keeps nothing."""

    def __new__(cls, *arguments: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_pickle(path: Path) -> Any:
    """The content of a file that ``torch.save`` wrote: tensors, plain data, and nothing that runs.

    Raises:
        ValueError: for a file that is damaged or asks for anything else; names the file and the reason.
    """
    try:
        # Mapped, so that optimizer states which nobody uses are not read; the older format cannot be.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_stand_ins(path) if mapped else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch raises its own and pickle's errors, of many kinds, for a file it cannot read
        raise ValueError(f"{path} is not a file of weights, or is damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What was wrong, in one line; torch puts advice to read the file unsafely before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("WeightsUnpickler error") or "Unsupported" in line]
    return (told or [line for line in lines if "weights_only" not in line] or [type(error).__name__])[0]


def weights_of(content: Any, containers: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """The state dict in what a pickle holds: the first container that is there, or the content itself.

    Args:
        content: of the file.
        containers: keys under which a training script may have stored the weights, the preferred one first.
        path: for messages.

    Raises:
        ValueError: if that is not a dict of tensors.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    state = next((content[key] for key in containers if isinstance(content.get(key), dict)), content)
    strange = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange or not state:
        raise ValueError(
            f"{path} holds no weights: {'it is empty' if not state else f'{strange[0]!r} is not a tensor'}; looked for "
            f"a dict of tensors, alone or under {', '.join(containers)}"
        )
    return dict(state)


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Empty classes for the known names in a file; other names stay forbidden."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError):
        return []  # torch.load will say what is wrong
    return [(type(name, (_StandIn,), {}), name) for name in names if name.startswith(_INERT)]
