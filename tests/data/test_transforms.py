"""Geometry of the crops: against PIL, brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vistok.data.transforms import (
    EvalTransform,
    TrainTransform,
    adm_center_crop,
    center_crop,
    horizontal_flip,
    random_crop,
    random_resized_crop,
    resize,
    resize_cover,
)

SIDES = st.integers(1, 40)


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int) -> torch.Tensor:
    picture = Image.fromarray(noise(5, 5).permute(1, 2, 0).numpy()).resize((width, height))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resize_cover_is_the_smallest_cover(height, width, h, w):
    resized = resize_cover(noise(height, width), (h, w))
    assert resized.shape[1] >= h and resized.shape[2] >= w
    assert resized.shape[1] == h or resized.shape[2] == w


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(["random", "random_resized", "center"]))
def test_any_image_becomes_any_size(height, width, h, w, crop):
    image = TrainTransform((h, w), crop, scale=(0.1, 1.0))(noise(height, width), seeded())
    assert image.shape == (3, h, w) and image.dtype == torch.uint8
    assert EvalTransform((h, w))(noise(height, width)).shape == (3, h, w)


def test_an_image_smaller_than_the_crop_is_enlarged_not_padded():
    image = EvalTransform((30, 20))(torch.full((3, 3, 4), 77, dtype=torch.uint8))
    assert image.shape == (3, 30, 20) and image.unique().tolist() == [77]


@pytest.mark.parametrize("size", [(24, 24), (20, 50), (130, 140)])
def test_resize_agrees_with_pil_bicubic_within_one_grey_level(size):
    image = smooth(64, 90)
    resized = resize_cover(image, size)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.array(picture.resize((resized.shape[2], resized.shape[1]), Image.Resampling.BICUBIC))
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).mean() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (4, 4)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_tiny_result_is_right_too(size, channels_last):
    image = smooth(9, 7)
    if channels_last:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    else:
        image = image.contiguous()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (resize(image, size).int() - expected.int()).abs().max() <= 2


def test_center_crop_leaves_equal_margins():
    image = torch.arange(3 * 7 * 9).reshape(3, 7, 9)
    assert torch.equal(center_crop(image, (3, 5)), image[:, 2:5, 2:7])
    with pytest.raises(ValueError, match=r"\(7, 9\).*\(8, 2\)"):
        center_crop(image, (8, 2))


def test_random_crop_reaches_every_position_equally_often():
    image, generator = torch.arange(4 * 5).reshape(1, 4, 5).expand(3, 4, 5), seeded()
    corners = [int(random_crop(image, (2, 3), generator)[0, 0, 0]) for _ in range(1800)]
    positions, counts = np.unique(corners, return_counts=True)
    assert positions.tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert counts.min() > 140 and counts.max() < 260  # 200 expected, standard deviation 13


def test_random_resized_crop_of_scale_one_is_the_whole_image():
    image = smooth(32, 64)
    cropped = random_resized_crop(image, (16, 32), (1.0, 1.0), (1.0, 1.0), seeded())
    assert torch.equal(cropped, resize_cover(image, (16, 32)))


def test_random_resized_crop_keeps_areas_and_shapes_in_range():
    rows = torch.arange(240).reshape(1, 240, 1).expand(3, 240, 240).to(torch.uint8)
    shapes = []
    for seed in range(60):
        down = random_resized_crop(rows, (8, 8), (0.25, 0.5), (0.5, 2.0), seeded(seed))[0, :, 0].float()
        across = random_resized_crop(rows.mT, (8, 8), (0.25, 0.5), (0.5, 2.0), seeded(seed))[0, 0].float()
        shapes.append((float(down[6] - down[1]) / 5 * 8, float(across[6] - across[1]) / 5 * 8))  # (h, w) of the window
    areas = np.array([h * w for h, w in shapes]) / 240**2
    ratios = np.array([w / h for h, w in shapes])
    assert 0.23 < areas.min() < 0.32 and 0.43 < areas.max() < 0.54
    assert 0.47 < ratios.min() < 0.8 and 1.3 < ratios.max() < 2.1


@pytest.mark.parametrize("crop", ["random", "random_resized"])
def test_the_generator_alone_decides_the_training_image(crop):
    transform, image = TrainTransform(16, crop), noise(40, 50)
    torch.manual_seed(0)
    first, state = transform(image, seeded(3)), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, transform(image, seeded(3)))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state()), "a draw came from the global generator"
    assert not torch.equal(first, transform(image, seeded(4)))


def test_flip_probability_zero_and_one():
    image = noise(8, 8)
    assert torch.equal(TrainTransform(8, flip=0.0)(image, seeded()), image)
    assert torch.equal(TrainTransform(8, flip=1.0)(image, seeded()), horizontal_flip(image))
    assert torch.equal(horizontal_flip(image), image[:, :, torch.arange(7, -1, -1)])


@pytest.mark.parametrize("shape", [(70, 100), (140, 33), (16, 16), (10, 12), (31, 64)])
def test_adm_crop_equals_the_protocol_step_by_step(shape):
    image = smooth(*shape)
    pixels = image.permute(1, 2, 0).numpy()
    while min(pixels.shape[:2]) >= 32:  # box halving = mean of 2 x 2 blocks
        h, w = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = np.array(Image.fromarray(pixels).resize((w, h), Image.BOX))
    short = min(pixels.shape[:2])
    h, w = round(pixels.shape[0] * 16 / short), round(pixels.shape[1] * 16 / short)
    pixels = np.array(Image.fromarray(pixels).resize((w, h), Image.BICUBIC))
    top, left = (h - 16) // 2, (w - 16) // 2
    expected = torch.from_numpy(pixels[top : top + 16, left : left + 16]).permute(2, 0, 1)
    assert torch.equal(adm_center_crop(image, 16), expected)
    assert torch.equal(EvalTransform(16, "adm")(image), expected)


def test_adm_halving_averages_blocks():
    image = noise(32, 32)
    blocks = image.float().reshape(3, 16, 2, 16, 2).mean((2, 4))
    assert (adm_center_crop(image, 16).float() - blocks).abs().max() <= 1  # PIL rounds after each direction


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: adm_center_crop(noise(9, 9), (4, 5)), r"square.*\(4, 5\).*center"),
        (lambda: EvalTransform((4, 5), "adm"), r"square.*\(4, 5\)"),
        (lambda: EvalTransform(4, "middle"), "'center' or 'adm'.*'middle'"),
        (lambda: TrainTransform(4, "middle"), "'random_resized' or 'center'.*'middle'"),
        (lambda: TrainTransform(0), "positive.*0"),
        (lambda: TrainTransform((1, 2, 3)), r"\(1, 2, 3\)"),
        (lambda: TrainTransform(4, scale=(0.5, 1.5)), r"scale.*\(0.5, 1.5\)"),
        (lambda: TrainTransform(4, flip=1.5), "flip.*1.5"),
    ],
)
def test_wrong_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
