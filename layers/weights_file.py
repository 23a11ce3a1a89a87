"""Reading a file of weights that a user names, without running anything that stands in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def read_weights_file(path: str | Path, remedy: str) -> dict[str, Tensor]:
    """A state dict out of safetensors, or out of a pickle that holds nothing but tensors and plain data.

    Args:
        path: the file.
        remedy: what to do about a file that is missing or wrong; ends every message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; {remedy}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise errors of many kinds for a file they cannot read
        raise ValueError(f"{file} is not a readable weights file ({error}); {remedy}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, not a dict of weights; {remedy}")
    return state
