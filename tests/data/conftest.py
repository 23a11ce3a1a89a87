"""Small pictures and shards that the tests of the data room make for themselves."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """``picture(seed, (h, w), format)``: the bytes of a smooth random colour picture."""

    def make(seed: int = 0, size: tuple[int, int] = (24, 32), format: str = "JPEG") -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        smooth.save(buffer, format)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_tar() -> Callable[[Path, list[tuple[str, bytes]]], Path]:
    """``make_tar(path, [(name, bytes), ...])``: a tar file with these members, in this order."""

    def make(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        return path

    return make


@pytest.fixture(scope="session")
def make_shards(picture, make_tar) -> Callable[[Path, list[int]], str]:
    """``make_shards(folder, [5, 2, ...])``: one shard per number, with so many labelled samples; returns the pattern.

    Sample ``j`` of shard ``i`` is called ``s<i>-<j>`` and has label ``i``.
    """
    pictures = [picture(seed) for seed in range(8)]

    def make(folder: Path, counts: list[int]) -> str:
        for i, count in enumerate(counts):
            members = []
            for j in range(count):
                members += [(f"s{i}-{j}.cls", str(i).encode()), (f"s{i}-{j}.jpg", pictures[(i + j) % 8])]
            make_tar(folder / f"shard-{i:03d}.tar", members)
        last = len(counts) - 1
        return f"{folder}/shard-{{000..{last:03d}}}.tar" if last else f"{folder}/shard-000.tar"

    return make
