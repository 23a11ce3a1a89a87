"""ArcFace (arXiv:1801.07698) as insightface publishes it: the network behind TokBench's published F-Sim.

Of a model pack only the recognition network is used, straight through ONNX Runtime: faces are not detected but aligned
by annotated landmarks, in original and reconstruction alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..metric import MetricUnavailable
from .alignment import SIZE, align
from .recognizer import file_sha256

ADDRESS = "https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip"
_FOLDER = Path("~/.insightface/models/antelopev2")
_MODEL = "glintr100.onnx"


class ArcFaceEmbedder:
    """The recognition network of an insightface pack; ``antelopev2`` has ``glintr100.onnx``.

    Args:
        weights: folder of the pack, or the ONNX file itself; ``~/.insightface/models/antelopev2`` if ``None``.

    Raises:
        MetricUnavailable: if ``onnxruntime`` or the file is missing.
        ValueError: if the file is not a network from 112 x 112 faces to vectors.
    """

    center = False

    def __init__(self, weights: str | Path | None = None) -> None:
        path = Path(_FOLDER if weights is None else weights).expanduser()
        path = _recognition(path) if path.is_dir() else path
        if not path.is_file():
            raise MetricUnavailable(f"F-Sim has no weights: unpack {ADDRESS} so that {path} is there")
        try:
            import onnxruntime
        except ImportError as error:
            raise MetricUnavailable(f"F-Sim needs ONNX Runtime: pip install onnxruntime ({error})") from error
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=_providers(onnxruntime))
        except Exception as error:  # ONNX Runtime has its own types, which it does not export
            raise ValueError(f"{path} is not an ONNX network: {str(error).splitlines()[0]}") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or list(inputs[0].shape[1:]) != [3, SIZE, SIZE]:
            raise ValueError(f"{path} must take faces (N, 3, {SIZE}, {SIZE}); got {[i.shape for i in inputs]}")
        self._input = inputs[0].name
        self.id = f"insightface/{path.parent.name}/{path.stem}"
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.weights_sha256 = file_sha256(path)

    def embed(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """See :class:`~vistok.eval.tokbench.embedder.FaceEmbedder`."""
        face = (align(image, landmarks).astype(np.float32) - 127.5) / 127.5  # (112, 112, 3) RGB
        return self._session.run(None, {self._input: face.transpose(2, 0, 1)[None]})[0][0]


def _recognition(folder: Path) -> Path:
    """The recognition network of the pack antelopev2."""
    named = folder / _MODEL
    nested = folder / folder.name / _MODEL  # the published archive has a folder inside
    if not named.is_file() and nested.is_file():
        return nested
    return named


def _providers(onnxruntime: object) -> list[str]:
    available = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
