"""Faces turned upright."""

import numpy as np
import pytest
from skimage.transform import SimilarityTransform, warp

from vistok.eval.tokbench.alignment import SIZE, TEMPLATE, align, similarity


def moved(angle, scale, shift):
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return TEMPLATE @ (scale * rotation).T + shift


@pytest.mark.parametrize(("angle", "scale", "shift"), [(0, 1, (0, 0)), (0.7, 2.5, (30, -8)), (3, 0.2, (100, 50))])
def test_similarity_undoes_a_similarity(angle, scale, shift):
    source = moved(angle, scale, shift)
    matrix = similarity(source, TEMPLATE)
    np.testing.assert_allclose(source @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-9)


def test_similarity_equals_skimage_on_noisy_points():
    random = np.random.RandomState(0)
    for _ in range(20):
        source = moved(random.uniform(-3, 3), random.uniform(0.2, 3), random.uniform(-50, 50, 2))
        source += random.normal(0, 8, (5, 2))
        expected = SimilarityTransform.from_estimate(source, TEMPLATE).params[:2]
        np.testing.assert_allclose(similarity(source, TEMPLATE), expected, atol=1e-9)


def test_similarity_never_mirrors():
    mirrored = TEMPLATE * [-1, 1]
    matrix = similarity(mirrored, TEMPLATE)[:, :2]
    assert np.linalg.det(matrix) > 0
    np.testing.assert_allclose(matrix, SimilarityTransform.from_estimate(mirrored, TEMPLATE).params[:2, :2], atol=1e-9)


def test_align_equals_skimage_warp():
    image = np.random.RandomState(0).randint(0, 256, (90, 130, 3), dtype=np.uint8)
    landmarks = moved(0.4, 0.6, (40, 5))  # a corner of the face lies outside
    transform = SimilarityTransform.from_estimate(landmarks, TEMPLATE)
    floats = image.astype(np.float64)
    expected = warp(floats, transform.inverse, output_shape=(SIZE, SIZE), order=1, cval=0, preserve_range=True)
    difference = np.abs(align(image, landmarks).astype(int) - expected)
    inside = warp(np.ones(image.shape[:2]), transform.inverse, output_shape=(SIZE, SIZE), order=1, cval=0) == 1
    assert difference[inside].max() <= 0.51 and np.median(difference) <= 0.51


def test_a_face_on_the_template_is_a_plain_crop():
    image = np.random.RandomState(1).randint(0, 256, (200, 210, 3), dtype=np.uint8)
    assert np.array_equal(align(image, TEMPLATE + [40, 30]), image[30:142, 40:152])


def test_beyond_the_image_is_black():
    image = np.full((50, 50, 3), 255, np.uint8)
    face = align(image, TEMPLATE + [10, 10])
    assert (face[:40, :40] == 255).all() and (face[42:] == 0).all() and (face[:, 42:] == 0).all()
    assert (align(image, TEMPLATE + [1000, 0]) == 0).all()


def test_wrong_points_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        similarity(TEMPLATE[:4], TEMPLATE)
    with pytest.raises(ValueError, match="all are one"):
        similarity(np.ones((5, 2)), TEMPLATE)
