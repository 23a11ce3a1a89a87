"""The way through a square and back."""

import io

import numpy as np
import pytest
from PIL import Image

from vistok.eval.tokbench.letterbox import letterbox, placement, restore, through_jpeg


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (7, 300), (64, 64), (65, 64), (1, 1), (200, 3)])
def test_restored_image_has_its_original_size(size):
    canvas, place = letterbox(picture(*size), 64)
    assert canvas.shape == (64, 64, 3)
    assert restore(canvas, place).shape == (*size, 3)


def test_square_of_its_own_size_survives_bit_for_bit():
    image = picture(64, 64)
    canvas, place = letterbox(image, 64)
    assert np.array_equal(canvas, image) and np.array_equal(restore(canvas, place), image)


def test_letterbox_equals_lanczos_pasted_on_black():
    image = picture(40, 90)
    canvas, place = letterbox(image, 64)
    inner = Image.fromarray(image).resize((64, 29), Image.Resampling.LANCZOS)  # 40 * 64 / 90 = 28.4, rounded up
    expected = Image.new("RGB", (64, 64))
    expected.paste(inner, (0, 17))
    assert np.array_equal(canvas, np.array(expected))
    restored = Image.fromarray(canvas[17:46]).resize((90, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(restore(canvas, place), np.array(restored))


def test_upright_images_lie_between_black_columns():
    image = picture(90, 40)
    canvas, place = letterbox(image, 64)
    inner = Image.fromarray(image).resize((29, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(canvas[:, 17:46], np.array(inner)) and not canvas[:, :17].any() and not canvas[:, 46:].any()
    restored = Image.fromarray(canvas[:, 17:46]).resize((40, 90), Image.Resampling.LANCZOS)
    assert np.array_equal(restore(canvas, place), np.array(restored))


def test_small_images_are_scaled_up():
    place = placement(10, 5, 64)
    assert (place.inner_width, place.inner_height, place.left, place.top) == (64, 32, 0, 16)


def test_inner_image_never_exceeds_the_square():
    for width in range(1, 700, 3):
        for size in (16, 255, 256):
            place = placement(width, 123, size)
            assert max(place.inner_width, place.inner_height) == size
            assert min(place.left, place.top) >= 0


def test_jpeg_step_touches_jpeg_names_alone_and_equals_pil():
    image = picture(32, 48)
    assert through_jpeg(image, "a/b.png") is image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75, subsampling=2)
    expected = np.array(Image.open(buffer))
    for name in ("a.jpg", "a.JPG", "b/a.jpeg"):
        assert np.array_equal(through_jpeg(image, name), expected)
    assert not np.array_equal(expected, image)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\); got float64"):
        letterbox(np.zeros((4, 4, 3)), 64)
    with pytest.raises(ValueError, match="at least 1"):
        placement(4, 4, 0)
    canvas, place = letterbox(picture(20, 20), 64)
    with pytest.raises(ValueError, match="canvas must cover"):
        restore(canvas[:50], place)
