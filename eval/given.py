"""Reconstructions that somebody else made, as files beside the references they belong to."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..data.folder import describe_files, list_images
from ..data.images import read_image
from ..data.source import ImageSource, Sample


class GivenReconstructions(ImageSource):
    """Every reference image, with the image of the same relative name in another folder as its reconstruction.

    Names are compared without their suffix: ``dog/1.JPEG`` and ``dog/1.png`` are a pair.

    Args:
        reconstructions: folder of the reconstructions.
        references: folder of the originals.
        allow_missing: evaluate the pairs there are, if some images have no partner; otherwise that is an error.

    Attributes:
        missing: what has no partner, one line each, after :meth:`prepare`.
    """

    has_target = True

    def __init__(self, reconstructions: str, references: str, allow_missing: bool = False) -> None:
        self.reconstructions = Path(reconstructions).expanduser()
        self.references = Path(references).expanduser()
        self.allow_missing = allow_missing
        self.missing: list[str] = []
        self._pairs: list[tuple[str, str]] | None = None
        self._labels = np.empty(0, np.int64)

    def prepare(self) -> None:
        """List both folders and pair them.

        Raises:
            FileNotFoundError: if a folder does not exist.
            ValueError: if one is not a folder or holds no image, two files have one name, names do not match, or no
                image has a partner.
        """
        if self._pairs is not None:
            return
        given = _by_name(self.reconstructions, *list_images(self.reconstructions, "--rec"))
        originals = _by_name(self.references, *list_images(self.references, "--ref"))
        names = sorted(given.keys() & originals.keys())
        lonely = sorted(originals.keys() - given.keys())
        alone = [f"{name}: no reconstruction below {self.reconstructions}" for name in lonely]
        alone += [f"{name}: no reference below {self.references}" for name in sorted(given.keys() - originals.keys())]
        if alone and not (self.allow_missing and names):
            more = ", ..." if len(alone) > 3 else ""
            raise ValueError(
                f"{len(given)} reconstructions and {len(originals)} references do not pair up: "
                f"{', '.join(alone[:3])}{more}; names must be equal up to their suffix"
                + (" (--allow-missing evaluates the pairs there are)" if names else "")
            )
        self.missing = alone
        self._pairs = [(originals[name][0], given[name][0]) for name in names]
        self._labels = np.array([originals[name][1] for name in names], dtype=np.int64)

    def __len__(self) -> int:
        self.prepare()
        return len(self._pairs)

    def read(self, index: int) -> Sample:
        self.prepare()
        original, reconstruction = self._pairs[index]
        return Sample(
            read_image(self.references / original),
            int(self._labels[index]),
            original,
            target=read_image(self.reconstructions / reconstruction),
        )

    def manifest(self) -> list[str]:
        self.prepare()
        return describe_files(self.references, np.array([os.fsencode(original) for original, _ in self._pairs]))


def _by_name(root: Path, paths: np.ndarray, labels: np.ndarray) -> dict[str, tuple[str, int]]:
    """Path and label by relative name without suffix."""
    found: dict[str, tuple[str, int]] = {}
    for path, label in zip(paths, labels.tolist(), strict=True):
        text = os.fsdecode(bytes(path))
        name = os.path.splitext(text)[0]
        if name in found:
            raise ValueError(f"{root}: {found[name][0]} and {text} have one name; keep one of them")
        found[name] = (text, label)
    return found
