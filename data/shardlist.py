"""Names of shards: patterns with braces, globs and joined lists to paths and URLs."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from webdataset.gopen import gopen_schemes
from webdataset.shardlists import expand_urls


def expand_patterns(patterns: Iterable[str]) -> list[str]:
    """Write out braces, ``::`` and ``${variables}`` as webdataset does; globs stay. Nothing is looked up on disk.

    Raises:
        ValueError: for an empty list, a pattern that does not expand, or a URL that webdataset cannot open.
    """
    shards = []
    for pattern in patterns:
        try:
            shards += [name for name in expand_urls(pattern) if name]
        except (AssertionError, ValueError) as error:  # an undefined variable, unbalanced braces
            raise ValueError(f"shards: cannot expand {pattern!r}: {error}") from error
    if not shards:
        raise ValueError("shards must name at least one shard; got none")
    for shard in shards:
        if not is_local(shard):
            _check_scheme(shard)
    return shards


def find_shards(names: list[str], allow_missing: bool) -> tuple[list[str], list[str]]:
    """Absolute paths and URLs of the shards that exist (URLs count as existing), and the names that are missing.

    Raises:
        FileNotFoundError: if any is missing and that is not allowed, or all are.
        ValueError: for a shard listed twice.
    """
    shards, missing = [], []
    for name in names:
        if not is_local(name):
            shards.append(name)
            continue
        path = os.path.expanduser(unquote(urlsplit(name).path) if name.startswith("file:") else name)
        found = [path] if os.path.exists(path) else sorted(glob.glob(path))
        shards += [os.path.abspath(match) for match in found]
        if not found:
            missing.append(path)
    if missing and (not allow_missing or not shards):
        listed = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        remedy = "check the pattern, or pass on_missing='skip'" if shards else "check the pattern"
        raise FileNotFoundError(f"shards: {len(missing)} of {len(names)} do not exist: {listed}; {remedy}")
    twice = sorted(name for name, count in Counter(shards).items() if count > 1)
    if twice:
        raise ValueError(f"shards: listed more than once: {', '.join(twice[:10])}; every shard counts once")
    return shards, missing


def is_local(shard: str) -> bool:
    """Whether a shard is a path (or a ``file:`` URL) on this machine."""
    return not shard.startswith("pipe:") and urlsplit(shard).scheme in ("", "file")


def _check_scheme(url: str) -> None:
    scheme = url.split(":", 1)[0]
    if scheme in gopen_schemes:
        return
    accepted = ", ".join(["paths", *sorted(name for name in gopen_schemes if not name.startswith("__"))])
    remedy = "; write 'pipe:aws s3 cp URL -' for S3" if scheme == "s3" else ""
    raise ValueError(f"shards: nothing opens {scheme!r} URLs such as {url!r}; accepted: {accepted}{remedy}")
