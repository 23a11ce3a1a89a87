"""Images with the words and faces on them: TokBench's own files (arXiv:2505.18142), or a user's.

A file of text annotations is a JSON list, or one JSON object per line (``.jsonl``)::

    {"file_name": "a.jpg", "annotations": [{"rec": "Exit", "bbox": [10, 20, 90, 44]}]}

with boxes as left, top, right, bottom in pixels. A file of face annotations has the same form::

    {"image_name": "b.jpg", "faces": [{"kps": [[30, 40], ...], "box": [20, 25, 80, 99]}]}

with five landmarks each: the eyes, the nose, the corners of the mouth, left before right as seen on the image. A
``ratio`` is used if it is given, as the benchmark does, and computed if not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...data.images import read_image

TEXT_SETS = ("ic13", "ic15", "tt", "textocr", "cord", "sroie", "infograph", "docvqa")


@dataclass(frozen=True)
class Word:
    """A piece of text.

    Attributes:
        text: what is written.
        box: left, top, right, bottom in pixels; the last two are not part of it.
        ratio: mean advance of a character relative to the longest side of the image.
    """

    text: str
    box: tuple[int, int, int, int]
    ratio: float


@dataclass(frozen=True)
class Face:
    """A face.

    Attributes:
        landmarks: eyes, nose, corners of the mouth: five times x, y in pixels.
        ratio: longer side of its box relative to the longest side of the image.
    """

    landmarks: tuple[tuple[float, float], ...]
    ratio: float


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and what is on it.

    Attributes:
        name: unique; ``/`` between folders. A saved reconstruction has the same name.
        group: the set that it belongs to.
        instances: words or faces.
        load: reads the pixels, uint8 ``(H, W, 3)``.
    """

    name: str
    group: str
    instances: tuple[Word, ...] | tuple[Face, ...]
    load: Callable[[], np.ndarray] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Annotations:
    """Annotated images.

    Attributes:
        name: ``"tokbench"``, ``"synthetic"``, or the file they came from.
        images: in a fixed order.
        complete: whether this is all of the benchmark, nothing left out and nothing changed.
    """

    name: str
    images: tuple[AnnotatedImage, ...]
    complete: bool = False

    def head(self, count: int) -> Annotations:
        """The first ``count`` images alone.

        Raises:
            ValueError: for a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1; got {count}")
        if count >= len(self.images):
            return self
        return Annotations(self.name, self.images[:count])

    @property
    def sha256(self) -> str:
        """Hash of everything but the pixels."""
        digest = hashlib.sha256()
        for image in self.images:
            instances = [list(vars(instance).values()) for instance in image.instances]
            digest.update(json.dumps([image.name, image.group, instances]).encode() + b"\n")
        return digest.hexdigest()


def tokbench_text(root: str | Path, sets: Sequence[str] = TEXT_SETS) -> Annotations:
    """The text part of TokBench in its published layout: ``annotations/text_<set>.json``, ``images/text_data/<set>``.

    Args:
        root: folder of the data set (Junfeng5/TokBench on the Hub).
        sets: which of its sets.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: for an unknown set, or a file that does not have the form described above.
    """
    root, images = Path(root).expanduser(), []
    if odd := set(sets) - set(TEXT_SETS):
        raise ValueError(f"sets must be among {', '.join(TEXT_SETS)}; got {', '.join(sorted(odd))}")
    for name in sets:
        file, folder = root / "annotations" / f"text_{name}.json", root / "images" / "text_data" / name
        images += _images(file, folder, name, _words, clip=True)
    return Annotations("tokbench", _unique(images, root), set(sets) == set(TEXT_SETS))


def tokbench_faces(root: str | Path) -> Annotations:
    """The face part of TokBench in its published layout: ``annotations/face_meta.json``, ``images/face_data``.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: for a file that does not have the form described above.
    """
    root = Path(root).expanduser()
    images = _images(root / "annotations" / "face_meta.json", root / "images" / "face_data", "faces", _faces, clip=True)
    return Annotations("tokbench", _unique(images, root), True)


def read_text(file: str | Path, folder: str | Path | None = None) -> Annotations:
    """Text annotations of one's own; the form is described above.

    Args:
        file: ``.json`` or ``.jsonl``.
        folder: where the images are; that of the file if ``None``.

    Raises:
        FileNotFoundError: naming the first images that are missing.
        ValueError: naming file, image and annotation that are wrong, and how.
    """
    file = Path(file).expanduser()
    images = _images(file, file.parent if folder is None else Path(folder).expanduser(), "", _words, clip=False)
    return Annotations(file.name, _unique(images, file))


def read_faces(file: str | Path, folder: str | Path | None = None) -> Annotations:
    """Face annotations of one's own; arguments and errors as for :func:`read_text`."""
    file = Path(file).expanduser()
    images = _images(file, file.parent if folder is None else Path(folder).expanduser(), "", _faces, clip=False)
    return Annotations(file.name, _unique(images, file))


def text_ratio(text: str, box: Sequence[float], width: int, height: int) -> float:
    """Mean advance of a character: longer side of the box per character and per longest side of the image."""
    return max(box[2] - box[0], box[3] - box[1]) / (len(text) * max(width, height))


