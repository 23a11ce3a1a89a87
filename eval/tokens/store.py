"""The tokens of all images on disk, for whatever can only be said about all of them together.

Counts of codes fit into memory; counts of pairs of codes, the order of words, codes of a codebook of 2^36 entries do
not. 50 000 images of 256 tokens with 16 384 codes are a file of 26 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...tokenizers.base import Stream, Tokens
from ..metric import Metric, MetricUnavailable, Pairs, State
from ..rows import Rows


class TokenStore(Metric):
    """Keeps the tokens of every image. It has no values of its own; other metrics read it in their ``compute``.

    An evaluation builds one per variant, lists it among the metrics, and gives it to those that read it.
    """

    def __init__(self) -> None:
        self.layout: tuple[Stream, ...] = ()
        self._rows: Rows | None = None
        self._place: tuple[Path, str] | None = None

    def open(self, folder: Path, part: str) -> None:
        self._place = (folder, part)

    def update(self, pairs: Pairs) -> None:
        tokens = tokens_of(pairs)
        rows = self._table(tokens.layout)
        rows.append(pairs.index, side_by_side(tokens))

    def state_dict(self) -> State:
        if self._rows is None:
            return {}
        return {"layout": layout_state(self.layout), "rows": self._rows.state_dict()}

    def merge(self, state: State) -> None:
        if state:
            self._table(layout_of(state["layout"])).merge(state["rows"])

    def compute(self) -> dict[str, float]:
        return {}

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def index(self) -> np.ndarray:
        """The numbers of the stored images, int64 ``(N,)`` ascending."""
        return np.empty(0, np.int64) if self._rows is None else self._rows.index()

    def blocks(self, size: int = 1024) -> Iterator[Tokens]:
        """The tokens in the order of the images, at most ``size`` images at a time."""
        if self._rows is None:
            return
        widths = [stream.length * stream.num_subcodes for stream in self.layout]
        for block in self._rows.blocks(size):
            flat = block.to(torch.int64)
            if self._rows.dtype == np.uint16:
                flat = flat.masked_fill(flat == _DROPPED, -1)
            parts = zip(self.layout, flat.split(widths, 1), strict=True)
            yield Tokens(
                {stream.name: part.reshape(len(flat), stream.length, -1) for stream, part in parts}, self.layout
            )

    def _table(self, layout: tuple[Stream, ...]) -> Rows:
        if self._rows is None:
            if self._place is None:
                raise RuntimeError("open() comes before update() and merge()")
            largest = max(size for stream in layout for size in stream.codebook_sizes)
            dtype = "uint16" if largest <= _DROPPED else "int32" if largest <= 1 << 31 else "int64"
            self.layout = layout
            self._rows = Rows(sum(stream.length * stream.num_subcodes for stream in layout), dtype)
            self._rows.open(*self._place)
        same_layout(self.layout, layout)
        return self._rows


_DROPPED = (1 << 16) - 1  # -1 in 16 bits without a sign


def tokens_of(pairs: Pairs) -> Tokens:
    """The tokens of a batch.

    Raises:
        MetricUnavailable: if its reconstructions were not decoded from any.
    """
    if pairs.tokens is None:
        raise MetricUnavailable("these reconstructions were not decoded from tokens")
    return pairs.tokens


def side_by_side(tokens: Tokens) -> Tensor:
    """All codes of an image, stream after stream, ``(B, L)``; -1 where a token is dropped."""
    return torch.cat([tokens.indices[stream.name].flatten(1) for stream in tokens.layout], 1)


def same_layout(known: tuple[Stream, ...], layout: tuple[Stream, ...]) -> None:
    """Raise ``ValueError`` if tokens change their layout within an evaluation."""
    if known != layout:
        raise ValueError(f"all images of an evaluation must have tokens of one layout; got {known} and {layout}")


def pooled(layout: Sequence[Stream], codebook_sizes: Sequence[int] | None) -> bool:
    """Whether all streams draw from the same codebooks, as the scales of a pyramid do.

    Args:
        layout: the streams.
        codebook_sizes: all codebooks that the tokenizer has; ``None`` if that is not known.
    """
    if codebook_sizes is None:
        return False
    return len(layout) > 1 and all(stream.codebook_sizes == tuple(codebook_sizes) for stream in layout)


def layout_state(layout: Sequence[Stream]) -> list[list]:
    """A layout as plain data."""
    return [[s.name, s.length, list(s.codebook_sizes), None if s.grid is None else list(s.grid)] for s in layout]


def layout_of(state: list[list]) -> tuple[Stream, ...]:
    """The inverse of :func:`layout_state`."""
    return tuple(Stream(name, length, tuple(sizes), grid and tuple(grid)) for name, length, sizes, grid in state)
