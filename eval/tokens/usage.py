"""How the codebooks are used over all images: usage, entropy, rate, and how these depend on the number of images.

Codes are counted on the device, for every codebook of every stream, and at every position as long as that table is
small. A codebook of more than 2^20 codes has no table: its tokens are read from a :class:`~.store.TokenStore`
afterwards, and its digits are counted if it is made of digits. Usage grows with the number of images, so the image in
which each code first occurs is kept too: the curve shows whether the codes that are missing are dead or only rare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...quantizers.base import COUNTS_LIMIT
from ...tokenizers.base import Stream
from ..metric import Metric, MetricUnavailable, Pairs, State
from .codebook import LEVELS
from .curves import log_spaced
from .digits import DigitStatistics
from .distinct import Distinct
from .store import TokenStore, layout_of, layout_state, pooled, same_layout, side_by_side, tokens_of

POSITIONS_LIMIT = 1 << 23  # counters for codes at positions
_NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class _Book:
    """One sub-code of one stream, and where its counters are."""

    name: str
    stream: int
    subcode: int
    size: int
    length: int  # number of positions
    counted: bool
    per_position: bool
    counts: int  # first counter; ``size`` of them, or ``length * size``
    first: int  # first of the ``size`` numbers of first images


class CodebookUsage(Metric):
    """Statistics of the codes.

    Args:
        codebook_sizes: the tokenizer's codebooks, which tells whether streams share them; ``None``: they do not.
        digits: number of values of each digit that an index is packed from, see
            :func:`~vistok.eval.tokens.code_neighbours.code_digits`; empty for codes that are not made of digits.
        store: the tokens of the same images, for codebooks of more than 2^20 codes, which are left out without it.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int] | None = None,
        digits: Sequence[int] = (),
        store: TokenStore | None = None,
    ) -> None:
        self.codebook_sizes = None if codebook_sizes is None else tuple(codebook_sizes)
        self.digits = tuple(digits)
        self.store = store
        self.layout: tuple[Stream, ...] = ()
        self.pixels = 0
        self._images: list[Tensor] = []
        self._digits: dict[int, DigitStatistics] = {}  # by number of sub-codes
        self._details: dict[str, Any] = {}

    def update(self, pairs: Pairs) -> None:
        tokens = tokens_of(pairs)
        device = tokens.indices[tokens.layout[0].name].device
        self._start(tokens.layout, pairs.reconstructions.shape[2] * pairs.reconstructions.shape[3], device)
        flat = side_by_side(tokens)  # (B, L)
        self._images.append(pairs.index)
        for table, offsets in ((self._counts, self._count_slots), (self._first, self._first_slots)):
            # The slot in front takes what does not count: dropped tokens, codebooks without counters.
            slots = torch.where((flat < 0) | (offsets == 0), 0, flat + offsets).flatten()
            if table is self._counts:
                table.scatter_add_(0, slots, torch.ones_like(slots))
            else:
                images = pairs.index.to(device).unsqueeze(1).expand_as(flat).flatten()
                table.scatter_reduce_(0, slots, images, "amin")
        for stream in tokens.layout if self.digits else ():
            statistics = self._digit_statistics(stream.num_subcodes)
            statistics.update(tokens.indices[stream.name].flatten(0, 1))

    def state_dict(self) -> State:
        if not self.layout:
            return {}
        return {
            "layout": layout_state(self.layout),
            "pixels": self.pixels,
            "images": torch.cat(self._images),
            "counts": self._counts.cpu().clone(),
            "first": self._first.cpu().clone(),
            "digits": {str(number): part.state_dict() for number, part in self._digits.items()},
        }

    def merge(self, state: State) -> None:
        if not state:
            return
        self._start(layout_of(state["layout"]), state["pixels"], torch.device("cpu"))
        self._images.append(state["images"])
        self._counts += state["counts"]
        self._first = torch.minimum(self._first, state["first"])
        for number, part in state["digits"].items():
            self._digit_statistics(int(number)).merge(part)

    def compute(self) -> dict[str, float]:
        if not self.layout:
            raise MetricUnavailable("no image was evaluated")
        images = torch.cat(self._images).sort().values
        levels = {book: found for book in self._books if (found := self._used(book)) is not None}
        values = self._rates(levels, len(images))
        if len(levels) == len(self._books):
            wholes = self._wholes(levels)
            values |= _summary(wholes)
            if 1 < len(levels) <= LEVELS:
                for book, found in levels.items():
                    values[f"usage/{book.name}"] = len(found.values) / book.size
                    values[f"perplexity/{book.name}"] = 2**found.entropy
            self._details = {"usage_curve": _usage_curve(wholes, images)}
        else:
            self._details = {}
        values |= self._digit_values()
        self._details |= {
            "images": len(images),
            "tokens": sum(found.total for found in levels.values()),
            "levels": [_level(book, found) for book, found in levels.items()],
            "positions": {book.name: _positions(table) for book, table in self._position_tables()},
        }
        return values

    def details(self) -> dict[str, Any]:
        """``usage_curve`` over the number of images; ``levels`` with the counts in descending order at some ranks;
        ``positions`` with entropy and usage at each; ``digits`` with their entropies and correlations."""
        return self._details

    def _start(self, layout: tuple[Stream, ...], pixels: int, device: torch.device) -> None:
        """Make the counters once the layout is known."""
        if self.layout:
            same_layout(self.layout, layout)
            if pixels != self.pixels:
                raise ValueError(f"all images must have one number of pixels; got {self.pixels} and {pixels}")
            return
        self.layout, self.pixels = layout, pixels
        self._books = list(_books(layout))
        counts, first, number_of_counts, number_of_first = [], [], 1, 1
        for number, stream in enumerate(layout):
            own = [book for book in self._books if book.stream == number]
            positions = torch.arange(stream.length)
            counts.append(torch.stack([b.counted * (b.counts + b.per_position * positions * b.size) for b in own], 1))
            first.append(torch.tensor([[b.counted * b.first for b in own]]).expand(stream.length, -1))
        for book in self._books:
            number_of_counts += book.counted * book.size * (book.length if book.per_position else 1)
            number_of_first += book.counted * book.size
        self._count_slots = torch.cat([part.flatten() for part in counts]).to(device)  # (L,)
        self._first_slots = torch.cat([part.flatten() for part in first]).to(device)  # (L,)
        self._counts = torch.zeros(number_of_counts, dtype=torch.int64, device=device)
        self._first = torch.full((number_of_first,), _NEVER, device=device)

    def _digit_statistics(self, num_subcodes: int) -> DigitStatistics:
        if num_subcodes not in self._digits:
            self._digits[num_subcodes] = DigitStatistics(self.digits, num_subcodes)
        return self._digits[num_subcodes]

    def _position_tables(self) -> Iterator[tuple[_Book, Tensor]]:
        """The books with counters for every position, and these, ``(N, K)`` on the host."""
        for book in self._books:
            if book.per_position:
                counters = self._counts[book.counts : book.counts + book.length * book.size]
                yield book, counters.view(book.length, book.size).cpu()

    def _used(self, book: _Book) -> Distinct | None:
        """The codes of a book that occur; ``None`` if it has neither counters nor stored tokens."""
        if not book.counted:
            return None if self.store is None else self._stored(book)
        counts = self._counts[book.counts :][: book.size * (book.length if book.per_position else 1)].cpu()
        counts = counts.view(-1, book.size).sum(0)
        (values,) = counts.nonzero(as_tuple=True)
        return Distinct(values, counts[values], self._first[book.first :][: book.size].cpu()[values])

    def _stored(self, book: _Book) -> Distinct:
        parts, index, start = [], torch.from_numpy(self.store.index()), 0
        for tokens in self.store.blocks():
            codes = tokens.indices[self.layout[book.stream].name][:, :, book.subcode]  # (n, N)
            images = index[start : start + len(codes)].unsqueeze(1).expand_as(codes)
            parts.append(Distinct.of(codes.flatten(), images.flatten()))
            # Only once as much has come as is there: nearly all tokens may differ, and a union sorts all of them.
            if sum(len(part.values) for part in parts[1:]) > len(parts[0].values):
                parts = [Distinct.union(parts)]
            start += len(codes)
        return Distinct.union(parts)

    def _wholes(self, levels: dict[_Book, Distinct]) -> list[tuple[int, Distinct]]:
        """Sizes and used codes of the codebooks, those put together that streams share."""
        if not pooled(self.layout, self.codebook_sizes):
            return [(book.size, found) for book, found in levels.items()]
        return [
            (size, Distinct.union([found for book, found in levels.items() if book.subcode == subcode]))
            for subcode, size in enumerate(self.codebook_sizes)
        ]

    def _rates(self, levels: dict[_Book, Distinct], images: int) -> dict[str, float]:
        """Bits per pixel, as far as the counts are known."""
        if len(levels) < len(self._books):
            return {}
        pixels = images * self.pixels
        values = {
            "bits_per_pixel": sum(found.total * math.log2(book.size) for book, found in levels.items()) / pixels,
            "bits_per_pixel_entropy": sum(found.total * found.entropy for found in levels.values()) / pixels,
        }
        if all(book.per_position for book in self._books):
            bits = sum(float((table.sum(1) * _entropies(table)).sum()) for _, table in self._position_tables())
            values["bits_per_pixel_entropy_position"] = bits / pixels
        return values

    def _digit_values(self) -> dict[str, float]:
        if not self._digits:
            return {}
        entropies = torch.cat([part.entropies() for part in self._digits.values()])
        pairs = [part.correlations() for part in self._digits.values()]
        self._details["digits"] = [
            {"entropy": _rounded(part.entropies()), "correlation": [_rounded(row) for row in table[:64, :64]]}
            for part, table in zip(self._digits.values(), pairs, strict=True)
        ]
        values = {"digit_entropy": float(entropies.mean())}
        away = [table[~torch.eye(len(table), dtype=torch.bool)].abs() for table in pairs]
        if sum(len(part) for part in away):
            values["digit_correlation"] = float(torch.cat(away).mean())
        return values


