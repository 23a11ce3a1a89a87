"""PARSeq (arXiv:2207.06966) as docTR trained it: the recogniser behind TokBench's published numbers.

The architecture is that of the ``python-doctr`` package, the weights are a file that it publishes. Crops are scaled
into 32 x 128 pixels with their proportions kept, and filled up with zeros at the right or at the bottom: a word wider
than 4:1 becomes 128 wide and less than 32 high.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..metric import MetricUnavailable
from .recognizer import file_sha256

ADDRESS = "https://doctr-static.mindee.com/models?id=v0.7.0/parseq-56125471.pt&src=0"
_SIZE = (32, 128)
_MEAN = (0.694, 0.695, 0.693)
_STD = (0.299, 0.296, 0.301)


class PARSeqRecognizer:
    """docTR's PARSeq; ``id`` is ``parseq-`` and the first eight digits of the hash of its weights.

    Args:
        weights: ``parseq-56125471.pt``.
        device: where it runs.
        batch_size: crops at a time.

    Raises:
        MetricUnavailable: if the package or the file is missing.
        ValueError: if the file holds other weights than PARSeq's, or ``batch_size`` is below 1.
    """

    def __init__(self, weights: str | Path | None, device: str = "cpu", batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        path = None if weights is None else Path(weights).expanduser()
        if path is None or not path.is_file():
            found = "no file was named" if path is None else f"there is no {path}"
            raise MetricUnavailable(f"PARSeq has no weights: {found}; fetch {ADDRESS} and give --recognizer-weights")
        try:
            import doctr
            from doctr.models.recognition import parseq
        except ImportError as error:
            raise MetricUnavailable(f"PARSeq needs docTR: pip install python-doctr ({error})") from error
        self.weights_sha256 = file_sha256(path)
        self.id = f"parseq-{self.weights_sha256[:8]}"
        self.version = f"python-doctr {doctr.__version__.removeprefix('v')}"
        self._model = parseq(pretrained=False, pretrained_backbone=False)
        try:
            self._model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load fails with many types: UnpicklingError, EOFError, RuntimeError ...
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} does not hold weights of docTR's PARSeq: {reason}") from error
        self._model.eval().to(device)
        self._device = device
        self._batch_size = batch_size

    def read(self, crops: list[np.ndarray]) -> list[str]:
        """See :class:`~vistok.eval.tokbench.recognizer.TextRecognizer`."""
        texts: list[str] = []
        for start in range(0, len(crops), self._batch_size):
            batch = torch.stack([fit(crop) for crop in crops[start : start + self._batch_size]]).to(self._device)
            with torch.inference_mode():
                predictions = self._model(normalize(batch), return_preds=True)["preds"]
            texts += [text for text, _ in predictions]
        return texts


def fit(crop: np.ndarray) -> Tensor:
    """A crop inside 32 x 128 pixels: float ``(3, 32, 128)`` in [0, 1]."""
    image = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1).float() / 255  # (3, H, W)
    height, width = image.shape[1:]
    if height * _SIZE[1] < width * _SIZE[0]:  # wider than 4:1
        size = (max(int(_SIZE[1] * (height / width)), 1), _SIZE[1])
    else:
        size = (_SIZE[0], max(int(_SIZE[0] / (height / width)), 1))
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return F.pad(image, (0, _SIZE[1] - size[1], 0, _SIZE[0] - size[0]))


def normalize(images: Tensor) -> Tensor:
    """Images in [0, 1] as the network was trained on them; the zeros around a crop become negative, too."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std
