"""What reads text off an image: one interface for all recognisers.

Scores of two recognisers are not comparable, so every result names its recogniser, the version and the hash of the
weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

RecognizerName = Literal["parseq", "rapidocr", "tesseract"]


class TextRecognizer(Protocol):
    """Reads words.

    Attributes:
        id: name of the method and of its weights.
        version: of the package that runs it.
        weights_sha256: of its weights.
    """

    id: str
    version: str
    weights_sha256: str

    def read(self, crops: list[np.ndarray]) -> list[str]:
        """The text on each of the crops, uint8 ``(H, W, 3)`` RGB of any sizes."""
        ...


def make_recognizer(
    name: RecognizerName, weights: str | Path | None = None, device: str = "cpu", batch_size: int = 64
) -> TextRecognizer:
    """A recogniser by its name.

    Args:
        name: ``parseq`` (the benchmark's own), ``rapidocr`` (brings its weights) or ``tesseract`` (a program).
        weights: for ``parseq``: docTR's file ``parseq-56125471.pt``.
        device: for ``parseq``.
        batch_size: for ``parseq``: crops at a time.

    Raises:
        MetricUnavailable: if a package, a program or weights are missing.
        ValueError: for another name.
    """
    if name == "parseq":
        from .parseq import PARSeqRecognizer

        return PARSeqRecognizer(weights, device, batch_size)
    if name == "rapidocr":
        from .rapid import RapidRecognizer

        return RapidRecognizer()
    if name == "tesseract":
        from .tesseract import TesseractRecognizer

        return TesseractRecognizer()
    raise ValueError(f"recognizer must be one of {', '.join(get_args(RecognizerName))}; got {name!r}")


def file_sha256(path: str | Path) -> str:
    """Hash of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
