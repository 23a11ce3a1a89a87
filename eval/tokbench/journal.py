"""What was found on every image so far, a line of JSON for each: a run that is killed goes on where it stopped.

The first line says what the run was. Another run does not go on in the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock


class Journal:
    """Entries by image, appended to a file.

    Args:
        path: of the file; made if it is not there.
        settings: what has to be equal for a run to go on, as JSON data.

    Raises:
        ValueError: if the file belongs to a run of other settings, or is none of these.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._places: dict[str, int] = {}  # where the entry of an image begins
        head = json.dumps(settings, sort_keys=True).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        with self._lock:
            if not self.path.exists() or not self._scan(settings):
                self.path.write_bytes(head)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image: str) -> bool:
        return image in self._places

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Add entries, each with the name of its ``image``; they are on disk when this returns."""
        with self._lock, open(self.path, "ab") as file:
            place = file.seek(0, os.SEEK_END)
            for entry in entries:
                line = json.dumps(entry).encode() + b"\n"
                self._places[entry["image"]] = place
                place += file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def find(self, image: str) -> dict[str, Any] | None:
        """The last entry of an image."""
        if image not in self._places:
            return None
        with open(self.path, "rb") as file:
            file.seek(self._places[image])
            return json.loads(file.readline())

    def entries(self, images: list[str]) -> Iterator[dict[str, Any]]:
        """The entries of some images, one at a time.

        Raises:
            KeyError: for an image without one.
        """
        with open(self.path, "rb") as file:
            for image in images:
                file.seek(self._places[image])
                yield json.loads(file.readline())

    def _scan(self, settings: dict[str, Any]) -> bool:
        """Find all whole lines and cut off a torn one; ``False`` if there is not even a first line."""
        whole = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break  # the writer was killed here
                try:
                    entry = json.loads(line)
                    if number:
                        self._places[entry["image"]] = whole
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}, line {number + 1}: not an entry of a run ({error})") from error
                if not number and entry != json.loads(json.dumps(settings)):
                    odd = _differences(entry, settings)
                    raise ValueError(f"{self.path} belongs to a run with other {odd}; delete it or use another folder")
                whole += len(line)
        os.truncate(self.path, whole)
        return whole > 0


def pixels_sha256(image: np.ndarray) -> str:
    """Hash of an image's size and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def _differences(found: Any, expected: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "settings"
    return ", ".join(sorted(key for key in found.keys() | expected if found.get(key) != expected.get(key)))
