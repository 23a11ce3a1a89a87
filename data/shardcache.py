"""Local copies of remote shards: fetched once per machine, whole or not at all, within a size limit if wanted."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from webdataset.gopen import gopen

from .files import atomic_write
from .tarindex import ShardError, TarIndex, load_index, save_index, scan_tar

TIMEOUT_SECONDS = 60  # without a single byte
CHUNK = 1 << 20


class ShardCache:
    """A folder of fetched shards.

    Workers and ranks of a machine share it: a lock per shard lets one of them fetch while the others wait, and a
    shard appears under its name only when it is complete and indexed. A cached shard is never compared with the
    remote one again; delete the folder to fetch anew.

    Args:
        folder: made when first needed.
        max_gb: when the shards in the folder exceed so many gigabytes (10^9 bytes), those unused for longest go.
    """

    def __init__(self, folder: Path, max_gb: float | None = None) -> None:
        if max_gb is not None and max_gb <= 0:
            raise ValueError(f"cache_gb must be positive, or None for no limit; got {max_gb}")
        self.folder = folder
        self.max_gb = max_gb

    def path(self, url: str) -> Path:
        """Where the copy of a shard lies, or will lie."""
        readable = re.sub(r"[^\w.-]+", "_", url.rsplit("/", 1)[-1])[-80:]
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable}"

    def index(self, url: str) -> TarIndex:
        """The index of a shard; fetches the shard unless it has been indexed before.

        Raises:
            ShardError: if it cannot be fetched or used.
        """
        index = load_index(self._index_path(url), url)
        if index is None:
            self._obtain(url)
            index = load_index(self._index_path(url), url)
        if index is None:
            raise ShardError(f"{url}: its index in {self.folder} cannot be read back")
        return index

    def fetch(self, url: str) -> Path:
        """The local copy of a shard, fetched if it is not there.

        Raises:
            ShardError: if it cannot be fetched, or is no tar file.
        """
        path = self.path(url)
        if not path.is_file():
            self._obtain(url)
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # the access time orders eviction
        except OSError as error:
            raise ShardError(f"{url}: {_reason(error)}") from error
        return path

    def _obtain(self, url: str) -> None:
        """Make copy and index appear; whoever comes second waits and finds them."""
        path = self.path(url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(path.name + ".lock")):
                if not path.is_file() or load_index(self._index_path(url), url) is None:
                    self._download(url, path)
            self._evict(keep=path)
        except (OSError, HTTPException) as error:
            raise ShardError(f"{url}: {_reason(error)}") from error

    def _index_path(self, url: str) -> Path:
        path = self.path(url)
        return path.with_name(path.name + ".index")

    def _download(self, url: str, path: Path) -> None:
        for left_over in self.folder.glob(f".{path.name}.*.partial"):  # of a process that was killed; we hold the lock
            left_over.unlink(missing_ok=True)
        with atomic_write(path) as file:
            _copy(url, file)
            file.flush()
            try:
                index = scan_tar(file.name)
            except ShardError as error:
                raise ShardError(f"{url}: {str(error).split(': ', 1)[-1]}") from error
            save_index(index, self._index_path(url), url)

    def _evict(self, keep: Path) -> None:
        if self.max_gb is None:
            return
        with FileLock(self.folder / "evict.lock"):
            shards = []
            for index in self.folder.glob("*.index"):
                shard = index.with_suffix("")
                if shard.is_file():
                    shards.append((shard.stat().st_atime_ns, shard.stat().st_size, shard))
            total = sum(size for _, size, _ in shards)
            for _, size, shard in sorted(shards):
                if total <= self.max_gb * 1e9:
                    break
                if shard != keep:
                    shard.unlink(missing_ok=True)  # readers that have it open keep reading; the small index stays
                    total -= size


def _copy(url: str, file: BinaryIO) -> None:
    """Copy what a URL holds into ``file``.

    webdataset reads http through the program ``curl``, which a bare machine lacks; Python's own client does it here.
    """
    if not url.startswith(("http://", "https://")):
        with gopen(url) as stream:
            shutil.copyfileobj(stream, file, CHUNK)
        return
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        shutil.copyfileobj(response, file, CHUNK)
        expected, received = response.headers.get("Content-Length"), file.tell()
    if expected is not None and received != int(expected):
        raise OSError(f"the connection broke after {received} of {expected} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename and not os.path.isabs(str(error.filename)):
        return f"the program {error.filename!r}, which fetches such URLs, is not installed"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
