"""From what a user names on the command line to image files with a name each, and from names to output paths."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..data.files import walk_files
from .errors import CommandError


@dataclass(frozen=True)
class ImageFile:
    """An image on disk, and the name it has in token files and outputs (``/`` between folders)."""

    path: Path
    name: str


def find_images(inputs: Sequence[str], suffixes: Iterable[str]) -> list[ImageFile]:
    """The images that a command's inputs stand for, in the order given and sorted within a folder.

    A file is named by its own name, a file of a folder relative to that folder, a match of a glob relative to the part
    of the pattern before the first wildcard. Equal names are told apart by a number.

    Args:
        inputs: files (of any suffix), folders (searched to the bottom, hidden ones left out), glob patterns.
        suffixes: lower-case suffixes of the images to look for in folders and globs.

    Raises:
        CommandError: for an input that does not exist or holds no image.
    """
    suffixes = tuple(suffixes)
    found: list[ImageFile] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files, root = walk_files(path), path
        elif path.exists():
            found.append(ImageFile(path, path.name))
            continue
        elif glob.has_magic(str(path)):
            files, root = [Path(match) for match in glob.glob(str(path), recursive=True)], _fixed_part(path)
        else:
            raise CommandError(f"there is no file or folder {text!r}")
        images = sorted(file for file in files if file.suffix.lower() in suffixes and file.is_file())
        if not images:
            raise CommandError(f"{text!r} holds no images; looked for files ending in {', '.join(sorted(suffixes))}")
        found += [ImageFile(file, file.relative_to(root).as_posix()) for file in images]
    names = unique_names([image.name for image in found])
    return [ImageFile(image.path, name) for image, name in zip(found, names, strict=True)]


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names made different: where one was there before, ``-2``, ``-3`` ... goes before its suffix."""
    names, used, result = list(names), set(taken), []
    reserved = set(names)
    for name in names:
        new, number = PurePosixPath(name), 1
        while str(new) in used or (number > 1 and str(new) in reserved):
            number += 1
            new = PurePosixPath(name).with_stem(f"{PurePosixPath(name).stem}-{number}")
        used.add(str(new))
        result.append(str(new))
    return result


def png_paths(names: Sequence[str], folder: Path, suffixes: Iterable[str], taken: Iterable[str] = ()) -> list[Path]:
    """Where the PNG of each name goes below a folder; folders in names are kept, image suffixes become ``.png``.

    Args:
        names: as a token file holds them, which may come from anywhere.
        folder: the output folder.
        suffixes: lower-case image suffixes.
        taken: file names in ``folder`` that are wanted for something else.

    Raises:
        CommandError: for a name that leads out of the folder.
    """
    suffixes = tuple(suffixes)
    relative = []
    for name in names:
        path = Path(name)
        if path.is_absolute() or path.drive or ".." in path.parts or not path.name:
            raise CommandError(f"the name {name!r} leads out of the output folder; refusing to write any image")
        relative.append(str(path.with_suffix(".png") if path.suffix.lower() in suffixes else f"{path}.png"))
    return [folder / name for name in unique_names(relative, taken)]


def _fixed_part(pattern: Path) -> Path:
    """The leading part of a glob pattern that holds no wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)
