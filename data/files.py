"""Files that appear whole or not at all, and where files are found and kept.

Everything is written under a hidden temporary name beside the final one, flushed to disk, and then renamed. A writer
that is killed leaves at most the temporary name behind; one that fails removes it.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends without error it becomes ``path``.

    Missing parent folders are created; an existing file is replaced.

    Raises:
        OSError: naming ``path`` and the reason, if it cannot be written.
    """
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # some writers make files that only their owner may read
            _flush(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _flush(path.parent)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """:func:`atomic_file`, opened for binary writing."""
    with atomic_file(Path(path)) as partial, open(partial, "wb") as file:
        yield file


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends without error it becomes ``path``.

    Missing parent folders are created. An existing folder is replaced as a whole: whoever calls this has made sure
    that it may go.

    Raises:
        OSError: naming ``path`` and the reason, if it cannot be written.
    """
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, old = _partial(path), None
        partial.mkdir()
        try:
            yield partial
            probe = _partial(partial / "mode")
            probe.touch()
            mode = probe.stat().st_mode
            probe.unlink()
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
                _flush(file)
            _flush(partial)
            if path.exists():
                # A folder cannot be renamed onto a full one, so the old one steps aside and is removed afterwards.
                old = _partial(path)
                os.rename(path, old)
            try:
                os.rename(partial, path)
            except OSError:
                if old is not None:
                    os.rename(old, path)
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        _flush(path.parent)


def _partial(path: Path) -> Path:
    """A temporary name beside ``path`` that no other writer uses."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"


def _flush(path: Path) -> None:
    """Bring a file or the entries of a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Say which path could not be written and what helps, whoever noticed the failure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot write {path}: {reason}. Free some space, or choose another place"
        raise OSError(code, message) from error


def walk_files(root: Path) -> list[Path]:
    """All files below a folder, links followed, hidden files and folders left out."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
    return found


def cache_folder() -> Path:
    """Where Vistok keeps what it can make or fetch again: ``$VISTOK_CACHE``, else ``vistok`` in the user's cache."""
    if explicit := os.environ.get("VISTOK_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vistok"
