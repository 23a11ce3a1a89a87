"""T-ACC and T-NED."""

import math

import numpy as np
import pytest

from vistok.eval.tokbench.annotations import AnnotatedImage, Word
from vistok.eval.tokbench.buckets import Buckets
from vistok.eval.tokbench.journal import Journal
from vistok.eval.tokbench.text import TextJudge, compare, crop, edit_distance, text_summary

BUCKETS = Buckets((0.1, 0.2, 0.3, 1.0), False)


class Grey:
    """Reads the grey level of a crop, in tens: ``"w12"`` for levels 120 to 129."""

    id, version, weights_sha256 = "grey", "1", "00"

    def __init__(self):
        self.crops = 0

    def read(self, crops):
        self.crops += len(crops)
        return [f"w{int(np.median(part)) // 10}" for part in crops]


def grey_image(name, words, group="set"):
    """Words are ``(level, text, ratio)``, boxes of 20 x 10 pixels side by side; small enough a square to be exact."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    instances = []
    for number, (level, text, ratio) in enumerate(words):
        pixels[number * 10 : number * 10 + 10, 20:40] = level
        instances.append(Word(text, (20, number * 10, 40, number * 10 + 10), ratio))
    return AnnotatedImage(name, group, tuple(instances), lambda: pixels)


def judged(judge, images, change=lambda pixels: pixels):
    def rebuild(infos, originals):
        return [change(pixels) for pixels in originals]

    return judge.judge(images, [image.load() for image in images], rebuild)


def test_edit_distance_of_known_pairs():
    known = [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("a", "A", 1), ("ab", "ba", 2)]
    for a, b, distance in known:
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_equals_brute_force():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    random = np.random.RandomState(0)
    for _ in range(60):
        a, b = ("".join(random.choice(list("abc"), random.randint(6))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)


def test_similarity_divides_by_the_longer_string():
    assert compare("Exit", "Exit") == (True, 1.0)
    assert compare("Exit", "exit") == (False, 0.75)
    assert compare("Exit", "") == (False, 0.0)
    assert compare("ab", "abcdefgh") == (False, 0.25)
    assert compare("€", "xxxxxxxx") == (False, 0.0)


def test_spaces_go_only_where_the_word_has_none():
    assert compare("Exit", "Ex it")[0]
    assert compare("way out", "way out")[0]
    assert not compare("way out", "wayout")[0]


def test_crop_is_the_slice_of_the_box():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert np.array_equal(crop(image, (2, 1, 6, 4)), image[1:4, 2:6])


def test_buckets_pool_over_sets_and_small_text_is_ignored():
    images = [
        grey_image("a/1", [(50, "w5", 0.1), (60, "w6", 0.1), (70, "w7", 0.05)], "a"),
        grey_image("b/1", [(80, "zz", 0.1), (90, "w9", 0.25), (100, "w10", 0.3), (110, "w11", 1.0)], "b"),
    ]
    judge = TextJudge(Grey(), 64, BUCKETS, refine=False)
    summary = text_summary(judged(judge, images))
    assert summary["counts"] == {"small": 3, "medium": 1, "large": 1}
    assert summary["unrefined"] == summary["counts"] and summary["readable"] == 1 and summary["empty"] == []
    accuracy = summary["rows"]["model"]["accuracy"]
    assert accuracy == {"small": pytest.approx(2 / 3), "medium": 1, "large": 1, "mean": pytest.approx((2 / 3 + 2) / 3)}
    assert summary["rows"]["model"] == summary["rows"]["resize"] == summary["rows"]["original"]
    assert summary["groups"]["a"]["accuracy"]["small"] == 1 and summary["groups"]["a"]["counts"]["small"] == 2
    assert summary["groups"]["b"]["accuracy"]["small"] == 0 and math.isnan(summary["groups"]["a"]["accuracy"]["mean"])


def test_model_row_sees_the_reconstruction_alone():
    images = [grey_image("a", [(50, "w5", 0.1), (200, "w20", 0.2), (100, "w10", 0.3)])]
    judge = TextJudge(Grey(), 64, BUCKETS, refine=True)
    rows = text_summary(judged(judge, images, lambda pixels: np.minimum(pixels, 150)))["rows"]
    assert rows["model"]["accuracy"] == {"small": 1, "medium": 0, "large": 1, "mean": pytest.approx(2 / 3)}
    assert rows["model"]["similarity"]["medium"] == pytest.approx(1 / 3)  # w15 for w20
    assert rows["resize"]["accuracy"]["mean"] == rows["original"]["accuracy"]["mean"] == 1


def test_resize_row_goes_through_the_square():
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[::2] = 255  # stripes that a small square turns to grey
    image = AnnotatedImage("a", "", (Word("w0", (0, 1, 20, 2), 0.1),), lambda: pixels)
    entry = judged(TextJudge(Grey(), 16, BUCKETS, refine=False), [image])[0]
    bucket, target, model, resize, original = entry["words"][0]
    assert (bucket, target, model, original) == (0, "w0", "w0", "w0") and resize in ("w12", "w13")


def test_refining_keeps_what_is_read_on_the_original_and_is_idempotent():
    words = [(50, "w5", 0.1), (60, "unreadable", 0.1), (70, "w7", 0.2), (80, "w8", 0.3)]
    judge = TextJudge(Grey(), 64, BUCKETS, refine=True)
    summary = text_summary(judged(judge, [grey_image("a", words)]))
    assert summary["counts"] == {"small": 1, "medium": 1, "large": 1}
    assert summary["unrefined"]["small"] == 2 and summary["readable"] == 3 / 4
    assert summary["rows"]["original"]["accuracy"]["mean"] == 1
    again = text_summary(judged(judge, [grey_image("a", [words[0], *words[2:]])]))
    assert again["rows"] == summary["rows"] and again["counts"] == summary["counts"]


def test_images_without_a_readable_word_are_not_reconstructed():
    images = [grey_image("a", [(60, "unreadable", 0.1)]), grey_image("b", [(50, "w5", 0.1)])]
    seen = []
    judge = TextJudge(Grey(), 64, BUCKETS, refine=True)

    def rebuild(infos, originals):
        seen.extend(info.name for info in infos)
        return originals

    entries = judge.judge(images, [image.load() for image in images], rebuild)
    assert seen == ["b"] and [entry["image"] for entry in entries] == ["a", "b"]
    assert entries[0]["words"][0][2] is None and entries[1]["words"][0][2] == "w5"


def test_nothing_readable_is_said_and_not_a_number():
    judge = TextJudge(Grey(), 64, BUCKETS, refine=True)
    summary = text_summary(judged(judge, [grey_image("a", [(60, "unreadable", 0.1)])]))
    assert summary["empty"] == ["small", "medium", "large"] and summary["readable"] == 0
    assert math.isnan(summary["rows"]["model"]["accuracy"]["mean"])
    assert math.isnan(text_summary([])["readable"])


def test_readings_of_originals_are_kept_for_the_next_tokenizer(tmp_path):
    images = [grey_image("a", [(50, "w5", 0.1), (60, "w6", 0.2)])]
    readers = [Grey(), Grey(), Grey()]
    for reader in readers[:2]:
        judge = TextJudge(reader, 64, BUCKETS, True, readings=Journal(tmp_path / "r.jsonl", {}))
        entries = judged(judge, images)
        assert [word[1:] for word in entries[0]["words"]] == [["w5"] * 4, ["w6"] * 4]
    assert [reader.crops for reader in readers[:2]] == [6, 2]  # the second reads the reconstruction alone
    changed = [grey_image("a", [(50, "w5", 0.1), (70, "w6", 0.2)])]  # other pixels under the same name
    judged(TextJudge(readers[2], 64, BUCKETS, True, readings=Journal(tmp_path / "r.jsonl", {})), changed)
    assert readers[2].crops == 5


def test_a_box_beyond_the_pixels_is_read_as_nothing():
    image = AnnotatedImage("a", "", (Word("w0", (70, 0, 90, 9), 0.1),), lambda: np.zeros((64, 64, 3), np.uint8))
    entry = judged(TextJudge(Grey(), 64, BUCKETS, refine=False), [image])[0]
    assert entry["words"] == [[0, "w0", "", "", ""]]


def test_a_recognizer_that_loses_crops_is_an_error():
    class Loses(Grey):
        def read(self, crops):
            return super().read(crops)[1:]

    with pytest.raises(ValueError, match="one text per crop; got 0 for 1"):
        judged(TextJudge(Loses(), 64, BUCKETS, refine=False), [grey_image("a", [(50, "w5", 0.1)])])
