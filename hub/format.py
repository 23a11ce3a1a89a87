"""What an exported tokenizer is: a folder of ``config.json``, ``model.safetensors`` and ``README.md``.

``config.json`` is pure data. It says which classes with which constructor arguments the tokenizer is made of (the
``tokenizer`` tree, see :mod:`vistok.layers.configurable`), and repeats in plain numbers what a reader without Vistok
wants to know: image size, streams, codebooks, bits. The weights file carries the same fingerprint as the config, so a
config beside the weights of another export is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch

from .. import __version__
from ..tokenizers.base import Stream, Tokenizer
from ..tokenizers.continuous import GaussianTokenizer

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # of released checkpoints, a .ckpt last
RESIZE = "bicubic antialias, shorter side"
CROPS = ("center", "adm")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the reason."""


def is_own_config(config: Any) -> bool:
    """Whether a parsed ``config.json`` is one of Vistok's exports, of whatever version."""
    return isinstance(config, dict) and "format_version" in config and "tokenizer" in config


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, over the config and every weight of a tokenizer.

    Two tokenizers with equal fingerprints write and read the same tokens. Casting the weights to another dtype changes
    the fingerprint.
    """
    digest = hashlib.sha256(json.dumps(tokenizer.config, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As raw bytes, since numpy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_streams(layout: tuple[Stream, ...]) -> list[dict[str, Any]]:
    """A layout as JSON-able data; :func:`read_streams` is the inverse."""
    return [
        {
            "name": stream.name,
            "length": stream.length,
            "codebook_sizes": list(stream.codebook_sizes),
            "grid": None if stream.grid is None else list(stream.grid),
        }
        for stream in layout
    ]


def read_streams(data: list[dict[str, Any]]) -> tuple[Stream, ...]:
    """The layout that :func:`describe_streams` wrote.

    Raises:
        KeyError, TypeError, ValueError: for data that describes no layout.
    """
    return tuple(
        Stream(
            name=str(item["name"]),
            length=int(item["length"]),
            codebook_sizes=tuple(item["codebook_sizes"]),
            grid=None if item["grid"] is None else tuple(item["grid"]),
        )
        for item in data
    )


def latent_shape(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """``(N, D)`` of an image's latents for a tokenizer that is continuous, ``None`` for one with tokens."""
    if not isinstance(tokenizer, GaussianTokenizer):
        return None
    return tokenizer.encoder.num_tokens(tokenizer.image_size), tokenizer.decoder.in_dim


def describe(tokenizer: Tokenizer, *, crop: str = "center") -> dict[str, Any]:
    """The content of ``config.json``, without metadata.

    Args:
        tokenizer: what is exported.
        crop: how the images that it was trained on were brought to its size, ``"center"`` or ``"adm"``.

    Raises:
        ValueError: for another ``crop``.
    """
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {CROPS}; got {crop!r}")
    layout = tokenizer.layout()
    return {
        "format_version": FORMAT_VERSION,
        "vistok_version": __version__,
        "fingerprint": fingerprint(tokenizer),
        "tokenizer": tokenizer.config,
        "image": {
            "size": list(tokenizer.image_size),
            "stride": tokenizer.stride,
            "any_image_size": tokenizer.any_image_size,
            "channels": 3,
            "range": [0, 1],
            "resize": RESIZE,
            "crop": crop,
        },
        "tokens": {
            "streams": describe_streams(layout),
            "bits": sum(stream.length * stream.bits for stream in layout),
        },
        "latents": latent_shape(tokenizer),
        "takes_context": tokenizer.takes_context,
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
    }


def codebook_text(codebook_sizes: Sequence[int]) -> str:
    """Codebook sizes for people: ``8,192``, ``64 x 4,096``; equal neighbours as a power, ``2^64``."""
    runs = [(size, len(list(run))) for size, run in itertools.groupby(codebook_sizes)]
    return " x ".join(f"{size:,}" if length == 1 else f"{size:,}^{length}" for size, length in runs)
