"""The folder in which an evaluation keeps what is done: parts that appear whole or not at all, and their plan.

A *part* is what one process has gathered since its start, with the numbers of the images that it covers. The plan says
what all parts depend on, so that nothing is added to parts of something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.files import atomic_file, atomic_write
from .metric import EvaluationError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder until the block ends or the process dies.

    On systems and file systems without locks nobody is kept out.

    Raises:
        EvaluationError: if another process has claimed it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by reading processes
        except (BlockingIOError, PermissionError) as error:
            raise EvaluationError(f"another evaluation is at work in {folder.parent}; choose another --out") from error
        except OSError:
            pass
        yield


def prepare_parts(parts: Path, plan: dict[str, Any], resume: bool) -> None:
    """See that a folder of parts belongs to an evaluation.

    Raises:
        FileExistsError: if parts are there and may not be continued.
        EvaluationError: if they belong to another plan.
    """
    parts.mkdir(parents=True, exist_ok=True)
    record = parts / "plan.json"
    present = any(parts.glob("*.pt"))
    if present and not resume:
        raise FileExistsError(
            f"{parts.parent} holds an unfinished evaluation; continue it with --resume, or choose another --out"
        )
    plan = json.loads(json.dumps(plan))
    if present:
        try:
            found = json.loads(record.read_text())
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{record} cannot be read ({error}); begin again in another --out") from error
        if found != plan:
            names = [name for name in sorted({*found, *plan}) if found.get(name) != plan.get(name)]
            differences = "; ".join(f"{name}: {found.get(name)!r} there, {plan.get(name)!r} now" for name in names)
            raise EvaluationError(f"{parts.parent} was begun with other settings ({differences}); choose another --out")
        return
    with atomic_write(record) as file:
        file.write(json.dumps(plan, indent=1).encode())


def write_part(path: Path, part: dict[str, Any]) -> None:
    """Write a part, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_file(path) as partial:
        torch.save(part, partial)


def read_parts(parts: Path) -> list[dict[str, Any]]:
    """All parts that are there, in the order of their names; their tensors stay on disk until they are used.

    Raises:
        EvaluationError: for a part that cannot be read.
    """
    result = []
    for path in sorted(parts.glob("*.pt")):
        try:
            result.append(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # torch raises errors of many kinds for a damaged file
            raise EvaluationError(
                f"{path} is damaged ({error}); delete it, and --resume evaluates its images again"
            ) from error
    return result


def covered(parts: Sequence[dict[str, Any]]) -> np.ndarray:
    """Numbers of the images that parts have done, readable or not."""
    index = [part["index"].numpy() for part in parts]
    unreadable = [np.array(sorted(part["unreadable"]), dtype=np.int64) for part in parts]
    return np.concatenate([np.empty(0, np.int64), *index, *unreadable])
