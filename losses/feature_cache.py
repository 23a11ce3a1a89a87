"""What a frozen network says about every sample of a dataset, kept on disk: teacher features, or another tokenizer's
codes.

An epoch costs one pass of the network; the later ones read. That is right only where a sample always looks the same:
deterministic crops and no mirror images. It needs room: features of DINOv2-B for one image are 393 KB in float16, half
a terabyte for ImageNet; 256 codes are 512 bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
_FORMAT = 1


class SampleCache:
    """Rows of one shape and type, keyed by the sample's index in its dataset, in two files of a folder.

    Processes of one machine may share the folder: each writes the rows that it computes. A row is marked as present
    after it is written, so a killed process leaves nothing half done. (A machine that loses power may: delete the
    folder then.) Processes of other machines need folders of their own, on a disk of their own.

    Args:
        folder: made when first needed.
        num_samples: length of the dataset.
        dtype: type of the stored rows. What is returned went through it, whether read or just computed.

    Raises:
        ValueError: for a length below 1 or another type.
    """

    def __init__(
        self,
        folder: str,
        num_samples: int,
        dtype: Literal["float16", "float32", "int16", "int32", "int64"] = "float16",
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1; got {num_samples}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}; got {dtype!r}")
        self.folder = Path(folder).expanduser()
        self.num_samples = num_samples
        self.dtype = dtype
        self._fingerprint: dict[str, Any] | None = None
        self._rows: np.memmap | None = None
        self._present: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_present": None}  # another process opens the files itself

    def bind(self, fingerprint: dict[str, Any]) -> None:
        """Say what the rows depend on: the network, its weights, the size of its images.

        Raises:
            ValueError: if the folder holds rows of something else.
        """
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._rows = self._present = None
        self._open()

    @property
    def bound(self) -> bool:
        """Whether :meth:`bind` has been called."""
        return self._fingerprint is not None

    def get_or_compute(
        self, indices: Tensor, compute: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
    ) -> Tensor:
        """The rows of a batch; those that are not there yet are computed and kept.

        Args:
            indices: ``(B,)`` int64, which samples the batch holds. On the CPU: elsewhere, reading them waits for the
                device.
            compute: called with the positions ``(M,)`` int64 on the CPU, in the batch, of the rows that are missing;
                returns them, ``(M, ...)``. Not called if nothing is missing.
            device: where the result goes.

        Returns:
            ``(B, ...)`` in the type of the cache.

        Raises:
            RuntimeError: if :meth:`bind` has not been called.
            ValueError: for an index outside the dataset, or rows of another shape or out of the type's range.
        """
        if self._fingerprint is None:
            raise RuntimeError("SampleCache.bind must say what the rows depend on before they are read")
        keys = indices.cpu().numpy()
        if keys.ndim != 1 or keys.size == 0 or keys.min() < 0 or keys.max() >= self.num_samples:
            raise ValueError(
                f"indices must be (B,) from 0 to {self.num_samples - 1} (num_samples={self.num_samples}); got {indices}"
            )
        if self._present is None:
            self._open()
        there = np.zeros(len(keys), dtype=bool) if self._present is None else self._present[keys] != 0
        if there.all():
            return torch.from_numpy(self._rows[keys]).to(device, non_blocking=True)
        missing = torch.from_numpy(np.flatnonzero(~there))
        computed = compute(missing).detach()
        kept = self._keep(keys[~there], computed)
        if not there.any():
            return computed.to(device, kept.dtype)
        rows = torch.empty((len(keys), *kept.shape[1:]), dtype=kept.dtype)
        rows[missing] = kept
        rows[torch.from_numpy(np.flatnonzero(there))] = torch.from_numpy(self._rows[keys[there]])
        return rows.to(device)

    def _keep(self, keys: np.ndarray, computed: Tensor) -> Tensor:
        """Write rows, and return them as they are stored, on the CPU."""
        computed = computed.cpu()
        kept = computed.to(_DTYPES[self.dtype])
        exact = (
            torch.isfinite(kept).all() if kept.is_floating_point() else torch.equal(kept.to(computed.dtype), computed)
        )
        if not exact:
            low, high = float(computed.min()), float(computed.max())
            raise ValueError(f"dtype {self.dtype} of the cache in {self.folder} cannot hold {low:g} to {high:g}")
        if self._rows is None:
            self._create(kept.shape[1:])
        if len(kept) != len(keys) or kept.shape[1:] != self._rows.shape[1:]:
            expected = (len(keys), *self._rows.shape[1:])
            raise ValueError(f"the cache in {self.folder} takes rows {expected} here; got {tuple(kept.shape)}")
        self._rows[keys] = kept.numpy()
        self._present[keys] = 1
        return kept

    def _create(self, shape: torch.Size) -> None:
        """Make the files, whichever process comes first; they take room on disk as rows are written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            self._open()
            if self._rows is not None:
                return
            row_bytes = int(np.prod(shape)) * np.dtype(self.dtype).itemsize
            for name, size in (("rows.bin", self.num_samples * row_bytes), ("present.bin", self.num_samples)):
                with open(self.folder / name, "wb") as file:
                    file.truncate(size)
            partial = self.folder / "cache.json.partial"
            partial.write_text(json.dumps(self._describe() | {"shape": list(shape)}, indent=2))
            os.replace(partial, self.folder / "cache.json")  # last: its presence says that the files are whole
            self._open()

    def _describe(self) -> dict[str, Any]:
        own = {"format": _FORMAT, "num_samples": self.num_samples, "dtype": self.dtype}
        return {**own, "fingerprint": self._fingerprint}

    def _open(self) -> None:
        """Map the files if they are there.

        Raises:
            ValueError: if they hold something else.
        """
        try:
            stored = json.loads((self.folder / "cache.json").read_text())
        except FileNotFoundError:
            return
        except ValueError as error:
            raise ValueError(f"{self.folder / 'cache.json'} is damaged ({error}); delete the folder") from error
        shape = stored.pop("shape", None)
        differences = list(_differences(stored, self._describe()))
        if shape is None or differences:
            raise ValueError(
                f"the cache in {self.folder} was made by something else: {'; '.join(differences)}. Delete the folder "
                f"or choose another one"
            )
        shape = (self.num_samples, *shape)
        self._rows = np.memmap(self.folder / "rows.bin", dtype=self.dtype, mode="r+", shape=shape)
        self._present = np.memmap(self.folder / "present.bin", dtype=np.uint8, mode="r+", shape=shape[:1])


def _differences(stored: Any, current: Any, path: str = "") -> Any:
    """Yield ``path: stored there, current here`` for every leaf in which two trees of plain data differ."""
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(set(stored) | set(current)):
            yield from _differences(stored.get(key), current.get(key), f"{path}.{key}".lstrip("."))
    elif stored != current:
        yield f"{path} is {stored!r} there, {current!r} here"
