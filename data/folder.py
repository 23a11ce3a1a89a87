"""A folder of image files, nested or flat, for people without shards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .files import walk_files
from .images import IMAGE_SUFFIXES, read_image
from .source import ImageSource, Sample


class ImageFolder(ImageSource):
    """All images below a folder, in the order of their sorted paths.

    If every image lies in a sub-folder, the top-level sub-folders are the classes, numbered in sorted order;
    otherwise labels are -1. Hidden files and folders are ignored.

    Args:
        root: the folder. It is read when first needed, not here.
        exif: turn images upright as their EXIF orientation says.
    """

    def __init__(self, root: str, exif: bool = True) -> None:
        self.root = Path(root).expanduser()
        self.exif = exif
        self._paths: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    def prepare(self) -> None:
        """List the folder.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if it is not a folder, or holds no image.
        """
        if self._paths is None:
            self._paths, self._labels = list_images(self.root)

    def __len__(self) -> int:
        self.prepare()
        return len(self._paths)

    def read(self, index: int) -> Sample:
        self.prepare()
        key = os.fsdecode(bytes(self._paths[index]))
        return Sample(read_image(self.root / key, self.exif), int(self._labels[index]), key)

    def manifest(self) -> list[str]:
        self.prepare()
        return describe_files(self.root, self._paths)


def describe_files(root: Path, paths: np.ndarray) -> list[str]:
    """Path, bytes and time of change of every file, as lines for :meth:`ImageSource.manifest`."""
    lines = []
    for path in paths:
        name = os.fsdecode(bytes(path))
        status = (root / name).stat()
        lines.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return lines


def list_images(root: Path, argument: str = "root") -> tuple[np.ndarray, np.ndarray]:
    """Sorted paths relative to ``root`` as bytes, and labels, both ``(N,)``.

    One array of bytes instead of a list of strings: worker processes share its memory for good, whereas every look at
    a Python string changes its reference count and so copies the page it lies on.

    Args:
        root: the folder.
        argument: what error messages call it.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it is not a folder, or holds no image.
    """
    if not root.exists():
        raise FileNotFoundError(f"{argument}: the image folder {str(root)!r} does not exist")
    if not root.is_dir():
        raise ValueError(f"{argument}: {str(root)!r} is not a folder")
    found = [os.path.relpath(path, root) for path in walk_files(root) if path.name.lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        raise ValueError(f"{argument}: no image below {str(root)!r}; looked for {', '.join(IMAGE_SUFFIXES)}")
    found.sort()
    tops = [path.split(os.sep, 1)[0] if os.sep in path else None for path in found]
    if None in tops:
        labels = np.full(len(found), -1, dtype=np.int64)
    else:
        labels = np.unique(tops, return_inverse=True)[1].astype(np.int64)
    return np.array([os.fsencode(path) for path in found], dtype=np.bytes_), labels
