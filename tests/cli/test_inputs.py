"""From inputs to named images, and from names to output paths."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.cli.errors import CommandError
from vistok.cli.inputs import find_images, png_paths, unique_names

SUFFIXES = (".png", ".jpg")


@pytest.fixture
def tree(tmp_path):
    files = ["b.png", "a.JPG", "x/a.jpg", "x/y/a.jpg", "x/.cache/a.jpg", ".b.png", "notes.txt", "odd[1].png"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(*inputs):
    return [image.name for image in find_images([str(text) for text in inputs], SUFFIXES)]


def test_folder_is_searched_to_the_bottom_and_sorted(tree):
    assert names(tree) == ["a.JPG", "b.png", "odd[1].png", "x/a.jpg", "x/y/a.jpg"]
    assert names(tree / "x") == ["a.jpg", "y/a.jpg"]


def test_every_name_leads_to_its_own_file(tree):
    for image in find_images([str(tree)], SUFFIXES):
        assert image.path.read_text() == image.name


def test_file_is_taken_whatever_its_suffix_and_keeps_its_own_name(tree):
    assert names(tree / "x" / "a.jpg", tree / "notes.txt") == ["a.jpg", "notes.txt"]
    assert names(tree / "odd[1].png") == ["odd[1].png"], "a file that exists is no pattern"


def test_glob_names_are_relative_to_what_is_fixed(tree):
    assert names(tree / "*") == ["a.JPG", "b.png", "odd[1].png"]
    assert names(tree / "x" / "**" / "a.*") == ["a.jpg", "y/a.jpg"]
    assert names(tree / "?" / "a.jpg") == ["x/a.jpg"]


def test_equal_names_are_told_apart(tree):
    assert names(tree / "x", tree / "x" / "a.jpg", tree / "x" / "y") == ["a.jpg", "y/a.jpg", "a-2.jpg", "a-3.jpg"]


def test_links_that_lead_back_up_end(tree):
    (tree / "x" / "back").symlink_to(tree)
    assert len(names(tree)) == 5


def test_inputs_without_images_are_refused(tree):
    (tree / "empty").mkdir()
    for text, message in [
        (tree / "none.png", "there is no file or folder"),
        (tree / "empty", "holds no images; looked for files ending in .jpg, .png"),
        (tree / "*.gif", "holds no images"),
    ]:
        with pytest.raises(CommandError, match=message):
            names(tree, text)


NAMES = st.lists(st.sampled_from(["a", "a.png", "a-2.png", "a-3.png", "x/a.png", "x/a-2.png", "a-2-2.png"]))


@given(NAMES, NAMES)
def test_unique_names_are_unique_and_keep_what_was_unique(wanted, taken):
    result = unique_names(wanted, taken)
    assert len(set(result)) == len(result) == len(wanted) and not set(result) & set(taken)
    for name, new in zip(wanted, result, strict=True):
        if name not in taken and wanted.index(name) == result.index(new):
            assert new == name
        assert Path(new).parent == Path(name).parent and Path(new).suffix == Path(name).suffix


def test_png_paths_replace_image_suffixes_only():
    folder = Path("out")
    found = png_paths(["a.jpg", "b.v1", "x/c.PNG", "a.png"], folder, SUFFIXES, taken=["b.v1.png"])
    assert [path.as_posix() for path in found] == ["out/a.png", "out/b.v1-2.png", "out/x/c.png", "out/a-2.png"]


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "x/..", ".", ""])
def test_png_paths_never_lead_out_of_the_folder(name):
    with pytest.raises(CommandError, match="leads out of the output folder"):
        png_paths(["good.png", name], Path("out"), SUFFIXES)