def read_pixels(path: Path) -> np.ndarray:
    """Pixels of an image file as they are stored, uint8 ``(H, W, 3)``: boxes know nothing of EXIF orientations."""
    return read_image(path, exif=False).permute(1, 2, 0).contiguous().numpy()


def _entries(file: Path) -> list[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there are no annotations at {file}")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        entries = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not {'JSON lines' if file.suffix == '.jsonl' else 'JSON'}: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file} must hold a list of images; got {type(entries).__name__}")
    return entries


def _images(file: Path, folder: Path, group: str, parse: Callable[..., Any], clip: bool) -> list[AnnotatedImage]:
    """The images of one file. ``clip`` cuts boxes at the border instead of refusing them."""
    images, missing = [], []
    for number, entry in enumerate(_entries(file)):
        where = f"{file}, image {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: must be an object; got {type(entry).__name__}")
        relative = entry.get("file_name", entry.get("image_name"))
        if not isinstance(relative, str) or not relative:
            raise ValueError(f"{where}: file_name (faces: image_name) must name an image; got {relative!r}")
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise ValueError(f"{where}: file_name must lie below {folder}; got {relative!r}")
        path = folder / relative
        if not path.is_file():
            missing.append(str(path))
            continue
        size = _size(entry, path, where)
        instances = parse(entry, f"{where} ({relative})", *size, clip)
        name = f"{group}/{relative}" if group else relative
        images.append(AnnotatedImage(name, group, instances, partial(read_pixels, path)))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{file} names images that are not there: {', '.join(missing[:3])}{more}")
    return images


def _size(entry: dict[str, Any], path: Path, where: str) -> tuple[int, int]:
    """Width and height, as stated or out of the file."""
    width, height = (entry.get(key, entry.get(f"img_{key}")) for key in ("width", "height"))
    if width is None or height is None:
        try:
            with Image.open(path) as image:
                return image.size
        except OSError as error:
            raise ValueError(f"{where}: {path} cannot be read: {error}") from error
    if not all(isinstance(side, int) and side > 0 for side in (width, height)):
        raise ValueError(f"{where}: width and height must be positive integers; got {width!r} and {height!r}")
    return width, height


def _words(entry: dict[str, Any], where: str, width: int, height: int, clip: bool) -> tuple[Word, ...]:
    words = []
    for number, word in enumerate(_list(entry, "annotations", where)):
        here = f"{where}, annotation {number}"
        text = word.get("rec")
        if not isinstance(text, str) or not text:
            raise ValueError(f"{here}: rec must be a string of one or more characters; got {text!r}")
        box = _box(word.get("bbox"), "bbox", here, width, height, clip)
        words.append(Word(text, box, _ratio(word, here, lambda t=text, b=box: text_ratio(t, b, width, height))))
    return tuple(words)


def _faces(entry: dict[str, Any], where: str, width: int, height: int, clip: bool) -> tuple[Face, ...]:
    faces = []
    for number, face in enumerate(_list(entry, "faces", where)):
        here = f"{where}, face {number}"
        landmarks = face.get("kps")
        if not _numbers(landmarks, (5, 2)) or len(np.unique(landmarks, axis=0)) < 2:
            raise ValueError(f"{here}: kps must be five pairs of numbers, not all the same; got {landmarks!r}")
        if face.get("ratio") is None:
            box = _box(face.get("box"), "box", here, width, height, clip)
            face = face | {"ratio": max(box[2] - box[0], box[3] - box[1]) / max(width, height)}
        points = tuple((float(x), float(y)) for x, y in landmarks)
        faces.append(Face(points, _ratio(face, here, lambda: 0.0)))
    return tuple(faces)


def _list(entry: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    values = entry.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{where}: {key} must be a list of objects; got {values!r:.80}")
    return values


def _ratio(instance: dict[str, Any], where: str, compute: Callable[[], float]) -> float:
    ratio = instance.get("ratio")
    if ratio is None:
        return compute()
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 0:
        raise ValueError(f"{where}: ratio must be a number of at least 0, or left out; got {ratio!r}")
    return float(ratio)


def _box(box: Any, key: str, where: str, width: int, height: int, clip: bool) -> tuple[int, int, int, int]:
    if not _numbers(box, (4,)):
        raise ValueError(f"{where}: {key} must be left, top, right, bottom in pixels; got {box!r}")
    left, top, right, bottom = (int(value) for value in box)
    if clip:
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"{where}: {key} must lie on the image of {width} x {height} pixels; got {box!r}")
    return left, top, right, bottom


def _numbers(values: Any, shape: tuple[int, ...]) -> bool:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        return False
    return array.shape == shape and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def _unique(images: list[AnnotatedImage], source: Path) -> tuple[AnnotatedImage, ...]:
    seen: set[str] = set()
    for image in images:
        if image.name in seen:
            raise ValueError(f"{source} names {image.name} twice")
        seen.add(image.name)
    if not images:
        raise ValueError(f"{source} holds no images")
    return tuple(images)
