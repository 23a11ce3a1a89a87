"""Webdataset shards as a map-style source: tar files of images, on disk or remote, in an order of our own.

The format is webdataset's (``000123.jpg`` and ``000123.cls`` side by side in a tar file), and so are the URL handlers.
The reading is not: a stream of shards has no position that a run could resume from, deals unequal shares to the ranks
and shuffles only what fits a buffer. Here every shard is indexed once, and a sample is one read at a known offset.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from .files import cache_folder
from .images import ImageError, decode_image
from .shardcache import ShardCache
from .shardlist import expand_patterns, find_shards, is_local
from .source import ImageSource, Sample, generator
from .tarindex import ShardError, TarIndex, load_index, save_index, scan_tar

logger = logging.getLogger(__name__)
T = TypeVar("T")

OPEN_FILES = 64  # per process
RETRY_SECONDS = 600  # a shard that could not be opened is left alone for so long
SHOW_PROGRESS = 32  # so many shards to index deserve a progress bar


class WebDataset(ImageSource):
    """Images (and integer labels, and captions) from tar shards.

    Args:
        shards: a pattern such as ``data/train-{000000..000127}.tar``, several joined by ``::``, or a list of them.
            Braces expand; local paths may be globs; anything else is a URL that webdataset opens (http, https, gs,
            hf, ``pipe:command`` ...).
        cache_dir: where remote shards are kept; by default below the user's cache (``$VISTOK_CACHE``).
        shuffle_shards: so many consecutive shards of an epoch's order are shuffled together, completely. More mix
            better; fewer read fewer files at a time.
        samples_per_shard: number of samples in every remote shard. If given, remote shards are fetched when first
            read, so a run starts at once; otherwise they are all fetched and counted before it starts.
        on_missing: ``error`` refuses to start when a local shard is missing, ``skip`` reports it and goes on.
        cache_gb: limit of the cache of remote shards, in gigabytes; the least recently used go first.
        exif: turn images upright as their EXIF orientation says.
        text: read captions from ``.txt`` members (UTF-8); a sample without one has an empty caption.

    Raises:
        ValueError: for an empty list, a shard listed twice, a URL that nothing opens, or numbers out of range.
    """

    def __init__(
        self,
        shards: str | list[str],
        cache_dir: str | None = None,
        shuffle_shards: int = 16,
        samples_per_shard: int | None = None,
        on_missing: Literal["error", "skip"] = "error",
        cache_gb: float | None = None,
        exif: bool = True,
        text: bool = False,
    ) -> None:
        if shuffle_shards < 1:
            raise ValueError(f"shuffle_shards must be at least 1; got {shuffle_shards}")
        if samples_per_shard is not None and samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, or None to count; got {samples_per_shard}")
        if on_missing not in ("error", "skip"):
            raise ValueError(f"on_missing must be 'error' or 'skip'; got {on_missing!r}")
        self._patterns = expand_patterns([shards] if isinstance(shards, str) else shards)
        self.shuffle_shards = shuffle_shards
        self.samples_per_shard = samples_per_shard
        self.on_missing = on_missing
        self.exif = exif
        self.has_text = text
        self.problems: list[str] = []
        self._cache = ShardCache(Path(cache_dir).expanduser() if cache_dir else cache_folder() / "shards", cache_gb)
        self._files = _OpenFiles()
        self._failed: dict[int, tuple[float, str]] = {}
        self._shards: list[str] = []
        self._indexes: list[TarIndex | None] = []
        self._counts = np.zeros(0, dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int64)

    def prepare(self) -> None:
        """Find and index the shards; fetch remote ones unless ``samples_per_shard`` is given.

        What is wrong with single shards or samples is logged, and kept in :attr:`problems`.

        Raises:
            FileNotFoundError: naming the local shards that are missing.
            ValueError: if no shard holds a usable sample.
        """
        if self._shards:
            return
        shards, missing = find_shards(self._patterns, allow_missing=self.on_missing == "skip")
        problems = [f"shard left out: {name}: does not exist" for name in missing]
        indexes = _in_threads(self._index_or_reason, shards)
        usable = []
        for shard, index in zip(shards, indexes, strict=True):
            if isinstance(index, str):
                problems.append(f"shard left out: {index}")
                continue
            if index is not None:
                problems += _complaints(shard, index)
            if index is None or len(index):
                usable.append((shard, index))
        for problem in problems:
            logger.warning(problem)
        if not usable:
            raise ValueError(f"shards: none of {len(shards)} holds a usable sample; " + "; ".join(problems[:5]))
        self.problems = problems
        self._indexes = [index for _, index in usable]
        counts = [self.samples_per_shard if index is None else len(index) for index in self._indexes]
        self._counts = np.array(counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._shards = [shard for shard, _ in usable]

    def __len__(self) -> int:
        self.prepare()
        return int(self._counts.sum())

    def manifest(self) -> list[str] | None:
        self.prepare()
        if any(index is None for index in self._indexes):  # remote shards that nobody has looked into yet
            return None
        shards = zip(self._shards, self._indexes, strict=True)
        return [f"{os.path.basename(shard)} {index.size} {len(index)}" for shard, index in shards]

    def read(self, index: int) -> Sample:
        data, label, key, name = self.read_encoded(index)
        caption = self._read_text(index) if self.has_text else ""
        return Sample(decode_image(data, name, self.exif), label, key, caption)

    def read_encoded(self, index: int) -> tuple[bytes, int, str, str]:
        """The image file of a sample as it lies in its shard, its label, its key, and "shard/key".

        Raises:
            ImageError: if the shard cannot be read there, or the label is not an integer.
        """
        self.prepare()
        shard, row = self._locate(index)
        name = self._shards[shard]
        try:
            tar_index = self._open(shard)
            if row >= len(tar_index):
                counts = f"{len(tar_index)} samples, but samples_per_shard is {self.samples_per_shard}"
                raise ImageError(f"{name}: sample {row} does not exist; the shard holds {counts}")
            key = tar_index.key(row)
            data = self._read_bytes(shard, *tar_index.images[row])
            text = self._read_bytes(shard, *tar_index.labels[row]) if tar_index.labels[row, 0] >= 0 else b"-1"
        except ShardError as error:
            raise ImageError(str(error)) from error
        try:
            return data, int(text), key, f"{name}/{key}"
        except ValueError:
            raise ImageError(f"{name}/{key}: label {text[:40]!r} is not an integer") from None

    def _read_text(self, index: int) -> str:
        shard, row = self._locate(index)
        try:
            offset, size = self._open(shard).texts[row]
            data = self._read_bytes(shard, offset, size) if offset >= 0 else b""
        except ShardError as error:
            raise ImageError(str(error)) from error
        return data.decode("utf-8", "replace").strip()

    def order(self, epoch: int, seed: int, rank: int, world_size: int) -> np.ndarray:
        """The plan of an epoch; see :meth:`ImageSource.order`.

        The shards are permuted, each rank takes one contiguous stretch of the same length (so it opens its own share
        of the shards only), and within it windows of ``shuffle_shards`` shards are shuffled completely.
        """
        self.prepare()
        shards = generator(seed, epoch).permutation(len(self._shards))
        share = len(self) // world_size
        ends = np.cumsum(self._counts[shards])
        begin, end = rank * share, (rank + 1) * share
        pieces = []
        for shard, shard_end in zip(shards, ends, strict=True):
            shard_begin = shard_end - self._counts[shard]
            low, high = max(begin, shard_begin), min(end, shard_end)
            if low < high:
                pieces.append(self._starts[shard] + np.arange(low - shard_begin, high - shard_begin))
        shuffler = generator(seed, epoch, rank + 1)
        windows = [pieces[i : i + self.shuffle_shards] for i in range(0, len(pieces), self.shuffle_shards)]
        shuffled = [shuffler.permutation(np.concatenate(window)) for window in windows]
        return np.concatenate(shuffled) if shuffled else np.zeros(0, dtype=np.int64)

    def replacement(self, index: int, attempt: int) -> int:
        """First the neighbour, then samples of other shards: the whole shard may be gone."""
        if attempt == 0 or len(self._shards) == 1:
            return super().replacement(index, attempt)
        shard, row = self._locate(index)
        other = (shard + attempt) % len(self._shards)
        return int(self._starts[other] + row % self._counts[other])

    def _index_or_reason(self, shard: str) -> TarIndex | str | None:
        """The index of a shard, ``None`` for a remote one that is fetched later, or why it cannot be used."""
        try:
            if is_local(shard):
                return _index_local(shard)
            return self._cache.index(shard) if self.samples_per_shard is None else None
        except ShardError as error:
            return str(error)

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard and row of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie between 0 and {len(self) - 1}; got {index}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _open(self, shard: int) -> TarIndex:
        """Make a shard ready for reading: fetched, indexed, open.

        Raises:
            ShardError: if that fails now, or failed less than ``RETRY_SECONDS`` ago.
        """
        if shard in self._files and (index := self._indexes[shard]) is not None:
            return index
        failed_at, reason = self._failed.get(shard, (-float("inf"), ""))
        if time.monotonic() - failed_at < RETRY_SECONDS:
            raise ShardError(reason)
        name = self._shards[shard]
        try:
            path = Path(name) if is_local(name) else self._cache.fetch(name)
            index = self._indexes[shard]
            if index is None:
                index = self._cache.index(name)
                for complaint in _complaints(name, index, self.samples_per_shard):
                    logger.warning(complaint)
                self._indexes[shard] = index
            size = self._files.open(shard, path)
            if size != index.size:
                self._files.close(shard)
                raise ShardError(f"{name}: was {index.size} bytes when it was indexed, is {size} now")
        except (OSError, ShardError) as error:
            reason = str(error) if isinstance(error, ShardError) else f"{name}: {error.strerror or error}"
            self._failed[shard] = (time.monotonic(), reason)
            raise ShardError(reason) from error
        return index

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            data = self._files.read(shard, int(offset), int(size))
        except OSError as error:
            raise ShardError(f"{self._shards[shard]}: {error.strerror or error}") from error
        if len(data) < size:
            raise ShardError(f"{self._shards[shard]}: ends at byte {offset + len(data)}, a sample lies beyond")
        return data


class _OpenFiles:
    """A few open files, least recently used closed first.

    Reading at an offset (``pread``) moves no file position, so a forked worker may go on with the descriptors that it
    inherits; a spawned one starts with none.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": OrderedDict()}

    def __contains__(self, shard: int) -> bool:
        return shard in self._descriptors

    def open(self, shard: int, path: Path) -> int:
        """Open a file, return its size."""
        if shard not in self._descriptors:
            if len(self._descriptors) >= OPEN_FILES:
                self.close(next(iter(self._descriptors)))
            self._descriptors[shard] = os.open(path, os.O_RDONLY)
        return os.fstat(self._descriptors[shard]).st_size

    def read(self, shard: int, offset: int, size: int) -> bytes:
        self._descriptors.move_to_end(shard)
        return os.pread(self._descriptors[shard], size, offset)

    def close(self, shard: int) -> None:
        os.close(self._descriptors.pop(shard))

    def __del__(self) -> None:
        for shard in list(self._descriptors):
            self.close(shard)


