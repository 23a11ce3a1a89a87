"""Checkpoints from the Hugging Face Hub: as little of a repository as a tokenizer needs, through the Hub's own client.

The client resumes downloads, checks them, keeps them in its cache and works from there without a network.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fetch import offline
from .format import CONFIG_FILE, WEIGHT_SUFFIXES, WEIGHTS_FILE, is_own_config
from .published import CONFIG_FILES, choose_weights

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(name: str) -> bool:
    """Whether a name has the form ``organisation/name``."""
    return _REPO_ID.fullmatch(name) is not None


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub.

    Attributes:
        repo_id: ``"organisation/name"``.
        revision: branch, tag or commit.
        token: access token; the one that is logged in if ``None``.
        cache_dir: the Hub's own cache if ``None``.
        local_files_only: take what the cache holds and never ask the network.
    """

    repo_id: str
    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def fetch(self, filename: str | None = None) -> Path:
        """Download config and weights; returns the folder they are in, named by the commit.

        Args:
            filename: of the weights, where the repository holds several.

        Raises:
            FileNotFoundError: if the repository, or the file in it, cannot be had.
            ValueError: if there are several weights and ``filename`` does not choose.
        """
        if filename is not None:
            folder = self._snapshot([*CONFIG_FILES, filename])
            if not (folder / filename).is_file():
                where = "the cache" if self._offline else "there"
                raise FileNotFoundError(
                    f"{filename!r} of repository {self.repo_id} is not in {where}; weights in {where}: "
                    f"{', '.join(self._weights(folder)) or 'none'}"
                )
            return folder
        folder = self._snapshot([CONFIG_FILE])
        if (folder / CONFIG_FILE).is_file() and is_own_config(_parsed(folder / CONFIG_FILE)):
            return self._snapshot([CONFIG_FILE, WEIGHTS_FILE])
        return self._snapshot([*CONFIG_FILES, choose_weights(self._weights(folder), f"repository {self.repo_id}")])

    @property
    def _offline(self) -> bool:
        return self.local_files_only or offline()

    def _snapshot(self, names: Sequence[str]) -> Path:
        """Fetch the files of these names, as far as they exist; returns the folder of the commit."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = snapshot_download(
                self.repo_id,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                allow_patterns=[glob.escape(name) for name in names],
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            remedy = "; downloads are off, give the path of a local copy instead" if self._offline else ""
            raise FileNotFoundError(
                f"there is no folder {self.repo_id!r}, and the repository of that name cannot be fetched: "
                f"{_first_line(error)}{remedy}"
            ) from error
        return Path(folder)

    def _weights(self, folder: Path) -> list[str]:
        """Names of the weights at the top of the repository; of those in the cache if it cannot be asked."""
        from huggingface_hub import HfApi

        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        if not self._offline:
            try:
                names = HfApi(token=self.token).list_repo_files(self.repo_id, revision=self.revision)
            except Exception:  # the client's HTTP library has errors of its own
                pass  # the network went away after the first question, or there is none; the cache may be enough
        return sorted(name for name in names if "/" not in name and name.endswith(WEIGHT_SUFFIXES))


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _parsed(path: Path) -> Any:
    """A JSON file's content; ``None`` if it is not JSON, which the loader reports."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
