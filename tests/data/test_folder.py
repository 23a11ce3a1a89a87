"""Folders of images: what is found, in which order, with which label."""

from __future__ import annotations

import os
import pickle

import pytest

from vistok.data.folder import ImageFolder
from vistok.data.images import ImageError


def fill(root, picture, *names):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed, format="PNG"))


def test_nested_images_are_sorted_and_labelled_by_their_top_folder(tmp_path, picture):
    fill(tmp_path, picture, "dog/x/2.png", "cat/9.PNG", "dog/1.jpeg", "cat/.hidden.png", ".git/3.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    folder = ImageFolder(str(tmp_path))
    samples = [folder.read(i) for i in range(len(folder))]
    assert [sample.key for sample in samples] == ["cat/9.PNG", "dog/1.jpeg", "dog/x/2.png"]
    assert [sample.label for sample in samples] == [0, 1, 1]
    assert samples[0].image.shape == (3, 24, 32)


def test_labels_are_unknown_when_an_image_lies_at_the_top(tmp_path, picture):
    fill(tmp_path, picture, "a/1.png", "2.png")
    folder = ImageFolder(str(tmp_path))
    assert {folder.read(i).label for i in range(len(folder))} == {-1}


def test_a_linked_folder_is_followed_and_a_loop_is_not(tmp_path, picture):
    fill(tmp_path / "elsewhere", picture, "1.png")
    root = tmp_path / "root"
    fill(root, picture, "a/2.png")
    os.symlink(tmp_path / "elsewhere", root / "b")
    os.symlink(root, root / "a" / "loop")
    folder = ImageFolder(str(root))
    assert [folder.read(i).key for i in range(len(folder))] == ["a/2.png", "b/1.png"]


def test_a_missing_an_empty_and_a_false_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*does not exist"):
        ImageFolder(str(tmp_path / "nowhere")).prepare()
    with pytest.raises(ValueError, match=f"no image below '{tmp_path}'.*\\.jpg"):
        len(ImageFolder(str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is not a folder"):
        ImageFolder(str(tmp_path / "file")).prepare()


def test_a_broken_image_is_an_error_of_that_sample_alone(tmp_path, picture):
    fill(tmp_path, picture, "a.png", "c.png")
    (tmp_path / "b.png").write_bytes(b"")
    folder = ImageFolder(str(tmp_path))
    with pytest.raises(ImageError, match="b.png.*empty"):
        folder.read(1)
    assert folder.read(2).key == "c.png"


def test_odd_file_names_and_pickling_survive(tmp_path, picture):
    fill(tmp_path, picture, "sp ace ü.png", "{a}.png")
    folder = ImageFolder(str(tmp_path))
    folder.prepare()
    copy = pickle.loads(pickle.dumps(folder))
    assert [copy.read(i).key for i in range(2)] == ["sp ace ü.png", "{a}.png"]
