"""Where the networks that judge images get their weights: a folder, torch's hub cache, or a download.

A published file carries the beginning of its SHA-256 in its name, and a file that does not hash to it is refused: a
metric through other weights is another metric.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..hub.fetch import FetchError, fetch
from .metric import MetricUnavailable


@dataclass(frozen=True)
class WeightsFile:
    """A published file.

    Attributes:
        name: as its publisher calls it.
        address: where it is.
        sha256: first hex digits of its hash.
    """

    name: str
    address: str
    sha256: str


_TORCHVISION = "https://download.pytorch.org/models/"
FILES = {
    "inception": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "alexnet": WeightsFile("alexnet-owt-7be5be79.pth", _TORCHVISION + "alexnet-owt-7be5be79.pth", "7be5be79"),
    "vgg16": WeightsFile("vgg16-397923af.pth", _TORCHVISION + "vgg16-397923af.pth", "397923af"),
}


class Weights:
    """Finds weights files.

    Args:
        folder: looked into first.
        download: fetch what is nowhere to be found, into torch's hub cache.
        check: refuse files of another hash than the published one; otherwise :meth:`unpublished` names them.
    """

    def __init__(self, folder: str | Path | None = None, download: bool = True, check: bool = True) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.download = download
        self.check = check
        self._hashes: dict[Path, str] = {}
        self._unpublished: dict[str, str] = {}

    def find(self, name: str) -> Path:
        """The file of one of :data:`FILES`.

        Raises:
            MetricUnavailable: if it is nowhere; says how to get it.
            ValueError: if a file of that name is not the published one.
        """
        file = FILES[name]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / file.name
        places = [cached] if self.folder is None else [self.folder / file.name, cached]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            path = self._fetch(file, cached, places[0])
        found = self.sha256(path)
        if self.check and not found.startswith(file.sha256):
            raise ValueError(
                f"{path} is not the published {file.name}: its SHA-256 begins with {found[:8]}, not {file.sha256}; "
                f"fetch {file.address} again"
            )
        if not found.startswith(file.sha256):
            self._unpublished[name] = found[:8]
        return path

    def unpublished(self) -> str:
        """Names and hashes of what :meth:`find` has found that is not what was published; empty if all was."""
        return ", ".join(f"{name}:{digest}" for name, digest in sorted(self._unpublished.items()))

    def optional(self, name: str) -> Path | None:
        """``<name>.safetensors``, ``.pth`` or ``.bin`` in the folder, for networks that otherwise come from a hub."""
        if self.folder is None:
            return None
        files = (self.folder / f"{name}{suffix}" for suffix in (".safetensors", ".pth", ".bin"))
        return next((file for file in files if file.is_file()), None)

    def sha256(self, path: Path) -> str:
        """Hash of a file, in hex; computed once."""
        if path not in self._hashes:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            self._hashes[path] = digest.hexdigest()
        return self._hashes[path]

    def _fetch(self, file: WeightsFile, cached: Path, place: Path) -> Path:
        try:
            return fetch(file.address, cached, local_files_only=not self.download)
        except (FetchError, FileNotFoundError) as error:
            raise MetricUnavailable(
                f"no weights: fetch {file.address} on a machine with internet access and put it at {place}"
            ) from error
