"""A handful of colour photographs that come with scikit-image: something to train on without any download.

Eight pictures teach no tokenizer about the world, but they show within minutes that training works.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from torch import Tensor

from .images import read_image
from .source import ImageSource, Sample

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


class DemoPhotographs(ImageSource):
    """Photographs shipped inside the scikit-image package, decoded once and kept in memory.

    The left two thirds of every photograph are for training, the right third for validation, so the two share no
    pixel. A training sample is the whole training part of one photograph: crop it with ``random_resized``. A
    validation sample is a square window of a validation part; the windows tile that part from top to bottom.

    Args:
        split: ``train`` or ``val``.
        num_samples: length of an epoch; photographs (or windows) repeat to fill it. By default 2048 for training, and
            every window once for validation.

    Raises:
        ValueError: for another split or a length below 1.
    """

    def __init__(self, split: Literal["train", "val"] = "train", num_samples: int | None = None) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val'; got {split!r}")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1; got {num_samples}")
        self.split = split
        self.num_samples = num_samples
        self._samples: list[Sample] = []

    def prepare(self) -> None:
        """Decode the photographs.

        Raises:
            FileNotFoundError: if scikit-image, or one of its pictures, is not there.
        """
        if self._samples:
            return
        folder = _picture_folder()
        missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"scikit-image at {folder} lacks {missing}; install scikit-image>=0.24 from PyPI")
        samples = []
        for label, name in enumerate(PHOTOGRAPHS):
            photograph, stem = read_image(folder / name), Path(name).stem
            cut = photograph.shape[2] * 2 // 3
            if self.split == "train":
                samples.append(Sample(photograph[..., :cut].contiguous(), label, stem))
            else:
                windows = _windows(photograph[..., cut:])
                samples += [Sample(window, label, f"{stem}-{i}") for i, window in enumerate(windows)]
        self._samples = samples

    def __len__(self) -> int:
        if self.num_samples is not None:
            return self.num_samples
        if self.split == "train":
            return 2048
        self.prepare()
        return len(self._samples)

    def read(self, index: int) -> Sample:
        self.prepare()
        return self._samples[index % len(self._samples)]


def _windows(strip: Tensor) -> list[Tensor]:
    """Cut a ``(3, H, W)`` strip that is higher than wide into squares, from top to bottom."""
    side = strip.shape[2]
    return [strip[:, top : top + side].contiguous() for top in range(0, strip.shape[1] - side + 1, side)]


def _picture_folder() -> Path:
    # The package is looked up, not imported: importing scikit-image takes longer than decoding its pictures.
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the demo photographs come with scikit-image, which is not installed")
    return Path(spec.origin).parent / "data"
