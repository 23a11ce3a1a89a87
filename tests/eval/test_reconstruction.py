"""PSNR: per image on uint8 pixels, capped, and beside it the PSNR of the mean error."""

import importlib.util
import math
from pathlib import Path

import pytest
from skimage.metrics import peak_signal_noise_ratio

from vistok.eval.metric import MetricUnavailable
from vistok.eval.reconstruction import PSNR, psnr

_spec = importlib.util.spec_from_file_location("vistok_test_pairs", Path(__file__).with_name("pairs.py"))
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def test_psnr_of_an_image_is_that_of_scikit_image():
    images = made.photographs(3, 40, 56)
    worse = made.degraded(images)
    pairs = made.pair(images, worse)
    PSNR().update(pairs)
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy()) for x, y in zip(images, worse, strict=True)]
    assert pairs.values["psnr"].tolist() == pytest.approx(expected, abs=1e-4)
    assert psnr(worse / 255, images / 255).tolist() == pytest.approx(expected, abs=1e-4)


def test_psnr_does_not_depend_on_how_large_the_batch_is():
    images = made.photographs(3, 400, 500)  # more pixels than are taken at a time
    worse = made.degraded(images)
    together = made.pair(images, worse)
    PSNR().update(together)
    for i in range(3):
        alone = made.pair(images[i : i + 1], worse[i : i + 1])
        PSNR().update(alone)
        assert alone.values["psnr"] == together.values["psnr"][i]


def test_an_exact_image_counts_as_100_db_and_one_wrong_level_as_less_or_equal():
    images = made.photographs(2, 16, 16)
    almost = images.clone()
    almost[1, 0, 0, 0] ^= 1
    pairs = made.pair(images, almost)
    PSNR().update(pairs)
    assert pairs.values["psnr"].tolist() == pytest.approx([100, 10 * math.log10(255**2 * 768)])


def test_psnr_of_the_mean_error_is_that_of_all_pixels_together():
    images = made.photographs(4, 32, 32)
    worse = made.degraded(images)
    metric = PSNR()
    metric.update(made.pair(images, worse))
    expected = peak_signal_noise_ratio(images.numpy(), worse.numpy())
    assert metric.details()["psnr_of_mean_error"] == pytest.approx(expected, abs=1e-4)
    assert metric.compute()["psnr"] > expected + 0.1


def test_shards_merge_to_the_values_of_one_pass():
    images = made.photographs(5, 32, 32)
    whole, merged = made.one_pass_and_merged(PSNR, images, made.degraded(images))
    assert whole == merged


def test_without_images_there_is_no_value():
    with pytest.raises(MetricUnavailable, match="no image"):
        PSNR().compute()
