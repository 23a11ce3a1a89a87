"""Fixtures computed with the original implementations, where they are at hand (``VISTOK_PARITY``)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("VISTOK_PARITY", Path(__file__).resolve().parents[3] / "shared" / "parity"))


def fixture(name):
    """``(config, weights, io)`` of one fixture; skips the test, saying why, if the folder is absent."""
    folder = FOLDER / name
    if not folder.is_dir():
        pytest.skip(f"parity fixtures are not here: {folder} (set VISTOK_PARITY)")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else {}
    return config, weights, load_file(folder / "io.safetensors")


def channel_last(x):
    """``(B, C, *S)`` -> ``(B, *S, C)``."""
    return x.movedim(1, -1)


def assert_close(actual, expected, tolerance=1e-5):
    """Within ``tolerance`` of the largest expected value, or of 1 if that is larger."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
