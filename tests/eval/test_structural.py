"""SSIM and MS-SSIM: the values of independent implementations, exact for equal images, precise in float32."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from vistok.eval.metric import MetricUnavailable
from vistok.eval.structural import MSSSIM, SSIM

_spec = importlib.util.spec_from_file_location("vistok_test_pairs", Path(__file__).with_name("pairs.py"))
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def values(metric, images, reconstructions):
    pairs = made.pair(images, reconstructions)
    metric.update(pairs)
    return pairs.values[metric.names[0]].double()


def by_definition(x, y):
    """SSIM and its contrast term per channel, in float64, of two arrays ``(3, H, W)``."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window /= window.sum()

    def mean(image):
        image = correlate1d(correlate1d(image, window, axis=1), window, axis=2)
        return image[:, 5:-5, 5:-5]

    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    contrast = (2 * covariance + 58.5225) / (variances + 58.5225)
    luminance = (2 * mean_x * mean_y + 6.5025) / (mean_x**2 + mean_y**2 + 6.5025)
    return (luminance * contrast).mean((1, 2)), contrast.mean((1, 2))


def halved(image):
    """Means of 2 x 2 pixels; where a size is odd, of what there is."""
    height, width = image.shape[1:]
    image = np.pad(image, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return image.reshape(3, image.shape[1] // 2, 2, image.shape[2] // 2, 2).mean((2, 4))


def multi_scale_by_definition(x, y):
    terms = []
    for scale in range(5):
        similarity, contrast = by_definition(x, y)
        terms.append(similarity if scale == 4 else contrast)
        x, y = halved(x), halved(y)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:, None]
    return (np.maximum(np.stack(terms), 0) ** weights).prod(0).mean()


def test_ssim_is_that_of_scikit_image_with_a_gaussian_window():
    images = made.photographs(3, 40, 56)
    worse = made.degraded(images)
    expected = [
        structural_similarity(
            x.numpy(), y.numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(images, worse, strict=True)
    ]
    assert values(SSIM((40, 56)), images, worse).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_is_that_of_torchmetrics_away_from_the_borders():
    images = made.photographs(2, 96, 96)
    worse = made.degraded(images)
    _, theirs = structural_similarity_index_measure(
        worse.double() / 255, images.double() / 255, data_range=1.0, reduction="none", return_full_image=True
    )
    ours = values(SSIM((96, 96)), images, worse)
    torch.testing.assert_close(ours, theirs[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, theirs.mean((1, 2, 3)), atol=1e-2, rtol=0)  # they mirror the borders


@pytest.mark.parametrize("size", [(161, 176), (192, 192)])
def test_ms_ssim_is_what_its_definition_says(size):
    images = made.photographs(2, *size)
    worse = made.degraded(images, 20)
    expected = [
        multi_scale_by_definition(y.numpy().astype(float), x.numpy().astype(float))
        for x, y in zip(images, worse, strict=True)
    ]
    assert values(MSSSIM(size), images, worse).tolist() == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_is_close_to_that_of_torchmetrics():
    images = made.photographs(2, 256, 256)
    worse = made.degraded(images)
    theirs = multiscale_structural_similarity_index_measure(
        worse.double() / 255, images.double() / 255, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(values(MSSSIM((256, 256)), images, worse), theirs, atol=3e-3, rtol=0)


@pytest.mark.parametrize("level", [0, 3, 128, 252, 255])
def test_float32_is_precise_where_images_are_flat_and_bright(level):
    noise = torch.randint(-2, 3, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    images, worse = ((level + part).clamp(0, 255).byte() for part in (noise, noise.flip(-1)))
    expected = [by_definition(y.numpy() * 1.0, x.numpy() * 1.0)[0].mean() for x, y in zip(images, worse, strict=True)]
    assert values(SSIM((24, 24)), images, worse).tolist() == pytest.approx(expected, abs=1e-5)


def test_equal_images_score_exactly_one():
    images = made.photographs(2, 176, 176)
    assert values(SSIM((176, 176)), images, images.clone()).tolist() == [1, 1]
    assert values(MSSSIM((176, 176)), images, images.clone()).tolist() == [1, 1]


def test_inverted_images_have_negative_ssim_and_no_ms_ssim():
    images = torch.randint(0, 256, (1, 3, 176, 176), generator=torch.Generator().manual_seed(0)).byte()
    assert values(SSIM((176, 176)), images, 255 - images).item() < -0.9
    assert values(MSSSIM((176, 176)), images, 255 - images).item() == 0


def test_values_do_not_depend_on_how_large_the_batch_is():
    images = made.photographs(3, 256, 300)  # more pixels than are taken at a time
    worse = made.degraded(images)
    for make in (SSIM, MSSSIM):
        together = values(make((256, 300)), images, worse)
        alone = [values(make((256, 300)), images[i : i + 1], worse[i : i + 1]).item() for i in range(3)]
        assert together.tolist() == pytest.approx(alone, abs=1e-6)


def test_both_metrics_share_the_full_size(monkeypatch):
    from vistok.eval import structural

    sizes, original = [], structural._similarity
    monkeypatch.setattr(structural, "_similarity", lambda x, y: sizes.append(x.shape[-1]) or original(x, y))
    images = made.photographs(1, 176, 176)
    pairs = made.pair(images, made.degraded(images))
    SSIM((176, 176)).update(pairs)
    MSSSIM((176, 176)).update(pairs)
    assert sizes == [176, 88, 44, 22, 11]


@pytest.mark.parametrize("make", [SSIM, MSSSIM])
def test_shards_merge_to_the_values_of_one_pass(make):
    images = made.photographs(5, 168, 168)
    whole, merged = made.one_pass_and_merged(lambda: make((168, 168)), images, made.degraded(images))
    assert whole == pytest.approx(merged, abs=1e-6)


@pytest.mark.parametrize("make, smallest", [(SSIM, 11), (MSSSIM, 161)])
def test_too_small_images_are_refused_at_once(make, smallest):
    images = made.photographs(1, smallest, smallest)
    assert 0 < values(make((smallest, smallest)), images, made.degraded(images)).item() < 1
    with pytest.raises(MetricUnavailable, match=f"at least {smallest} x {smallest} pixels; got {smallest - 1} x 300"):
        make((smallest - 1, 300))
