"""One row per image: its number, its key and what every per-image metric gave it, as a Parquet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.files import atomic_write


def write_per_image(path: str | Path, index: Any, keys: Sequence[str], columns: Mapping[str, Any]) -> None:
    """Write the table, sorted by number, whole or not at all.

    Args:
        path: of the ``.parquet`` file; replaced if it exists.
        index: ``(N,)`` numbers of the images, each once.
        keys: ``(N,)`` what they are called.
        columns: values ``(N,)`` by name, tensors or arrays; kept in their own type. ``index`` and ``key`` are taken.

    Raises:
        ImportError: without pyarrow.
        ValueError: for columns of another length or of a taken name, or an image that stands there twice.
    """
    pyarrow, parquet = _pyarrow()
    index = np.asarray(index, dtype=np.int64)
    if len(np.unique(index)) != len(index):
        raise ValueError(f"index must name every image once; got {len(index) - len(np.unique(index))} repeated numbers")
    if len(keys) != len(index):
        raise ValueError(f"keys must have one entry for each of the {len(index)} images; got {len(keys)}")
    order = np.argsort(index)
    table = {"index": pyarrow.array(index[order]), "key": pyarrow.array([keys[i] for i in order], pyarrow.string())}
    for name, values in columns.items():
        values = np.asarray(values)
        if name in table:
            raise ValueError(f"columns must not be called 'index' or 'key'; got {name!r}")
        if values.shape != index.shape:
            raise ValueError(f"column {name!r} must have shape {index.shape}; got {values.shape}")
        table[name] = pyarrow.array(values[order])
    with atomic_write(path) as file:
        parquet.write_table(pyarrow.table(table), file, compression="zstd")


def read_per_image(path: str | Path) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Numbers ``(N,)``, keys and columns of a table that :func:`write_per_image` wrote.

    Raises:
        ImportError: without pyarrow.
        ValueError: if the file is not such a table.
    """
    pyarrow, parquet = _pyarrow()
    try:
        with open(path, "rb") as file:
            table = parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    if table.column_names[:2] != ["index", "key"]:
        raise ValueError(f"{path} must begin with the columns 'index' and 'key'; got {table.column_names[:2]}")
    columns = {name: table[name].to_numpy() for name in table.column_names[2:]}
    return table["index"].to_numpy(), table["key"].to_pylist(), columns


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("the table of per-image values needs pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet
