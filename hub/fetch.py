"""Bring a file from an address to this machine: resumed where it broke off, checked, and there whole or not at all.

What has arrived lies beside the target under a hidden name that carries a mark of the server's version of the file
(its ``ETag``, else ``Last-Modified``), so that a resumed file is never put together from two versions. Files of the Hub
come through its own client instead, see :mod:`vistok.hub.repository`.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .. import __version__

_CHUNK = 1 << 20
_RETRIES = 3
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class FetchError(OSError):
    """A file that could not be fetched; the message names the address, the reason and what helps."""


def offline() -> bool:
    """Whether the environment forbids downloads, in the Hub's own words: ``HF_HUB_OFFLINE=1``."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)


def fetch(
    address: str,
    path: Path,
    *,
    sha256: str | None = None,
    local_files_only: bool = False,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> Path:
    """Download a file, unless it is there already.

    A connection that breaks is resumed, until it has failed more than three times in a row without progress; what has
    arrived stays for the next call. Processes that want one file wait for the first of them.

    Args:
        address: ``http://`` or ``https://``.
        path: where the file goes; its folder is made.
        sha256: what the file must hash to, in hex; not checked if ``None``.
        local_files_only: never ask the network.
        timeout: seconds to wait for an answer.
        pause: seconds before the first retry, doubled for each further one.

    Returns:
        ``path``.

    Raises:
        ValueError: for an address of another kind.
        FileNotFoundError: if the file is not there and downloads are off (``local_files_only``, ``HF_HUB_OFFLINE``).
        FetchError: (an ``OSError``) if it cannot be fetched, or is not the file that was expected; a wrong file is
            deleted.
    """
    from filelock import FileLock

    if not address.startswith(("http://", "https://")):
        raise ValueError(f"address must begin with http:// or https://; got {address!r}")
    if path.is_file():
        return path
    if local_files_only or offline():
        raise FileNotFoundError(
            f"{path} is not there, and downloads are off (local_files_only or HF_HUB_OFFLINE); fetch {address} on "
            f"another machine and put it there"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            partial = _download(address, path, timeout, pause)
            _check(partial, address, sha256)
            os.replace(partial, path)
    return path


def _download(address: str, path: Path, timeout: float, pause: float) -> Path:
    """Fetch into a partial file, with retries; returns the complete partial file."""
    failures = 0
    while True:
        partial = _latest(path)
        before = partial.stat().st_size if partial else 0
        try:
            return _continue(address, path, partial, timeout)
        except HTTPError as error:
            if error.code < 500:
                raise _failure(address, path, f"the server answers {error.code} {error.reason}") from error
            reason: BaseException = error
        except (URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = error
        partial = _latest(path)
        progressed = partial is not None and partial.stat().st_size > before
        failures = 1 if progressed else failures + 1
        if failures > _RETRIES:
            raise _failure(address, path, f"{reason}; what has arrived is kept") from reason
        time.sleep(pause * 2 ** (failures - 1))


def _continue(address: str, path: Path, partial: Path | None, timeout: float) -> Path:
    """One request: append to what is there, or begin anew if the server does not resume or has another version."""
    start = partial.stat().st_size if partial else 0
    headers = {"User-Agent": f"vistok/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urlopen(Request(address, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code != 416 or partial is None:
            raise
        error.close()
        partial.unlink()  # longer than the server's file, so it is of another version; or complete but never checked
        return _continue(address, path, None, timeout)
    with response:
        target = _partial(path, response.headers)
        resumed = response.status == 206
        if resumed and (target != partial or _range_start(response.headers) != start):
            partial.unlink()
            return _continue(address, path, None, timeout)
        if partial is not None and target != partial:
            partial.unlink()
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with open(target, "ab" if resumed else "wb") as file, _progress(path.name, start, total) as advance:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and target.stat().st_size < total:
        raise ConnectionError(f"the connection broke after {target.stat().st_size} of {total} bytes")
    return target


def _partial(path: Path, headers: Message) -> Path:
    """The name of a partial file, which tells the server's version of the file."""
    mark = headers.get("ETag") or headers.get("Last-Modified") or ""
    return path.with_name(f".{path.name}.{hashlib.sha256(mark.encode()).hexdigest()[:8]}.partial")


def _latest(path: Path) -> Path | None:
    """What an earlier attempt left."""
    found = [file for file in path.parent.iterdir() if file.name.startswith(f".{path.name}.")]
    found = [file for file in found if file.suffix == ".partial"]
    return max(found, key=lambda file: file.stat().st_mtime_ns, default=None)


def _range_start(headers: Message) -> int:
    """First byte of a partial answer; -1 if it does not say."""
    text = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(text) if text.isdecimal() else -1


def _check(partial: Path, address: str, sha256: str | None) -> None:
    if sha256 is None:
        return
    digest = hashlib.sha256()
    with open(partial, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != sha256.lower():
        partial.unlink()
        raise FetchError(
            f"{address} is not the expected file (SHA-256 {found} instead of {sha256.lower()}), and is deleted; "
            f"it was damaged on its way (try again), or its owner replaced it"
        )


def _failure(address: str, path: Path, reason: str) -> FetchError:
    return FetchError(f"{address} cannot be fetched: {reason}. Fetch it another way and put it at {path}")


@contextmanager
def _progress(name: str, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; yields a function that counts bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=start)
        yield lambda count: bar.advance(task, count)
