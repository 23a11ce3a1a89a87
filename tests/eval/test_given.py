"""Reconstructions of other projects: paired by name, and refused where they do not pair up."""

import pytest
import torch

from vistok.data.images import ImageError, save_png
from vistok.eval.given import GivenReconstructions


def folder(path, *names, side=8):
    for number, name in enumerate(names):
        save_png(torch.full((3, side, side), 10 * number, dtype=torch.uint8), path / name)
    return str(path)


def test_images_pair_up_by_name_whatever_their_suffix(tmp_path):
    rec = folder(tmp_path / "rec", "b/2.png", "a/1.png")
    ref = folder(tmp_path / "ref", "a/1.jpeg", "b/2.JPG")  # PNG inside; the suffix is only a name
    source = GivenReconstructions(rec, ref)
    first, second = source.read(0), source.read(1)
    assert (first.key, second.key) == ("a/1.jpeg", "b/2.JPG")
    assert (first.label, second.label) == (0, 1)
    assert [int(image[0, 0, 0]) for image in (first.image, first.target, second.image, second.target)] == [0, 10, 10, 0]


def test_images_without_a_partner_are_named(tmp_path):
    rec = folder(tmp_path / "rec", "1.png", "2.png", "5.png")
    ref = folder(tmp_path / "ref", "1.png", "2.png", "3.png", "4.png")
    with pytest.raises(
        ValueError, match=r"3 reconstructions and 4 references do not pair up: 3: no reconstruction"
    ) as e:
        GivenReconstructions(rec, ref).prepare()
    assert "5: no reference" in str(e.value) and "--allow-missing" in str(e.value)
    source = GivenReconstructions(rec, ref, allow_missing=True)
    assert len(source) == 2 and len(source.missing) == 3


def test_folders_without_a_common_name_are_refused_in_any_case(tmp_path):
    rec, ref = folder(tmp_path / "rec", "1.png"), folder(tmp_path / "ref", "2.png")
    with pytest.raises(ValueError, match="do not pair up"):
        GivenReconstructions(rec, ref, allow_missing=True).prepare()


def test_two_files_of_one_name_are_refused(tmp_path):
    rec, ref = folder(tmp_path / "rec", "1.png", "1.jpg"), folder(tmp_path / "ref", "1.png")
    with pytest.raises(ValueError, match=r"1\.jpg and 1\.png have one name"):
        GivenReconstructions(rec, ref).prepare()


def test_a_missing_folder_and_a_damaged_file_are_named(tmp_path):
    rec = folder(tmp_path / "rec", "1.png")
    with pytest.raises(FileNotFoundError, match="--ref: the image folder"):
        GivenReconstructions(rec, str(tmp_path / "none")).prepare()
    ref = folder(tmp_path / "ref", "1.png")
    (tmp_path / "rec/1.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"rec/1\.png"):
        GivenReconstructions(rec, ref).read(0)


def test_the_dataset_is_that_of_the_references(tmp_path):
    rec, ref = folder(tmp_path / "rec", "1.png"), folder(tmp_path / "ref", "1.png")
    before = GivenReconstructions(rec, ref).manifest()
    folder(tmp_path / "rec", "1.png", side=40)
    assert GivenReconstructions(rec, ref).manifest() == before  # what is known of the originals stays known
    folder(tmp_path / "ref", "1.png", side=40)
    assert GivenReconstructions(rec, ref).manifest() != before