def _books(layout: Sequence[Stream]) -> Iterator[_Book]:
    """All sub-codes of all streams, in order."""
    counts, first, left = 1, 1, POSITIONS_LIMIT
    for number, stream in enumerate(layout):
        for subcode, size in enumerate(stream.codebook_sizes):
            names = ([stream.name] if len(layout) > 1 else []) + ([str(subcode)] if stream.num_subcodes > 1 else [])
            counted = size <= COUNTS_LIMIT
            per_position = counted and size * stream.length <= left
            name = ".".join(names) or stream.name
            yield _Book(name, number, subcode, size, stream.length, counted, per_position, counts, first)
            if per_position:
                left -= size * stream.length
            counts += counted * size * (stream.length if per_position else 1)
            first += counted * size


def _summary(wholes: Sequence[tuple[int, Distinct]]) -> dict[str, float]:
    """Values over all codebooks: shares of all codes, means of entropies."""
    total = sum(size for size, _ in wholes)
    used = sum(len(found.values) for _, found in wholes)
    frequent = sum(int((found.counts.double() * size >= 0.01 * found.total).sum()) for size, found in wholes)
    entropies = [found.entropy for _, found in wholes]
    relative = [entropy / math.log2(size) for entropy, (size, _) in zip(entropies, wholes, strict=True) if size > 1]
    return {
        "usage": used / total,
        "usage_1pct": frequent / total,
        "dead_codes": float(total - used),
        "perplexity": sum(2**entropy for entropy in entropies) / len(wholes),
        "code_entropy": sum(entropies) / len(wholes),
        "code_entropy_normalised": sum(relative) / len(relative) if relative else 1.0,
    }


