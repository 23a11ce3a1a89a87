"""dlib's face embedding, whose weights come in a Python package: F-Sim without a download from elsewhere.

Raw cosines of this network are about 0.85 even between strangers, so embeddings are centred on the mean of the original
faces; then a stranger is near 0. Such an F-Sim is comparable with nothing published.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..metric import MetricUnavailable
from .recognizer import file_sha256

_MODEL = "dlib_face_recognition_resnet_model_v1.dat"
_SIZE, _PADDING = 150, 0.25
# Where eyes, nose and corners of the mouth lie on dlib's mean face, whose 68 points span about the unit square.
_TEMPLATE = np.array([[0.2255, 0.2160], [0.7548, 0.2160], [0.4901, 0.5156], [0.2541, 0.7802], [0.7261, 0.7802]])


class DlibEmbedder:
    """dlib's 128-dimensional ResNet, aligned by the landmarks that it is given.

    Args:
        weights: ``dlib_face_recognition_resnet_model_v1.dat``; that of the package ``face_recognition_models`` if
            ``None``, which is never imported.

    Raises:
        MetricUnavailable: if ``dlib`` or the file is missing.
        ValueError: if the file holds something else.
    """

    center = True

    def __init__(self, weights: str | Path | None = None) -> None:
        try:
            import dlib
        except ImportError as error:
            raise MetricUnavailable(f"F-Sim by dlib needs it: pip install dlib-bin ({error})") from error
        path = _installed() if weights is None else Path(weights).expanduser()
        if path is None or not path.is_file():
            where = "" if path is None else f" at {path}"
            raise MetricUnavailable(f"F-Sim has no {_MODEL}{where}: pip install face_recognition_models")
        try:
            self._network = dlib.face_recognition_model_v1(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold dlib's face recognition network: {error}") from error
        self._dlib = dlib
        self.id = f"dlib/{path.stem}"
        self.version = f"dlib {dlib.__version__}"
        self.weights_sha256 = file_sha256(path)

    def embed(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """See :class:`~vistok.eval.tokbench.embedder.FaceEmbedder`."""
        chip = face_chip(self._dlib, image, np.asarray(landmarks, np.float64).tolist())
        return np.array(self._network.compute_face_descriptor(chip), np.float32)


def face_chip(dlib: Any, image: np.ndarray, landmarks: list[list[float]]) -> np.ndarray:
    """The upright face that dlib's network takes, uint8 ``(150, 150, 3)``."""
    padded = (_TEMPLATE + _PADDING) / (1 + 2 * _PADDING) * _SIZE
    places, points = (dlib.dpoints([dlib.dpoint(x, y) for x, y in part]) for part in (padded.tolist(), landmarks))
    details = dlib.chip_details(places, points, dlib.chip_dims(_SIZE, _SIZE))
    return dlib.extract_image_chip(np.ascontiguousarray(image), details)


def _installed() -> Path | None:
    """The weights inside the package that carries them; importing that fails without pkg_resources."""
    spec = find_spec("face_recognition_models")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "models" / _MODEL
