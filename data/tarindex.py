"""The index of one shard: which samples a tar file holds, and at which byte each image lies.

Only the 512-byte headers are read, the bodies are skipped, and members are grouped into samples as the webdataset
format has it: consecutive members whose names agree up to the first dot of the last path component. With the index,
any sample is one read at a known offset, so the order of an epoch is free and a resumed run skips nothing by reading.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

from .files import atomic_write

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
LABEL_MEMBER = "cls"
TEXT_MEMBER = "txt"
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own bookkeeping members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_FORMAT = 2


class ShardError(ValueError):
    """A shard that cannot be used at all; the message names it and the reason."""


@dataclass(frozen=True)
class TarIndex:
    """The usable samples of a shard.

    Attributes:
        images: ``(N, 2)`` int64, offset and size of each image in bytes.
        labels: ``(N, 2)`` int64, offset and size of each label member; (-1, 0) where there is none.
        texts: ``(N, 2)`` int64, the same of each caption.
        keys: the names of the samples, UTF-8, one after another.
        key_ends: ``(N,)`` int64, where each name ends.
        size: bytes of the tar file.
        problem: what is wrong with the shard as a whole; empty if nothing is.
        without_image: number of samples left out because they hold no image.
        examples: names of the first few of them.
    """

    images: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    keys: bytes
    key_ends: np.ndarray
    size: int
    problem: str = ""
    without_image: int = 0
    examples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def key(self, row: int) -> str:
        """The name of a sample."""
        start = self.key_ends[row - 1] if row else 0
        return self.keys[start : self.key_ends[row]].decode("utf-8", "surrogateescape")


def scan_tar(path: str | Path) -> TarIndex:
    """Read the headers of a tar file. Of a truncated one, the complete samples are kept and ``problem`` says so.

    Raises:
        ShardError: if the file cannot be opened, is compressed or is no tar file.
    """
    try:
        with open(path, "rb") as file:
            magic, size = file.read(2), file.seek(0, 2)
            if magic in _COMPRESSED:
                raise ShardError(f"{path}: compressed with {_COMPRESSED[magic]}; unpack it, samples are read by offset")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                groups, problem = _group_members(archive, size)
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"{path}: {_reason(error)}") from error

    images, labels, texts, keys, without = [], [], [], [], []
    for key, members in groups:
        image = next((members[suffix] for suffix in IMAGE_MEMBERS if suffix in members), None)
        if image is None:
            without.append(key)
            continue
        images.append(image)
        labels.append(members.get(LABEL_MEMBER, (-1, 0)))
        texts.append(members.get(TEXT_MEMBER, (-1, 0)))
        keys.append(key.encode("utf-8", "surrogateescape"))
    return TarIndex(
        images=np.array(images, dtype=np.int64).reshape(-1, 2),
        labels=np.array(labels, dtype=np.int64).reshape(-1, 2),
        texts=np.array(texts, dtype=np.int64).reshape(-1, 2),
        keys=b"".join(keys),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        size=size,
        problem=problem,
        without_image=len(without),
        examples=tuple(without[:5]),
    )


def _group_members(archive: tarfile.TarFile, size: int) -> tuple[list[tuple[str, dict]], str]:
    """Samples as ``(key, {suffix: (offset, size)})`` in file order, and what is wrong with the archive."""
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    cut_member = None
    try:
        while (member := archive.next()) is not None:
            archive.members = []  # tarfile would keep every header in memory
            key, suffix = base_plus_ext(member.name)
            if not member.isreg() or key is None or _META.match(member.name):
                continue
            if member.offset_data + member.size > size:
                cut_member = key
                break
            if not groups or groups[-1][0] != key:
                groups.append((key, {}))
            groups[-1][1].setdefault(suffix.lower(), (member.offset_data, member.size))
    except tarfile.ReadError:
        pass  # the file ends inside a member; the check below finds no end mark
    if cut_member is None:
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(512) == bytes(512):  # the end mark
            return groups, ""
    # The sample that the cut runs through is not complete. Where the header itself is gone, a last sample with fewer
    # members than the first one shows it.
    if groups and (groups[-1][0] == cut_member or (cut_member is None and len(groups[-1][1]) < len(groups[0][1]))):
        groups.pop()
    return groups, f"truncated or damaged after {len(groups)} complete samples"


def save_index(index: TarIndex, path: Path, stamp: str) -> None:
    """Write an index; ``stamp`` says which state of which shard it describes.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    header = {
        "format": _FORMAT,
        "stamp": stamp,
        "samples": len(index),
        "size": index.size,
        "problem": index.problem,
        "without_image": index.without_image,
        "examples": index.examples,
    }
    arrays = (index.images, index.labels, index.texts, index.key_ends)
    payload = json.dumps(header).encode() + b"\n" + b"".join(a.astype("<i8").tobytes() for a in arrays) + index.keys
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(hashlib.sha256(payload).digest() + payload)


def load_index(path: Path, stamp: str) -> TarIndex | None:
    """Read an index back; ``None`` if there is none, it is damaged, or it describes another state of the shard."""
    # numpy's own file format is out of the question here: reading it from several threads at once fails now and then
    # on Python 3.10 and 3.11, whose ``ast.literal_eval`` is not thread-safe.
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, payload = data[:32], data[32:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    line, body = payload.split(b"\n", 1)
    header = json.loads(line)
    if header["format"] != _FORMAT or header["stamp"] != stamp:
        return None
    count = header["samples"]
    numbers = np.frombuffer(body, "<i8", 7 * count)
    return TarIndex(
        images=numbers[: 2 * count].reshape(count, 2),
        labels=numbers[2 * count : 4 * count].reshape(count, 2),
        texts=numbers[4 * count : 6 * count].reshape(count, 2),
        key_ends=numbers[6 * count :],
        keys=body[numbers.nbytes :],
        size=header["size"],
        problem=header["problem"],
        without_image=header["without_image"],
        examples=tuple(header["examples"]),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, tarfile.TarError):
        return f"not a tar file ({error})"
    return getattr(error, "strerror", None) or str(error)
