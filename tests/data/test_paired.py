"""Pairs of images: found by name, cropped and mirrored alike, resumed exactly."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.images import ImageError
from vistok.data.loader import ImageLoader
from vistok.data.paired import PairedFolder
from vistok.data.transforms import EvalTransform, TrainTransform

NAMES = ["cat/1", "cat/2", "dog/1", "dog/2", "dog/3", "fox/1"]


def positions(size: tuple[int, int], shift: int, format: str = "PNG") -> bytes:
    """A picture whose red and green are row and column, so a crop shows where it was taken; blue tells them apart."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([rows * 4, columns * 4, np.full(size, shift)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def fill(root, names, shift, size=(40, 50), suffix=".png"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}{suffix}").write_bytes(positions(size, shift))


@pytest.fixture
def roots(tmp_path):
    fill(tmp_path / "generated", NAMES, 10)
    fill(tmp_path / "real", [*NAMES, "fox/2", "wolf/1"], 200)
    return str(tmp_path / "generated"), str(tmp_path / "real")


def loader(source, training=True, **options) -> ImageLoader:
    transform = TrainTransform(16, "random_resized", (0.3, 1.0), 0.5) if training else EvalTransform(16)
    return ImageLoader(source, transform, 3, training=training, seed=5, **options)


def test_partners_have_one_relative_name_and_targets_without_input_are_left_alone(roots):
    source = PairedFolder(*roots)
    samples = [source.read(i) for i in range(len(source))]
    assert [sample.key for sample in samples] == [f"{name}.png" for name in NAMES]
    assert [sample.label for sample in samples] == [0, 0, 1, 1, 1, 2]
    for sample in samples:
        assert sample.image.shape == sample.target.shape == (3, 40, 50)
        assert (sample.image[2] == 10).all() and (sample.target[2] == 200).all()
    copied = pickle.loads(pickle.dumps(source))
    assert copied.read(3).key == "dog/2.png"


def test_suffixes_may_differ_but_not_leave_a_choice(tmp_path):
    fill(tmp_path / "a", ["x/1", "x/2.b"], 10)
    fill(tmp_path / "b", ["x/1"], 20, suffix=".WEBP")
    fill(tmp_path / "b", ["x/2.b"], 30)
    source = PairedFolder(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [int(source.read(i).target[2, 0, 0]) for i in range(2)] == [20, 30]
    fill(tmp_path / "b", ["x/1"], 30, suffix=".bmp")
    with pytest.raises(ValueError, match="x/1.png could belong to x/1.WEBP and x/1.bmp"):
        len(PairedFolder(str(tmp_path / "a"), str(tmp_path / "b")))


def test_missing_partners_and_folders_are_named(tmp_path, roots):
    fill(tmp_path / "generated", [f"new/{i}" for i in range(7)], 10)
    with pytest.raises(FileNotFoundError, match=r"7 of 13 inputs .* below '.*real': new/0.png, .*new/4.png, \.\.\.$"):
        PairedFolder(*roots).prepare()
    with pytest.raises(FileNotFoundError, match="input_root: .*nowhere"):
        PairedFolder(str(tmp_path / "nowhere"), roots[1]).prepare()
    with pytest.raises(FileNotFoundError, match="target_root: .*nowhere"):
        PairedFolder(roots[0], str(tmp_path / "nowhere")).prepare()


def test_sizes_that_differ_are_an_error_of_that_sample(tmp_path, roots):
    fill(tmp_path / "real", ["cat/2"], 200, (50, 40))
    source = PairedFolder(*roots)
    with pytest.raises(ImageError, match="generated/cat/2.png: has 50x40 pixels, its target 40x50; bring"):
        source.read(1)
    (tmp_path / "real" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(ImageError, match="real/dog/1.png.*empty"):
        source.read(2)
    assert len(next(iter(loader(source)))["key"]) == 3


@pytest.mark.parametrize("training", [True, False])
def test_input_and_target_go_through_the_same_crop_and_mirror(roots, training):
    subject = loader(PairedFolder(*roots), training)
    crops = set()
    for _ in range(3):
        for batch in subject:
            assert batch["target"].dtype == torch.uint8 and batch["target"].shape == batch["image"].shape
            assert torch.equal(batch["image"][:, :2], batch["target"][:, :2])
            assert (batch["image"][:, 2] == 10).all() and (batch["target"][:, 2] == 200).all()
            crops |= {tuple(image[:2].flatten().tolist()) for image in batch["image"]}
    assert len(crops) == (18 if training else 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_exactly_the_remaining_pairs(roots, workers):
    def contents(batches):
        return [(b["key"], b["index"].tolist(), b["image"].tolist(), b["target"].tolist()) for b in batches]

    options = {"num_workers": workers, "multiprocessing_context": "fork"}
    whole = loader(PairedFolder(*roots), **options)
    expected = [contents(whole) for _ in range(2)]
    resumed = loader(PairedFolder(*roots), **options)
    resumed.load_state_dict(resumed.state_dict() | {"epoch": 1, "batches": 1})
    assert contents(resumed) == expected[1][1:]
    whole.close(), resumed.close()
