"""PaddleOCR's recogniser (PP-OCR, arXiv:2009.09941) out of the ``rapidocr`` package, which brings its weights along."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..metric import MetricUnavailable
from .recognizer import file_sha256

_MODEL = "PP-OCRv6_rec_small.onnx"
_BATCH = 6  # every crop of a batch is padded to the widest, so larger ones are slower on a CPU


class RapidRecognizer:
    """The recognition network of RapidOCR, on one thread; words are sorted by their proportions into batches of six.

    Raises:
        MetricUnavailable: if ``rapidocr`` 3 or ``onnxruntime`` is missing, or the package lacks its model.
    """

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401 -- rapidocr would only miss it later
            import rapidocr
            from rapidocr.ch_ppocr_rec import TextRecInput
        except ImportError as error:
            message = f"text needs a recogniser: pip install 'rapidocr>=3.10' onnxruntime ({error})"
            raise MetricUnavailable(message) from error
        weights = Path(rapidocr.__file__).parent / "models" / _MODEL
        if not weights.is_file():
            raise MetricUnavailable(f"rapidocr comes without {_MODEL}: pip install 'rapidocr>=3.10'")
        self.id = f"rapidocr/{weights.stem}"
        self.version = f"rapidocr {importlib.metadata.version('rapidocr')}"
        self.weights_sha256 = file_sha256(weights)
        self._input = TextRecInput
        self._reader = _reader(weights)

    def read(self, crops: list[np.ndarray]) -> list[str]:
        """See :class:`~vistok.eval.tokbench.recognizer.TextRecognizer`."""
        texts = [""] * len(crops)
        order = sorted(range(len(crops)), key=lambda i: crops[i].shape[1] / crops[i].shape[0])
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            batch = [np.ascontiguousarray(crops[i][:, :, ::-1]) for i in chosen]  # RapidOCR takes BGR
            for i, text in zip(chosen, self._reader(self._input(img=batch)).txts, strict=True):
                texts[i] = text
        return texts


def _reader(weights: Path) -> Any:
    """RapidOCR's recogniser alone, without the detector and the classifier that its engine runs before it."""
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Rec.model_path": str(weights),
            "Rec.rec_batch_num": _BATCH,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    engine(np.zeros((48, 96, 3), np.uint8), use_det=False, use_cls=False)  # it builds its networks when first used
    return engine.text_rec
