"""Tokens of many images in one file, with the images' names and sizes.

The file is safetensors. Per stream it holds ``indices.<stream>`` ``(B, N, G)`` in the smallest integer type that fits,
``-1`` = dropped, and ``mask.<stream>`` bool ``(B, N)`` where the tokens carry a mask; ``names`` are UTF-8 bytes with a
zero byte between two names, ``original_sizes`` is int32 ``(B, 2)``. Names are a tensor because the header of a
safetensors file is limited to 100 MB, which the names of ImageNet come close to. Layout, image size, the tokenizer's
fingerprint and metadata are JSON under the header key ``vistok_tokens``.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..data.files import atomic_file
from ..tokenizers.base import Tokens
from .format import describe_streams, read_streams

FORMAT_VERSION = 1
_KEY = "vistok_tokens"
_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)


class TokenFileError(ValueError):
    """A token file that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class TokenFile:
    """What a token file holds.

    Attributes:
        tokens: of B images.
        names: B different names, ``/`` between folders.
        original_sizes: ``(H, W)`` of the B images as they were before resizing.
        fingerprint: of the tokenizer that wrote the tokens.
        image_size: ``(H, W)`` that the images were brought to.
        metadata: anything else that was stored.
    """

    tokens: Tokens
    names: list[str]
    original_sizes: list[tuple[int, int]]
    fingerprint: str
    image_size: tuple[int, int]
    metadata: dict[str, Any] = field(default_factory=dict)


def save_tokens(
    path: str | Path,
    tokens: Tokens,
    *,
    names: list[str],
    sizes: list[tuple[int, int]],
    tokenizer_fingerprint: str,
    image_size: tuple[int, int],
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write tokens to a file that appears whole or not at all; an existing file is replaced.

    Args:
        path: the file.
        tokens: of B images.
        names: one per image, all different.
        sizes: ``(H, W)`` of the images before they were resized.
        tokenizer_fingerprint: see :func:`vistok.hub.format.fingerprint`.
        image_size: ``(H, W)`` that the tokenizer saw.
        metadata: JSON-able data to keep.

    Returns:
        The file.

    Raises:
        ValueError: for names or sizes that are not one per image, or names that are equal, empty or hold a zero byte.
        TypeError: for metadata that JSON cannot hold.
        OSError: if the file cannot be written; nothing half-written stays behind.
    """
    path = Path(path).expanduser()
    if len(names) != len(tokens) or len(sizes) != len(tokens):
        raise ValueError(
            f"names and sizes must have one entry for each of the {len(tokens)} images; got {len(names)} names and "
            f"{len(sizes)} sizes"
        )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"names must be different; repeated: {repeated[:5]}")
    for name in names:
        if not name or "\0" in name:
            raise ValueError(f"a name must not be empty or hold a zero byte; got {name!r}")
    tokens = tokens.to("cpu").validate()
    header = {
        "format_version": FORMAT_VERSION,
        "vistok_version": __version__,
        "fingerprint": tokenizer_fingerprint,
        "image_size": [int(side) for side in image_size],
        "streams": describe_streams(tokens.layout),
        "metadata": metadata or {},
    }
    arrays = {
        "names": _pack_names(names),
        "original_sizes": torch.tensor(sizes, dtype=torch.int32).reshape(len(names), 2),
    }
    for stream in tokens.layout:
        indices = tokens.indices[stream.name]
        # Copies: safetensors refuses tensors that share memory, and slices of one batch do.
        arrays[f"indices.{stream.name}"] = _copy(indices.to(_smallest_dtype(indices, stream.codebook_sizes)))
        if tokens.mask is not None:
            arrays[f"mask.{stream.name}"] = _copy(tokens.mask[stream.name])
    text = json.dumps(header)
    with atomic_file(path) as partial:
        save_file(arrays, partial, {_KEY: text})
    return path


def load_tokens(path: str | Path) -> TokenFile:
    """Read a file that :func:`save_tokens` wrote.

    Raises:
        FileNotFoundError: if there is none.
        TokenFileError: (a ``ValueError``) if it is damaged, or something else; names the file and the reason.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no token file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()} if text is not None else {}
    except (OSError, SafetensorError) as error:
        raise TokenFileError(f"{path} is not a token file, or is damaged: {error}") from error
    if text is None:
        raise TokenFileError(f"{path} is a safetensors file, but holds no tokens; vistok encode writes token files")
    try:
        header = json.loads(text)
        version = header["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TokenFileError(f"{path}: its header is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise TokenFileError(
            f"{path}: format_version {version!r} is unknown; Vistok {__version__} reads {FORMAT_VERSION}"
        )
    try:
        return _assemble(header, arrays)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TokenFileError(f"{path}: its content does not fit together: {error}") from error


def _assemble(header: dict[str, Any], arrays: dict[str, Tensor]) -> TokenFile:
    """Put a file's content together, and check it."""
    layout = read_streams(header["streams"])
    indices = {}
    for stream in layout:
        stored = arrays[f"indices.{stream.name}"]
        if stored.dtype not in _DTYPES:
            raise TypeError(f"indices of stream {stream.name!r} are {stored.dtype}, not integers")
        indices[stream.name] = stored.to(torch.int64)
    mask = None
    if any(f"mask.{stream.name}" in arrays for stream in layout):
        mask = {stream.name: arrays[f"mask.{stream.name}"] for stream in layout}
    tokens = Tokens(indices, layout, mask).validate()
    names = _unpack_names(arrays["names"])
    sizes = [(int(height), int(width)) for height, width in arrays["original_sizes"].tolist()]
    if len(names) != len(tokens) or len(sizes) != len(tokens):
        raise ValueError(f"{len(names)} names and {len(sizes)} sizes for {len(tokens)} images")
    if len(set(names)) != len(names):
        raise ValueError("names are repeated")
    height, width = header["image_size"]
    fingerprint, metadata = header["fingerprint"], header["metadata"]
    if not isinstance(fingerprint, str) or not isinstance(metadata, dict):
        raise TypeError("fingerprint must be text and metadata an object")
    return TokenFile(tokens, names, sizes, fingerprint, (int(height), int(width)), metadata)


def _smallest_dtype(indices: Tensor, codebook_sizes: tuple[int, ...]) -> torch.dtype:
    """The smallest integer type that holds every code, and -1 where a position is dropped."""
    lowest = -1 if (indices < 0).any() else 0
    highest = max(codebook_sizes) - 1
    return next(dtype for dtype in _DTYPES if torch.iinfo(dtype).min <= lowest and highest <= torch.iinfo(dtype).max)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _pack_names(names: list[str]) -> Tensor:
    # A file name on disk may be bytes that are no UTF-8; "surrogateescape" carries those through.
    data = "\0".join(names).encode("utf-8", "surrogateescape")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _unpack_names(data: Tensor) -> list[str]:
    text = data.numpy().tobytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []
