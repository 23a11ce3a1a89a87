"""Whole runs: rows, resuming, saved folders, and what may be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.eval.tokbench.annotations import AnnotatedImage, Annotations, Face, Word, read_pixels
from vistok.eval.tokbench.benchmark import PUBLISHED_RECOGNIZER, run_faces, run_text
from vistok.eval.tokbench.letterbox import letterbox, restore, through_jpeg

COUNTED, IGNORED = 0.03, 0.001
POINTS = ((20, 20), (40, 20), (30, 30), (22, 38), (38, 38))


class Grey:
    """Reads the grey level of a crop, in tens."""

    version, weights_sha256 = "1", "00"

    def __init__(self, id="grey"):
        self.id = id
        self.crops = 0

    def read(self, crops):
        self.crops += len(crops)
        return [f"w{int(np.median(crop)) // 10}" for crop in crops]


class Colour:
    id, version, weights_sha256, center = "colour", "1", "00", False

    def embed(self, image, landmarks):
        return image.reshape(-1, 3).mean(0) - 100


def pixels(number, height=60, width=90):
    image = np.zeros((height, width, 3), np.uint8)
    image[10:50, 10:80] = 55 + 30 * number
    return image


def image(number, ratio=COUNTED, suffix="png"):
    word = Word(f"w{(55 + 30 * number) // 10}", (15, 15, 75, 45), ratio)
    return AnnotatedImage(f"{number}.{suffix}", "", (word,), lambda: pixels(number))


def annotated(count=5, **changes):
    return Annotations("mine", tuple(image(number) for number in range(count)), **changes)


def darker(images):
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 256, 256)
    return images.clamp(max=120)


def test_rows_stand_beside_what_judged_them(tmp_path):
    result = run_text(darker, annotated(), 256, Grey(), tmp_path)
    assert json.loads(json.dumps(result))["kind"] == "text"
    assert result["rows"]["model"]["accuracy"]["medium"] == 3 / 5  # levels 55, 85 and 115 survive
    assert result["rows"]["resize"]["accuracy"]["medium"] == result["rows"]["original"]["accuracy"]["medium"] == 1
    assert result["recognizer"] == {"id": "grey", "version": "1", "weights_sha256": "00"}
    assert result["counts"] == {"small": 0, "medium": 5, "large": 0} and result["empty"] == ["small", "large"]
    assert result["buckets"]["small"] == [0.02, 0.03] and result["size"] == 256 and result["images"] == 5
    assert result["refined"] and result["save"] == "memory" and result["annotations"]["images"] == 5


def test_batches_do_not_change_the_result_and_progress_counts_every_image(tmp_path):
    annotations = Annotations("mine", (*annotated().images, image(7, IGNORED)))
    results = []
    for batch_size in (1, 2, 8):
        seen = []
        folder = tmp_path / str(batch_size)
        results.append(run_text(darker, annotations, 256, Grey(), folder, batch_size=batch_size, advance=seen.append))
        assert sum(seen) == 6
    assert str(results[0]) == str(results[1]) == str(results[2])


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    calls = []

    def dies(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return darker(images)

    whole = run_text(darker, annotated(), 256, Grey(), tmp_path / "whole", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_text(dies, annotated(), 256, Grey(), tmp_path / "killed", batch_size=2)
    reader, seen = Grey(), []
    result = run_text(darker, annotated(), 256, reader, tmp_path / "killed", batch_size=2, advance=seen.append)
    assert str(result) == str(whole)
    assert reader.crops == 3 and seen == [4, 1]  # the last image alone: original, resize, model
    again = Grey()
    assert str(run_text(darker, annotated(), 256, again, tmp_path / "killed")) == str(whole) and again.crops == 0


@pytest.mark.parametrize(
    "changes",
    [{"size": 512}, {"subject": "other"}, {"save": "jpeg75-if-jpg"}, {"refine": False}, {"annotations": annotated(4)}],
)
def test_another_run_does_not_go_on_in_the_same_folder(tmp_path, changes):
    arguments = {"annotations": annotated(), "size": 256, "recognizer": Grey(), "folder": tmp_path}
    run_text(lambda images: images, **arguments)
    with pytest.raises(ValueError, match="belongs to a run with other"):
        run_text(lambda images: images, **arguments | changes)


def test_originals_are_read_once_for_all_tokenizers(tmp_path):
    readers = [Grey(), Grey(), Grey("another")]
    for number, reader in enumerate(readers):
        run_text(darker, annotated(), 256, reader, tmp_path / str(number), cache=tmp_path / "cache")
    assert [reader.crops for reader in readers] == [15, 5, 15]


def save_rebuilt(folder, change=darker):
    folder.mkdir()
    for info in annotated().images:
        canvas, place = letterbox(info.load(), 256)
        changed = change(torch.from_numpy(canvas).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
        Image.fromarray(restore(np.ascontiguousarray(changed), place)).save(folder / info.name)


def test_a_folder_of_reconstructions_scores_as_the_tokenizer_does(tmp_path):
    save_rebuilt(tmp_path / "rec")
    saved = run_text(tmp_path / "rec", annotated(), 256, Grey(), tmp_path / "a")
    direct = run_text(darker, annotated(), 256, Grey(), tmp_path / "b")
    assert saved["rows"] == direct["rows"] or str(saved["rows"]) == str(direct["rows"])
    assert saved["save"] == "files"


def test_missing_and_wrong_reconstructions_are_named(tmp_path):
    save_rebuilt(tmp_path / "rec")
    Image.fromarray(pixels(0)[:30]).save(tmp_path / "rec" / "0.png")
    with pytest.raises(ValueError, match=r"0.png has 90 x 30 pixels, its original 90 x 60"):
        run_text(tmp_path / "rec", annotated(), 256, Grey(), tmp_path / "a")
    for name in ("1.png", "3.png"):
        (tmp_path / "rec" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks reconstructions of 2 of 5 images: 1.png, 3.png; they have"):
        run_text(tmp_path / "rec", annotated(), 256, Grey(), tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="there is no folder of reconstructions at"):
        run_text(tmp_path / "none", annotated(), 256, Grey(), tmp_path / "c")


def test_images_that_do_not_count_need_no_reconstruction(tmp_path):
    save_rebuilt(tmp_path / "rec")
    annotations = Annotations("mine", (*annotated().images, image(7, IGNORED)))
    assert run_text(tmp_path / "rec", annotations, 256, Grey(), tmp_path / "a")["images"] == 5


def test_jpeg_parity_compresses_reconstruction_and_resize_row(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (60, 90, 3), dtype=np.uint8)
    seen = []

    class Keeps(Grey):
        def read(self, crops):
            seen.extend(crops)
            return super().read(crops)

    for suffix in ("png", "jpg"):
        info = replace(image(0, suffix=suffix), load=lambda: noise)
        annotations = Annotations("mine", (info,))
        options = {"refine": False, "save": "jpeg75-if-jpg"}
        run_text(lambda images: images, annotations, 256, Keeps(), tmp_path / suffix, **options)
    plain = restore(*letterbox(noise, 256))
    compressed = through_jpeg(plain, "a.jpg")
    expected = [noise, plain, plain, noise, compressed, compressed]  # original, resize, model of both images
    for found, whole in zip(seen, expected, strict=True):
        assert np.array_equal(found, whole[15:45, 15:75])


@pytest.mark.parametrize(
    ("recognizer", "changes", "options", "reason"),
    [
        (PUBLISHED_RECOGNIZER, {}, {}, ""),
        ("parseq-00000000", {}, {}, "read by parseq-00000000, published numbers by parseq-56125471"),
        (PUBLISHED_RECOGNIZER, {"complete": False}, {}, "only a part of TokBench"),
        (PUBLISHED_RECOGNIZER, {"name": "x", "complete": False}, {"refine": False}, "x is not TokBench"),
        (PUBLISHED_RECOGNIZER, {}, {"size": 128}, "published sizes are 256, 512 and 1024 pixels"),
        (PUBLISHED_RECOGNIZER, {}, {"save": "memory"}, "published numbers contain the JPEG files"),
        (PUBLISHED_RECOGNIZER, {}, {"refine": True}, "the annotations were refined once more"),
    ],
)
def test_only_the_published_protocol_is_comparable(tmp_path, recognizer, changes, options, reason):
    annotations = replace(annotated(), **{"name": "tokbench", "complete": True} | changes)
    options = {"size": 256, "save": "jpeg75-if-jpg"} | options
    result = run_text(lambda images: images, annotations, recognizer=Grey(recognizer), folder=tmp_path, **options)
    assert result["comparable"] == (not reason)
    assert result["reason"].startswith(reason) and ";" not in result["reason"]


def test_only_the_publishers_own_recognizer_is_not_refined_again(tmp_path):
    annotations = replace(annotated(), name="tokbench", complete=True)
    for number, (reader, expected) in enumerate([(PUBLISHED_RECOGNIZER, False), ("grey", True)]):
        assert run_text(darker, annotations, 256, Grey(reader), tmp_path / str(number))["refined"] is expected
    assert run_text(darker, annotated(), 256, Grey(PUBLISHED_RECOGNIZER), tmp_path / "own")["refined"] is True


def test_hash_of_pixels_tells_other_images_apart(tmp_path):
    first = run_text(darker, annotated(), 256, Grey(), tmp_path / "a")
    other = replace(image(0), load=lambda: pixels(0) + 1)
    changed = Annotations("mine", (other, *annotated().images[1:]))
    second = run_text(darker, changed, 256, Grey(), tmp_path / "b")
    assert first["annotations"] == second["annotations"] and first["pixels_sha256"] != second["pixels_sha256"]


def test_a_reconstruction_of_another_form_is_refused(tmp_path):
    for wrong in (lambda images: images.float(), lambda images: images[..., :128]):
        with pytest.raises(ValueError, match=r"reconstruct must give uint8 \(5, 3, 256, 256\); got"):
            run_text(wrong, annotated(), 256, Grey(), tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        run_text(darker, annotated(), 256, Grey(), tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="save must be 'memory' or 'jpeg75-if-jpg'; got 'png'"):
        run_text(darker, annotated(), 256, Grey(), tmp_path / "other", save="png")


def test_faces_run_and_resume_like_text(tmp_path):
    faces = [AnnotatedImage(f"{n}.png", "", (Face(POINTS, 0.05 + 0.1 * n),), image(n).load) for n in range(3)]
    annotations = Annotations("mine", tuple(faces))
    result = run_faces(darker, annotations, 256, Colour(), tmp_path)
    assert result["counts"] == {"small": 1, "medium": 1, "large": 1} and not result["centered"]
    assert result["embedder"]["id"] == "colour" and result["kind"] == "faces"
    assert result["rows"]["resize"]["similarity"]["mean"] == pytest.approx(1, abs=1e-4)
    assert not result["comparable"] and result["reason"].startswith(
        "embedded by colour, published numbers by glintr100"
    )

    def never(images):
        raise AssertionError

    assert run_faces(never, annotations, 256, Colour(), tmp_path) == result


def test_faces_are_comparable_through_the_published_weights_alone(tmp_path):
    sha = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"
    embedder = type("Published", (Colour,), {"weights_sha256": sha})()
    face = AnnotatedImage("0.png", "", (Face(POINTS, 0.05),), image(0).load)
    annotations = Annotations("tokbench", (face,), complete=True)
    result = run_faces(darker, annotations, 256, embedder, tmp_path, save="jpeg75-if-jpg")
    assert result["comparable"] and result["reason"] == ""


def test_files_written_by_anybody_are_read_as_they_are(tmp_path):
    Image.fromarray(pixels(1)).save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(tmp_path / "a.png"), pixels(1))
