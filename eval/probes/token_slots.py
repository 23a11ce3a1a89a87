"""Flattened token sequences as a language model predicts them: one softmax of bounded size per position.

A sequence of :meth:`~vistok.tokenizers.base.Tokens.flatten` has a range of ids for every sub-code of every stream, so a
model that knows its position chooses among the codes of one codebook only. Lookup-free codebooks have 2^18 codes and
more; such a code is split into digits, as Open-MAGVIT2 (arXiv:2409.04410) does for its generator. By the chain rule
the bits of the digits add up to those of the code, so nothing is lost but the length of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...tokenizers.base import Stream

LARGEST_CODEBOOK = 16384


class Slots:
    """What stands at every position of a sequence.

    Args:
        layout: of the tokens.
        largest: ids at a position at most; larger codebooks become digits, most significant first, side by side.

    Attributes:
        length: P, positions of a sequence, digits counted.
        vocab_size: V, ids of all positions together.
        groups: first id, number of ids, and positions ``(n,)``, of positions that share a range of ids.
        share: float64 ``(P,)``, the part of a token that is complete at a position: 1 / G after each of G sub-codes.
        bits: float64 ``(P,)``, bits at a fixed rate of the code that is complete at a position.
    """

    def __init__(self, layout: Sequence[Stream], largest: int = LARGEST_CODEBOOK) -> None:
        self.groups: list[tuple[int, int, Tensor]] = []
        self.vocab_size = self.length = 0
        table, values = [], []
        begin = offset = 0  # of the stream: among positions and ids of the flattened sequence
        for stream in layout:
            columns, weights = [], []  # of one token, equal for all tokens of the stream
            for subcode, size in enumerate(stream.codebook_sizes):
                digits = _digits(size, largest)
                for number, (power, ids) in enumerate(digits):
                    last = number == len(digits) - 1
                    columns.append((begin + subcode, offset, size, power, ids, self.vocab_size))
                    weights.append((last / stream.num_subcodes, last * math.log2(size)))
                    self.vocab_size += ids
                offset += size
            width = len(columns)
            rows = torch.tensor(columns).repeat(stream.length, 1)  # (N * width, 6)
            rows[:, 0] += torch.arange(stream.length).repeat_interleave(width) * stream.num_subcodes
            for column, (*_, ids, first) in enumerate(columns):
                self.groups.append((first, ids, self.length + torch.arange(stream.length) * width + column))
            table.append(rows)
            values.append(torch.tensor(weights, dtype=torch.float64).repeat(stream.length, 1))  # (N * width, 2)
            self.length += len(rows)
            begin += stream.length * stream.num_subcodes
        self._source, self._offset, self._size, self._power, self._ids, self._first = torch.cat(table).T
        self.share, self.bits = torch.cat(values).T

    def read(self, ids: Tensor) -> Tensor:
        """Sequences ``(B, P)`` of flattened ids int64 ``(B, L)``; -1 stays -1.

        Raises:
            ValueError: for an id outside the range of its sub-code.
        """
        ids = ids[:, self._source]
        codes = ids - self._offset
        bad = (ids >= 0) & ((codes < 0) | (codes >= self._size))
        if bad.any():
            image, position = bad.nonzero()[0].tolist()
            low, size = int(self._offset[position]), int(self._size[position])
            raise ValueError(
                f"id {int(ids[image, position])} stands at a place of the layout that holds {low} to {low + size - 1}"
            )
        digits = self._first + codes.div(self._power, rounding_mode="floor") % self._ids
        return torch.where(ids < 0, -1, digits)

    def log_unigram(self, counts: Tensor) -> Tensor:
        """Natural log-probability float64 ``(V,)`` of every id within its range, of counts ``(V,)``.

        Half a count is added to each (Krichevsky and Trofimov, 1981), so that codes that were not met stay possible.
        """
        counts = counts.double() + 0.5
        return torch.cat([(part / part.sum()).log() for part in counts.split([ids for _, ids, _ in self.groups])])


def _digits(size: int, largest: int) -> list[tuple[int, int]]:
    """Place value and number of values of every digit of a code out of ``size``, most significant first."""
    count, base = 1, size
    while base > largest:
        count += 1
        base = math.ceil(size ** (1 / count))
    powers = [base**place for place in reversed(range(count))]
    return [(powers[0], math.ceil(size / powers[0]))] + [(power, base) for power in powers[1:]]
