"""Pairs of images from two folders: what the tokenizer sees, and what it shall reconstruct.

RobustTok's post-training (arXiv:2509.12474) encodes an image that a generator made and asks the decoder for the real
image that it was made from, so the decoder learns to repair the errors of sampled tokens.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .folder import list_images
from .images import ImageError, read_image
from .source import ImageSource, Sample


class PairedFolder(ImageSource):
    """Every image below one folder, with the image of the same relative name below another as its target.

    Names are compared without their suffix, so ``dog/1.png`` and ``dog/1.jpg`` are a pair. Targets without an input
    are left alone. Order, keys and labels are those of :class:`~vistok.data.folder.ImageFolder` on the inputs.

    Args:
        input_root: folder of the images to encode. It is read when first needed, not here.
        target_root: folder of the images to reconstruct.
        exif: turn images upright as their EXIF orientation says.
    """

    has_target = True

    def __init__(self, input_root: str, target_root: str, exif: bool = True) -> None:
        self.input_root = Path(input_root).expanduser()
        self.target_root = Path(target_root).expanduser()
        self.exif = exif
        self._inputs: np.ndarray | None = None
        self._targets: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    def prepare(self) -> None:
        """List both folders and find the partners.

        Raises:
            FileNotFoundError: if a folder does not exist, or inputs lack a target; the first few are named.
            ValueError: if one is not a folder or holds no image, or a target could be one of two files.
        """
        if self._inputs is None:
            inputs, labels = list_images(self.input_root, "input_root")
            candidates, _ = list_images(self.target_root, "target_root")
            self._targets = _partners(inputs, candidates, self.target_root)
            self._labels, self._inputs = labels, inputs

    def __len__(self) -> int:
        self.prepare()
        return len(self._inputs)

    def read(self, index: int) -> Sample:
        """See :meth:`ImageSource.read`. Images of a pair must have one size: they share their crop."""
        self.prepare()
        key, target_key = os.fsdecode(bytes(self._inputs[index])), os.fsdecode(bytes(self._targets[index]))
        image = read_image(self.input_root / key, self.exif)
        target = read_image(self.target_root / target_key, self.exif)
        if image.shape != target.shape:
            sizes = f"{image.shape[2]}x{image.shape[1]} pixels, its target {target.shape[2]}x{target.shape[1]}"
            raise ImageError(f"{self.input_root / key}: has {sizes}; bring the images of a pair to one size")
        return Sample(image, int(self._labels[index]), key, target=target)


def _partners(inputs: np.ndarray, candidates: np.ndarray, target_root: Path) -> np.ndarray:
    """For every input the candidate whose name differs in the suffix at most."""
    by_name: dict[bytes, list[bytes]] = {}
    for path in candidates:
        by_name.setdefault(os.path.splitext(bytes(path))[0], []).append(bytes(path))
    targets, missing = [], []
    for path in inputs:
        found = by_name.get(os.path.splitext(bytes(path))[0], [])
        if not found:
            missing.append(os.fsdecode(bytes(path)))
        elif len(found) > 1:
            names = " and ".join(os.fsdecode(name) for name in found)
            raise ValueError(f"target_root: {os.fsdecode(bytes(path))} could belong to {names}; keep one of them")
        targets.append(found[0] if found else b"")
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"target_root: {len(missing)} of {len(inputs)} inputs have no image of their name below "
            f"{str(target_root)!r}: {names}"
        )
    return np.array(targets, dtype=np.bytes_)
