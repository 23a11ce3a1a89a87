"""Annotations, published and one's own."""

import json

import numpy as np
import pytest
from PIL import Image

from vistok.eval.tokbench.annotations import TEXT_SETS, read_faces, read_text, tokbench_faces, tokbench_text

WORD = {"rec": "Exit", "bbox": [10, 5, 50, 15]}
POINTS = [[20, 20], [40, 20], [30, 30], [22, 38], [38, 38]]


def save_image(path, width=100, height=60, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def own(tmp_path, entries, name="words.jsonl"):
    save_image(tmp_path / "a.png")
    lines = "\n".join(json.dumps(entry) for entry in entries)
    (tmp_path / name).write_text(lines if name.endswith("jsonl") else json.dumps(entries))
    return tmp_path / name


def test_ratio_is_the_advance_of_a_character_per_longest_side(tmp_path):
    file = own(tmp_path, [{"file_name": "a.png", "annotations": [WORD, WORD | {"rec": "ab", "bbox": [0, 0, 10, 30]}]}])
    words = read_text(file).images[0].instances
    assert words[0].ratio == 40 / (4 * 100)
    assert words[1].ratio == 30 / (2 * 100)  # an upright word: its longer side counts
    save_image(tmp_path / "b.png", 60, 90)
    file.write_text(json.dumps({"file_name": "b.png", "annotations": [WORD]}))
    assert read_text(file).images[0].instances[0].ratio == 40 / (4 * 90)  # an upright image: its longest side


def test_pixels_are_those_that_boxes_were_drawn_on(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it
    Image.new("RGB", (100, 60)).save(tmp_path / "turned.jpg", exif=exif)
    file = own(tmp_path, [{"file_name": "turned.jpg", "annotations": [WORD]}])
    assert read_text(file).images[0].load().shape == (60, 100, 3)


@pytest.mark.parametrize("name", ["words.jsonl", "words.json"])
def test_own_files_are_read_with_images_beside_them(tmp_path, name):
    file = own(tmp_path, [{"file_name": "a.png", "annotations": [WORD | {"ratio": 0.5}]}], name)
    annotations = read_text(file)
    assert annotations.name == name and not annotations.complete
    image = annotations.images[0]
    assert (image.name, image.instances[0].text, image.instances[0].box) == ("a.png", "Exit", (10, 5, 50, 15))
    assert image.instances[0].ratio == 0.5
    assert np.array_equal(image.load(), save_image(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"annotations": []}, r"words.jsonl, image 0: file_name .* must name an image"),
        ({"file_name": "a.png"}, r"image 0 \(a.png\): annotations must be a list of objects; got None"),
        ({"file_name": "a.png", "annotations": [WORD, {"bbox": [0, 0, 1, 1]}]}, "annotation 1: rec must be a string"),
        ({"file_name": "a.png", "annotations": [WORD | {"bbox": [1, 2, 3]}]}, "bbox must be left, top, right, bottom"),
        ({"file_name": "a.png", "annotations": [WORD | {"bbox": [0, 0, "9", 9]}]}, "bbox must be left, top"),
        ({"file_name": "a.png", "annotations": [WORD | {"bbox": [90, 5, 110, 15]}]}, "image of 100 x 60 pixels"),
        ({"file_name": "a.png", "annotations": [WORD | {"bbox": [50, 5, 50, 15]}]}, "must lie on the image"),
        ({"file_name": "a.png", "annotations": [WORD | {"ratio": -1}]}, "ratio must be a number of at least 0"),
        ({"file_name": "../a.png", "annotations": []}, "must lie below"),
        ({"file_name": "a.png", "width": 0, "height": 5, "annotations": []}, "width and height must be positive"),
        ([1], "image 0: must be an object; got list"),
    ],
)
def test_wrong_fields_are_named_with_their_place(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        read_text(own(tmp_path, [entry]))


def test_missing_images_are_counted_and_named(tmp_path):
    entries = [{"file_name": f"{i}.png", "annotations": []} for i in range(5)]
    with pytest.raises(FileNotFoundError, match=r"0.png.*1.png.*2.png and 2 more"):
        read_text(own(tmp_path, entries))


def test_files_that_are_no_annotations_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no annotations at"):
        read_text(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_text(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of images; got dict"):
        read_text(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no images"):
        read_text(tmp_path / "bad.json")


def test_an_image_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names a.png twice"):
        read_text(own(tmp_path, [{"file_name": "a.png", "annotations": []}] * 2))


def published(root):
    (root / "annotations").mkdir()
    for number, name in enumerate(TEXT_SETS):
        save_image(root / "images" / "text_data" / name / "img_1.jpg", seed=number)
        words = [WORD | {"ratio": 0.025, "bbox": [90, 5, 110, 15]}]
        entry = {"file_name": "img_1.jpg", "height": 60, "width": 100, "annotations": words}
        (root / "annotations" / f"text_{name}.json").write_text(json.dumps([entry]))
    save_image(root / "images" / "face_data" / "0" / "f.jpg")
    faces = [{"kps": POINTS, "box": [10, 10, 50, 50], "ratio": 0.4, "gt": 1}]
    entry = {"image_name": "0/f.jpg", "img_height": 60, "img_width": 100, "faces": faces}
    (root / "annotations" / "face_meta.json").write_text(json.dumps([entry]))


def test_published_layout_is_read_whole(tmp_path):
    published(tmp_path)
    text = tokbench_text(tmp_path)
    assert text.name == "tokbench" and text.complete
    assert [image.name for image in text.images] == [f"{name}/img_1.jpg" for name in TEXT_SETS]
    assert [image.group for image in text.images] == list(TEXT_SETS)
    word = text.images[0].instances[0]
    assert word.box == (90, 5, 100, 15) and word.ratio == 0.025  # cut at the border, the stated ratio kept
    faces = tokbench_faces(tmp_path)
    assert faces.complete and faces.images[0].instances[0].ratio == 0.4
    assert faces.images[0].instances[0].landmarks[2] == (30, 30)


def test_a_part_of_tokbench_is_not_complete(tmp_path):
    published(tmp_path)
    assert not tokbench_text(tmp_path, ["ic13"]).complete
    assert not tokbench_text(tmp_path).head(3).complete
    assert tokbench_text(tmp_path).head(8).complete
    with pytest.raises(ValueError, match="sets must be among .*; got ic99"):
        tokbench_text(tmp_path, ["ic99"])
    (tmp_path / "annotations" / "text_tt.json").unlink()
    with pytest.raises(FileNotFoundError, match="text_tt.json"):
        tokbench_text(tmp_path)


def test_ratio_of_a_face_is_its_longer_side(tmp_path):
    face = {"kps": POINTS, "box": [10, 10, 40, 50]}
    file = own(tmp_path, [{"image_name": "a.png", "faces": [face]}])
    assert read_faces(file).images[0].instances[0].ratio == 40 / 100
    for wrong in (face | {"kps": POINTS[:4]}, face | {"kps": [[1, 1]] * 5}, {"kps": [1, [2]]}):
        with pytest.raises(ValueError, match=r"face 0: kps must be five pairs"):
            read_faces(own(tmp_path, [{"image_name": "a.png", "faces": [wrong]}]))


def test_hash_changes_with_every_word_and_not_with_the_folder(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    entry = {"file_name": "a.png", "annotations": [WORD]}
    first, second = read_text(own(tmp_path / "x", [entry])), read_text(own(tmp_path / "y", [entry]))
    assert first.sha256 == second.sha256
    others = [WORD | {"rec": "exit"}, WORD | {"bbox": [10, 5, 51, 15]}, WORD | {"ratio": 0.3}]
    hashes = {read_text(own(tmp_path, [entry | {"annotations": [word]}])).sha256 for word in others}
    assert len(hashes | {first.sha256}) == 4
