import pytest

from vistok.eval.report.names import NAMES, metric_name, sort_names


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("psnr", 21.905, "21.91 dB"),
        ("rfid", 1.0, "1.000"),
        ("rfid", 1234.5, "1,234.500"),
        ("usage", 0.99932, "99.93 %"),
        ("dead_codes", 16373.0, "16,373"),
        ("kid", -0.000012, "−0.000012"),
        ("lpips_alex", 0.00001234, "0.0000123"),
        ("bytes", 0.4, "0 B"),
        ("psnr", 0.0, "0.00 dB"),
        ("psnr", float("nan"), "–"),
        ("psnr", None, "–"),
        ("made_up", 0.5, "0.500"),
    ],
)
def test_values_are_shown_in_their_unit_with_the_digits_that_matter(name, value, text):
    assert metric_name(name).text(value) == text


def test_parts_are_shown_like_the_whole():
    part = metric_name("usage/image.3")
    assert part.title == "Codebook usage, image.3" and part.text(0.5) == "50.00 %" and part.arrow == "↑"


def test_unknown_names_show_themselves_without_direction():
    unknown = metric_name("some/thing")
    assert unknown.title == "some/thing" and unknown.higher_is_better is None and unknown.arrow == ""


def test_directions_are_those_of_the_field():
    lower = {"rfid", "rsfid", "kid", "lpips_alex", "lpips_vgg", "dists", "dead_codes", "bits_per_pixel", "bytes"}
    higher = {"psnr", "ssim", "ms_ssim", "ris", "precision", "recall", "dino_similarity", "clip_similarity", "usage"}
    assert all(NAMES[name].higher_is_better is False for name in lower)
    assert all(NAMES[name].higher_is_better is True for name in higher)
    assert all(NAMES[name].higher_is_better is None for name in NAMES if name.endswith("_std"))


def test_names_sort_as_listed_with_parts_behind_their_whole_and_strangers_last():
    names = ["zeta", "usage/1", "alpha", "psnr", "usage", "usage/0", "rfid", "psnr"]
    assert sort_names(names) == ["rfid", "psnr", "usage", "usage/0", "usage/1", "alpha", "zeta"]
