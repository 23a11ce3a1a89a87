"""Tesseract, the program, as a recogniser of words: nothing to download where a system's packages bring it.

It expects print, so crops are made into it: dark on light, grey, 48 pixels high, with a margin. One process reads a
whole list of crops, which takes a twentieth of the time of a process for each.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..metric import MetricUnavailable
from .recognizer import file_sha256

_HEIGHT = 48
_MARGIN = 10
_WIDEST = 4096
_LIST = 500  # crops of one process


class TesseractRecognizer:
    """The ``tesseract`` program on lines of text (``--psm 7``).

    Args:
        language: of its training data.

    Raises:
        MetricUnavailable: if the program or the language is missing.
    """

    def __init__(self, language: str = "eng") -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", language):
            raise ValueError(f"language must be a name such as 'eng'; got {language!r}")
        program = shutil.which("tesseract")
        if program is None:
            raise MetricUnavailable("there is no program tesseract: apt-get install tesseract-ocr")
        self._program = program
        self._language = language
        listing = self._run("--list-langs").stdout
        if language not in listing.split():
            raise MetricUnavailable(
                f"tesseract lacks the language {language}: apt-get install tesseract-ocr-{language}"
            )
        self.id = f"tesseract/{language}"
        self.version = self._run("--version").stdout.split("\n", 1)[0]
        self.weights_sha256 = self._training_data(listing)

    def read(self, crops: list[np.ndarray]) -> list[str]:
        """See :class:`~vistok.eval.tokbench.recognizer.TextRecognizer`."""
        texts: list[str] = []
        for start in range(0, len(crops), _LIST):
            texts += self._read(crops[start : start + _LIST])
        return texts

    def _read(self, crops: list[np.ndarray]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            names = []
            for number, crop in enumerate(crops):
                names.append(str(Path(folder, f"{number}.png")))
                normalize(crop).save(names[-1], compress_level=1)
            listing = Path(folder, "crops.txt")
            listing.write_text("\n".join(names) + "\n")
            done = self._run(str(listing), "stdout", "-l", self._language, "--psm", "7", "-c", "page_separator=\f")
        pages = done.stdout.split("\f")
        if done.returncode or len(pages) != len(crops) + 1:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"tesseract read {len(pages) - 1} of {len(crops)} crops: {reason}")
        return [page.strip() for page in pages[:-1]]

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._program, *arguments], capture_output=True, encoding="utf-8", check=False)

    def _training_data(self, listing: str) -> str:
        """Hash of the language's training data; empty if this version of the program does not say where it is."""
        folder = re.search(r'"(.+?)"', listing.split("\n", 1)[0])
        path = Path(folder[1], f"{self._language}.traineddata") if folder else None
        return file_sha256(path) if path is not None and path.is_file() else ""


def normalize(crop: np.ndarray) -> Image.Image:
    """A crop as print: dark on light, grey, 48 pixels high inside a margin of 10."""
    image = Image.fromarray(crop).convert("L")
    levels = np.asarray(image, np.float32)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    if np.median(border) < (levels.min() + levels.max()) / 2:  # the background is the darker part
        image = ImageOps.invert(image)
        border = 255 - border
    width = min(max(round(image.width * _HEIGHT / image.height), 1), _WIDEST)
    image = image.resize((width, _HEIGHT), Image.Resampling.BICUBIC)
    return ImageOps.expand(image, _MARGIN, fill=int(np.median(border)))
