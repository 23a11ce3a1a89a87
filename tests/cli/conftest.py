"""Photographs and tokenizers that the commands work on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.quantizers.vq import VectorQuantizer
from vistok.tokenizers.titok import TiTok
from vistok.tokenizers.vqgan import VQGAN


def smooth_picture(seed: int, height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports ``titok`` and ``other`` (32x32, 6 tokens) and ``vqgan`` (any size divisible by 2)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    with torch.random.fork_rng():
        for seed, name in enumerate(("titok", "other")):
            torch.manual_seed(seed)
            sizes = {"encoder_size": (32, 1, 2), "decoder_size": (32, 1, 2)}
            vistok.save(TiTok(VectorQuantizer(256, 8), 32, 8, num_latent_tokens=6, **sizes), folder / name)
        torch.manual_seed(2)
        cnn = {"channels": 32, "channel_multipliers": (1, 1), "num_blocks": 1, "latent_channels": 16}
        vistok.save(VQGAN(VectorQuantizer(64, 8), 32, **cnn), folder / "vqgan")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images in nested folders, two of them named alike, beside files that are none."""
    folder = tmp_path / "photos"
    for seed, (name, height, width) in enumerate(
        [
            ("a.png", 40, 60),
            ("b.jpg", 64, 32),
            ("deep/a.png", 32, 32),
            ("deep/er/c d.png", 20, 30),
            ("deep/er/c d.bmp", 33, 31),
        ]
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        smooth_picture(seed, height, width).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    smooth_picture(9, 32, 32).save(folder / ".hidden" / "x.png")
    return folder
