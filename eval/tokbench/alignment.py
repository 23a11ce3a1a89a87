"""Faces turned upright: 112 x 112 pixels with eyes, nose and mouth where ArcFace (arXiv:1801.07698) expects them.

The similarity that brings five landmarks closest to the template, in the least-squares sense, is Umeyama's (IEEE TPAMI
1991): rotation, one scale, shift, no reflection.
"""

from __future__ import annotations

import numpy as np

SIZE = 112
# Eyes, nose and corners of the mouth on 112 x 112 pixels, as insightface publishes them.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity closest to taking points to points.

    Args:
        source: ``(N, 2)`` x, y.
        target: ``(N, 2)``.

    Returns:
        ``(2, 3)``, to be multiplied by ``(x, y, 1)``.

    Raises:
        ValueError: for other shapes, or if all source points are one.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2:
        raise ValueError(f"source and target must both be (N, 2); got {source.shape} and {target.shape}")
    source_mean, target_mean = source.mean(0), target.mean(0)
    spread = ((source - source_mean) ** 2).sum()
    if not spread > 0:
        raise ValueError("source must hold different points; all are one")
    covariance = (target - target_mean).T @ (source - source_mean)  # (2, 2)
    left, singular, right = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    matrix = (left * signs) @ right * ((singular * signs).sum() / spread)
    return np.concatenate([matrix, (target_mean - matrix @ source_mean)[:, None]], 1)


def align(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The face with these landmarks, upright: uint8 ``(112, 112, 3)``, bilinear, black beyond the image.

    Args:
        image: uint8 ``(H, W, 3)``.
        landmarks: ``(5, 2)`` x, y of eyes, nose and corners of the mouth.

    Raises:
        ValueError: for other shapes.
    """
    from scipy.ndimage import map_coordinates

    forward = similarity(landmarks, TEMPLATE)
    back = np.linalg.inv(forward[:, :2])
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    places = back @ (np.stack([x.ravel(), y.ravel()]) - forward[:, 2:])  # (2, 112 * 112) x, y in the image
    # Only the pixels around the face are made into floats.
    low = np.clip(np.floor(places.min(1)).astype(int) - 1, 0, [image.shape[1] - 1, image.shape[0] - 1])
    high = np.clip(np.ceil(places.max(1)).astype(int) + 2, low + 1, [image.shape[1], image.shape[0]])
    part = image[low[1] : high[1], low[0] : high[0]].astype(np.float32)
    rows, columns = places[1] - low[1], places[0] - low[0]
    channels = [
        map_coordinates(part[..., c], [rows, columns], order=1, mode="grid-constant", cval=0.0) for c in range(3)
    ]
    return np.clip(np.round(np.stack(channels, -1)), 0, 255).astype(np.uint8).reshape(SIZE, SIZE, 3)
