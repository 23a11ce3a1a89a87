"""DiffAugment: each family does what it says and no more, per image, differentiably, from a generator."""

import pytest
import torch

from vistok.losses.diff_augment import DiffAugment

OFF = {"brightness": 0.0, "saturation": 0.0, "contrast": 0.0, "translation": 0.0, "cutout": 0.0}


def only(**options):
    return DiffAugment(**{**OFF, **options})


@pytest.fixture
def images():
    return torch.rand(16, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def test_without_strengths_nothing_changes(images):
    torch.testing.assert_close(only()(images), images)


def test_with_probability_zero_nothing_changes(images):
    assert torch.equal(DiffAugment(probability=0.0)(images), images)


def test_probability_is_drawn_per_image_and_family():
    """Of two families with probability a half each, a quarter of the images get both, neither, and each alone."""
    images = torch.full((800, 3, 8, 8), 0.2)
    for options in ({"translation": 0.5}, {"cutout": 1.0}):
        out = only(probability=0.5, brightness=0.1, **options)(images)
        grey = (out == 0.5).flatten(1).any(1)
        shifted = ((out - 0.2).abs() > 1e-6).logical_and(out != 0.5).flatten(1).any(1)
        for a in (grey, ~grey):
            for b in (shifted, ~shifted):
                assert 0.13 < (a & b).float().mean() < 0.37  # some boxes cover all, some shifts are 0
    out = only(probability=0.5, translation=0.5, cutout=0.5)(images)
    assert 0.68 < (out == 0.5).flatten(1).any(1).float().mean() < 0.82  # a half each, not the same half


def test_brightness_shifts_all_pixels_of_an_image_alike(images):
    shift = only(brightness=0.25)(images) - images
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(shift), atol=1e-6)
    values = shift[:, 0, 0, 0]
    assert values.abs().max() <= 0.25 + 1e-6 and values.min() < -0.05 and values.max() > 0.05


def test_saturation_scales_the_distance_to_grey(images):
    out = only(saturation=1.0)(images)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(out.mean(1, keepdim=True), grey)
    factor = ((out - grey) * (images - grey)).sum((1, 2, 3)) / (images - grey).square().sum((1, 2, 3))
    torch.testing.assert_close(out, grey + factor.view(-1, 1, 1, 1) * (images - grey))
    assert 0 <= factor.min() < 0.7 and 1.3 < factor.max() <= 2


def test_contrast_scales_the_distance_to_the_mean(images):
    out = only(contrast=0.5)(images)
    mean = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(out.mean((1, 2, 3), keepdim=True), mean)
    factor = ((out - mean) * (images - mean)).sum((1, 2, 3)) / (images - mean).square().sum((1, 2, 3))
    torch.testing.assert_close(out, mean + factor.view(-1, 1, 1, 1) * (images - mean))
    assert 0.5 <= factor.min() < 0.85 and 1.15 < factor.max() <= 1.5


def test_translation_moves_whole_pixels_and_fills_with_grey(images):
    out, found = only(translation=0.125)(images), set()
    for image, moved in zip(images, out, strict=True):
        padded = torch.full((3, 28, 32), 0.5)
        padded[:, 4:24, 4:28] = image
        matches = [(y, x) for y in range(9) for x in range(9) if torch.equal(padded[:, y : y + 20, x : x + 24], moved)]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 8  # draws differ between images
    assert {y for y, _ in found} <= set(range(1, 8)) and {x for _, x in found} <= set(range(1, 8))  # 20 / 8, 24 / 8: 3


def test_translation_reaches_both_ends():
    out = only(translation=0.25)(torch.rand(500, 3, 4, 4))
    edges = [(out[:, :, i] == 0.5).all(2).all(1).float().mean().item() for i in (0, -1)]
    assert all(0.25 < edge < 0.42 for edge in edges)  # one of the three shifts -1, 0, 1 each


def test_cutout_greys_one_box(images):
    out = only(cutout=0.2)(images)
    cut = (out == 0.5).all(1)
    assert torch.equal(out[~cut.unsqueeze(1).expand_as(out)], images[~cut.unsqueeze(1).expand_as(out)])
    for mask in cut:
        rows, columns = mask.any(1).sum().item(), mask.any(0).sum().item()
        assert 2 <= rows <= 4 and 2 <= columns <= 5  # 20 / 5 and 24 / 5, halved at most where the centre is at the edge
        assert mask.sum() == rows * columns


def test_gradient_reaches_the_pixels_and_equals_finite_differences():
    augment, images = DiffAugment(), torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        return augment(x, torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(seeded, images)
    (gradient,) = torch.autograd.grad(seeded(images).sum(), images)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_a_generator_makes_the_draws_repeatable(images):
    augment = DiffAugment()
    a, b, c = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(5)
    a = augment(images)
    torch.manual_seed(5)
    assert torch.equal(a, augment(images)) and not torch.equal(a, augment(images))


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\]; got 1.5"):
        DiffAugment(1.5)
    with pytest.raises(ValueError, match=r"cutout must lie in \[0, 1\]; got -0.1"):
        DiffAugment(cutout=-0.1)
    with pytest.raises(ValueError, match="contrast must not be negative; got -1"):
        DiffAugment(contrast=-1)