def _usage_curve(wholes: Sequence[tuple[int, Distinct]], images: Tensor) -> dict[str, list]:
    """Share of the codes that the first n images use, for some n."""
    numbers = log_spaced(len(images))
    first = torch.cat([found.first for _, found in wholes]).sort().values
    used = torch.searchsorted(first, images[torch.tensor(numbers) - 1], right=True)
    total = sum(size for size, _ in wholes)
    return {"images": numbers, "usage": [count / total for count in used.tolist()]}


def _level(book: _Book, found: Distinct) -> dict[str, Any]:
    counts = found.counts.sort(descending=True).values
    ranks = log_spaced(len(counts))
    return {
        "name": book.name,
        "size": book.size,
        "tokens": found.total,
        "usage": len(counts) / book.size,
        "entropy": found.entropy,
        "perplexity": 2**found.entropy,
        "ranks": ranks,
        "counts": counts[torch.tensor(ranks, dtype=torch.int64) - 1].tolist(),
    }


def _positions(table: Tensor) -> dict[str, list[float]]:
    """Entropy in bits and usage at every position, from counts ``(N, K)``."""
    return {"entropy": _rounded(_entropies(table)), "usage": _rounded((table > 0).double().mean(1))}


def _entropies(table: Tensor) -> Tensor:
    """Entropy of every row of counts, in bits."""
    share = table.double() / table.sum(1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(share, share).sum(1) / math.log(2) + 0.0


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
