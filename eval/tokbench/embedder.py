"""What says whose face it is: one interface for all networks that embed faces."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

EmbedderName = Literal["insightface", "dlib"]


class FaceEmbedder(Protocol):
    """Embeds faces.

    Attributes:
        id: name of the method and of its weights.
        version: of the package that runs it.
        weights_sha256: of its weights.
        center: subtract the mean embedding of all original faces before cosines are taken. Embeddings of some networks
            share so much that the raw cosine of two strangers is near 1.
    """

    id: str
    version: str
    weights_sha256: str
    center: bool

    def embed(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """The embedding ``(D,)`` of the face with landmarks ``(5, 2)`` on an image uint8 ``(H, W, 3)`` RGB."""
        ...


def make_embedder(name: EmbedderName, weights: str | Path | None = None) -> FaceEmbedder:
    """An embedder by its name.

    Args:
        name: ``insightface`` (the benchmark's own) or ``dlib``.
        weights: folder of insightface's ``antelopev2``, or dlib's file of weights; each has a place that is looked at
            if ``None``.

    Raises:
        MetricUnavailable: if a package or weights are missing.
        ValueError: for another name.
    """
    if name == "insightface":
        from .arcface import ArcFaceEmbedder

        return ArcFaceEmbedder(weights)
    if name == "dlib":
        from .dlibface import DlibEmbedder

        return DlibEmbedder(weights)
    raise ValueError(f"embedder must be one of {', '.join(get_args(EmbedderName))}; got {name!r}")
