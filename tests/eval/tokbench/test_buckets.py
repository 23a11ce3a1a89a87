"""Classes of size."""

import math

import pytest

from vistok.eval.tokbench.buckets import bucket_means, face_buckets, text_buckets


@pytest.mark.parametrize(
    ("buckets", "edges"),
    [
        (text_buckets(256), (0.02, 0.03, 0.04, 1)),
        (text_buckets(512), (0.01, 0.02, 0.03, 1)),
        (text_buckets(1024), (0.005, 0.01, 0.02, 1)),
        (face_buckets(256), (0, 0.1, 0.2, 1)),
        (face_buckets(512), (0, 0.05, 0.2, 1)),
        (face_buckets(1024), (0, 0.05, 0.1, 1)),
    ],
)
def test_published_buckets_are_half_open(buckets, edges):
    assert buckets.official
    for number in range(3):
        assert buckets.find(edges[number]) == number
        assert buckets.find(math.nextafter(edges[number + 1], 0)) == number
    assert buckets.find(edges[3]) is None
    assert buckets.find(math.nextafter(edges[0], -1)) is None


def test_other_sizes_keep_the_pixels_of_256():
    for make in (text_buckets, face_buckets):
        buckets, published = make(384), make(256)
        assert not buckets.official
        for edge, original in zip(buckets.edges[:3], published.edges[:3], strict=True):
            assert edge * 384 == pytest.approx(original * 256)
        assert buckets.edges[3] == 1


@pytest.mark.parametrize("size", [0, -1, 10])
def test_squares_too_small_for_three_buckets_are_refused(size):
    with pytest.raises(ValueError, match="size must exceed"):
        text_buckets(size)


def test_mean_over_buckets_is_unweighted():
    means = bucket_means({0: 1.0, 1: 30.0, 2: 0.0}, {0: 2, 1: 100, 2: 1})
    assert means == {"small": 0.5, "medium": 0.3, "large": 0.0, "mean": pytest.approx(0.8 / 3)}


def test_an_empty_bucket_leaves_no_mean():
    means = bucket_means({0: 1.0, 1: 0, 2: 0}, {0: 2, 1: 0, 2: 4})
    assert means["small"] == 0.5 and math.isnan(means["medium"]) and math.isnan(means["mean"])