def _index_local(path: str) -> TarIndex:
    """The index of a local shard, from the cache if the file has not changed.

    Raises:
        ShardError: if the shard cannot be used.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from error
    stamp = f"{path}:{state.st_size}:{state.st_mtime_ns}"
    cached = cache_folder() / "indexes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.index"
    index = load_index(cached, stamp)
    if index is None:
        index = scan_tar(path)
        try:
            save_index(index, cached, stamp)
        except OSError as error:
            logger.warning("the index of %s cannot be kept in %s: %s", path, cached.parent, error.strerror or error)
    return index


def _complaints(shard: str, index: TarIndex, expected: int | None = None) -> list[str]:
    """What to report about a shard, one line each."""
    lines = []
    if index.problem:
        lines.append(f"{shard}: {index.problem}")
    if index.without_image:
        names = ", ".join(index.examples) + (", ..." if index.without_image > len(index.examples) else "")
        lines.append(f"{shard}: {index.without_image} samples left out, they hold no image: {names}")
    if not len(index):
        lines.append(f"shard left out: {shard}: it holds no usable sample")
    if expected is not None and len(index) > expected:
        lines.append(f"{shard}: holds {len(index)} samples; those beyond samples_per_shard={expected} are never read")
    return lines


def _in_threads(work: Callable[[str], T], shards: list[str]) -> list[T]:
    """Run ``work`` on all shards, in order, several at a time: most of it is waiting for the disk or the network."""
    show = sys.stderr.isatty() and (len(shards) >= SHOW_PROGRESS or not all(is_local(shard) for shard in shards))
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        results = pool.map(work, shards)
        if show:
            results = track(results, "Shards", len(shards), console=Console(stderr=True), transient=True)
        return list(results)
