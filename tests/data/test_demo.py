"""The photographs that ship with scikit-image."""

from __future__ import annotations

import sys

import pytest
import torch
from skimage.data import data_dir

from vistok.data.demo import PHOTOGRAPHS, DemoPhotographs
from vistok.data.images import read_image


@pytest.fixture(scope="module")
def splits() -> tuple[DemoPhotographs, DemoPhotographs]:
    return DemoPhotographs("train", num_samples=20), DemoPhotographs("val")


def test_training_and_validation_share_no_pixel(splits):
    train, val = splits
    windows = [val.read(i) for i in range(len(val))]
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = read_image(f"{data_dir}/{name}")
        left = train.read(label).image
        assert torch.equal(left, photograph[..., : left.shape[2]]), "a training sample is the left part"
        right = photograph[..., left.shape[2] :]
        assert abs(left.shape[2] - 2 * right.shape[2]) <= 2
        mine = [sample for sample in windows if sample.label == label]
        side = right.shape[2]
        assert len(mine) == right.shape[1] // side >= 1
        for i, sample in enumerate(mine):
            assert torch.equal(sample.image, right[:, i * side : (i + 1) * side]), "validation tiles the right part"


def test_every_sample_is_colour_and_reads_the_same_twice(splits):
    train, _ = splits
    for i in range(len(PHOTOGRAPHS)):
        image = train.read(i).image.float()
        assert image.dtype == torch.float and image.shape[0] == 3
        assert (image[0] - image[2]).abs().mean() > 1, "a grey picture"
        assert torch.equal(train.read(i).image, train.read(i).image)


def test_the_epoch_length_is_virtual(splits):
    train, val = splits
    assert len(train) == 20 and len(DemoPhotographs()) == 2048 and len(DemoPhotographs("val", 500)) == 500
    assert train.read(19).key == train.read(19 % len(PHOTOGRAPHS)).key
    assert len({val.read(i).key for i in range(len(val))}) == len(val) > len(PHOTOGRAPHS)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'train' or 'val'.*'test'"):
        DemoPhotographs("test")
    with pytest.raises(ValueError, match="num_samples.*0"):
        DemoPhotographs(num_samples=0)


def test_missing_pictures_are_named(tmp_path, monkeypatch):
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "skimage")
    with pytest.raises(FileNotFoundError, match=r"lacks .*astronaut.*scikit-image>=0.24"):
        DemoPhotographs().prepare()
