"""Pages of words that are made, not downloaded."""

from dataclasses import replace

import numpy as np
import pytest

from vistok.eval.metric import MetricUnavailable
from vistok.eval.tokbench.annotations import Annotations
from vistok.eval.tokbench.benchmark import run_text
from vistok.eval.tokbench.buckets import text_buckets
from vistok.eval.tokbench.journal import pixels_sha256
from vistok.eval.tokbench.recognizer import make_recognizer
from vistok.eval.tokbench.synthetic import SMALLEST_SIZE, synthetic_text


def blur(factor):
    from torch.nn.functional import interpolate

    def reconstruct(images):
        small = interpolate(images.float(), scale_factor=1 / factor, mode="bilinear", antialias=True)
        return interpolate(small, images.shape[2:], mode="bilinear").round().clamp(0, 255).byte()

    return reconstruct


def test_a_seed_gives_the_same_pages_again():
    first, second, other = synthetic_text(2), synthetic_text(2), synthetic_text(2, seed=1)
    assert first.sha256 == second.sha256 != other.sha256
    hashes = [pixels_sha256(part.images[1].load()) for part in (first, second, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_pages_do_not_depend_on_how_many_there_are():
    assert synthetic_text(3).images[:2] == synthetic_text(2).images


def test_squares_too_small_for_the_largest_words_are_refused():
    assert synthetic_text(1, SMALLEST_SIZE).images
    with pytest.raises(MetricUnavailable, match="at least 64 pixels; got 32"):
        synthetic_text(1, 32)


@pytest.mark.parametrize(("size", "least"), [(96, 6), (256, 40), (512, 80), (1024, 80)])
def test_every_bucket_is_filled_at_every_size(size, least):
    annotations, buckets = synthetic_text(6, size), text_buckets(size)
    found = [buckets.find(word.ratio) for image in annotations.images for word in image.instances]
    assert min(found.count(number) for number in range(3)) >= least
    assert found.count(None) <= 0.05 * len(found)


def test_boxes_hold_all_the_ink():
    for image in synthetic_text(4).images:
        pixels = image.load().astype(int)
        assert pixels.dtype == int and min(pixels.shape[:2]) >= 256
        for word in image.instances:
            left, top, right, bottom = word.box
            inside = pixels[top:bottom, left:right]
            ring = [pixels[top - 2, left:right], pixels[bottom + 1, left:right], pixels[top:bottom, left - 2]]
            background = np.median(np.concatenate([*ring, pixels[top:bottom, right + 1]]), 0)
            contrast = np.abs(inside - background).sum(-1)
            assert contrast.max() > 200  # there is ink inside
            for part in ring:
                assert np.abs(part - background).sum(-1).max() < 150  # and none just outside


def test_boxes_lie_apart_and_on_the_page():
    for image in synthetic_text(4).images:
        covered = np.zeros(image.load().shape[:2], int)
        for left, top, right, bottom in (word.box for word in image.instances):
            assert 0 <= left < right <= covered.shape[1] and 0 <= top < bottom <= covered.shape[0]
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_text_is_dark_on_light_and_light_on_dark():
    lighter = []
    for image in synthetic_text(4).images:
        pixels = image.load().mean(-1)
        for left, top, right, bottom in (word.box for word in image.instances):
            inside = pixels[top:bottom, left:right]
            lighter.append(np.median(pixels[top - 2, left:right]) < (inside.min() + inside.max()) / 2)
    assert 0.15 < np.mean(lighter) < 0.85


def test_no_pages_are_refused():
    with pytest.raises(ValueError, match="pages must be at least 1; got 0"):
        synthetic_text(0)


def test_a_recognizer_tells_blurs_apart(tmp_path):
    pytest.importorskip("rapidocr", reason="rapidocr is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    reader, (page,), buckets = make_recognizer("rapidocr"), synthetic_text(1).images, text_buckets(256)
    words = [[word for word in page.instances if buckets.find(word.ratio) == number][:6] for number in range(3)]
    annotations = Annotations("synthetic", (replace(page, instances=tuple(sum(words, []))),))
    found = {}
    for name, reconstruct in (("whole", lambda images: images), ("2x", blur(2)), ("3x", blur(3))):
        found[name] = run_text(reconstruct, annotations, 256, reader, tmp_path / name, refine=False, cache=tmp_path)
    scores = {name: result["rows"]["model"] for name, result in found.items()}
    for kind in ("accuracy", "similarity"):
        assert scores["whole"][kind]["mean"] - 0.05 > scores["2x"][kind]["mean"] > scores["3x"][kind]["mean"] + 0.05
    assert scores["whole"]["accuracy"]["mean"] > 0.9
    assert scores["3x"]["accuracy"]["small"] < scores["3x"]["accuracy"]["large"]
    assert found["whole"]["rows"]["model"] == found["whole"]["rows"]["resize"] == found["3x"]["rows"]["resize"]
    assert not found["whole"]["comparable"]
