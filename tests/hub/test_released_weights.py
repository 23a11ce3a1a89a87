"""The released weights themselves, where they are at hand (``VISTOK_RELEASED``: a folder of downloaded files).

The folder holds ``tokenizer_titok_l32.bin`` (fun-research/TiTok) and ``ILSVRC2012_val_00010240.png``, the example image
of bytedance/1d-tokenizer, whose README lists the tokens that TiTok-L-32 gives it.
"""

import hashlib
import os
from pathlib import Path

import pytest

import vistok
from vistok.data.images import read_image

FOLDER = Path(os.environ.get("VISTOK_RELEASED", ""))
WEIGHTS, IMAGE = FOLDER / "tokenizer_titok_l32.bin", FOLDER / "ILSVRC2012_val_00010240.png"
SHA256 = "75105b81fc706e977227c41ef2960b1aef84fe557d2c69e27ac8b3839539fbfa"
TOKENS = """887 3979 349 720 2809 2743 2101 603 2205 1508 1891 4015 1317 2956 3774 2296
484 2612 3472 2330 3140 3113 1056 3779 654 2360 1901 2908 2169 953 1326 2598"""


@pytest.mark.skipif(
    not (os.environ.get("VISTOK_RELEASED") and WEIGHTS.is_file() and IMAGE.is_file()),
    reason="needs the released weights: set VISTOK_RELEASED to a folder that holds them",
)
def test_titok_l32_gives_the_published_tokens():
    assert hashlib.sha256(IMAGE.read_bytes()).hexdigest() == SHA256
    tokens = vistok.load(WEIGHTS).encode(read_image(IMAGE)[None].float() / 255)
    assert tokens.indices["image"].flatten().tolist() == [int(token) for token in TOKENS.split()]
