"""The tokens of a dataset as a language ("Analyzing the Language of Visual Tokens", arXiv:2411.05001).

How steeply do frequencies fall with their rank (Zipf), how fast do new words appear (Heaps; the paper's token
innovation), how much does a neighbour tell, how far does a stream of tokens compress? A generator of tokens has to
learn what these numbers describe. The paper finds that images fall less steeply than text, show nearly all of their
words within the first hundred images, and barely compress.

A word is a token with all its sub-codes if these fit one integer, else every sub-code is one. Words of different
streams differ, unless the streams share their codebooks. Neighbours are the token before (on a grid: to the left) and
the token above. Entropies of pairs need many tokens: with few, mutual information comes out too large by chance alone.
Its ``_excess`` is what is left after subtracting the same number for neighbours taken from the next image.

Everything is computed at the end from stored tokens, of evenly spaced images if there are more than ``max_tokens``.
"""

from __future__ import annotations

import heapq
import lzma
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...tokenizers.base import Stream
from ..metric import Metric, MetricUnavailable, Pairs, State
from .curves import log_spaced
from .store import TokenStore, pooled

_WORD_BITS = 62  # a word is an int64
_XZ_BYTES = 1 << 22


class TokenLanguage(Metric):
    """Statistics of words, of their neighbours, and of their compression.

    Args:
        store: the tokens of the same images.
        codebook_sizes: the tokenizer's codebooks, which tells whether streams share them; ``None``: they do not.
        max_tokens: words looked at; bounds time and memory.

    Raises:
        ValueError: if ``max_tokens`` is not positive.
    """

    def __init__(
        self, store: TokenStore, codebook_sizes: Sequence[int] | None = None, max_tokens: int = 1 << 22
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be positive; got {max_tokens}")
        self.store = store
        self.codebook_sizes = codebook_sizes
        self.max_tokens = max_tokens
        self._details: dict[str, Any] = {}

    def update(self, pairs: Pairs) -> None:
        """Nothing: the store keeps the tokens."""

    def state_dict(self) -> State:
        return {}

    def merge(self, state: State) -> None:
        """Nothing: the store has the tokens."""

    def compute(self) -> dict[str, float]:
        if not len(self.store):
            raise MetricUnavailable("no image was evaluated")
        streams, vocabulary = self._read()
        flat = np.concatenate([words.reshape(len(words), -1) for words in streams], 1)  # (images, L)
        types, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
        if types[-1] < 0:
            raise MetricUnavailable("all tokens are dropped")
        dropped = int(types[0] < 0)  # -1 is no word
        first = first[dropped:] // flat.shape[1]  # the image of every word's first occurrence
        ids = (inverse.reshape(flat.shape) - dropped).astype(np.int32)
        ends = np.cumsum([words[0].size for words in streams])[:-1]
        streams = [own.reshape(words.shape) for own, words in zip(np.split(ids, ends, axis=1), streams, strict=True)]
        counts = np.bincount(ids[ids >= 0])
        left, above = (_pairs(streams, self.store.layout, upwards) for upwards in (False, True))
        self._details = {
            "images": len(ids),
            "images_in_total": len(self.store),
            "tokens": int(counts.sum()),
            "zipf": _ranked(counts),
            "innovation": _innovation(first, ids, left),
        }
        return {
            "type_token_ratio": len(counts) / int(counts.sum()),
            "unigram_entropy": _entropy(counts),
            **_zipf(counts),
            **_heaps(self._details["innovation"], first),
            **_neighbours(*left, "left"),
            **_neighbours(*above, "above"),
            **_compression(counts, ids, vocabulary),
        }

    def details(self) -> dict[str, Any]:
        """``zipf``: counts at some ranks; ``innovation``: words, and pairs of them, known after some numbers of
        images; ``images`` looked at, of ``images_in_total``, and ``tokens``: the words in them."""
        return self._details

    def _read(self) -> tuple[list[np.ndarray], int]:
        """The words of every stream, int64 ``(images, N, S)`` with -1 where one is dropped, and how many there can be.

        Raises:
            MetricUnavailable: for codebooks that are too large to number their codes.
        """
        layout, shared = self.store.layout, pooled(self.store.layout, self.codebook_sizes)
        sizes = [math.prod(stream.codebook_sizes) for stream in layout]
        whole = (sizes[0] if shared else sum(sizes)) <= 1 << _WORD_BITS
        if not whole:
            sizes = [sum(stream.codebook_sizes) for stream in layout]
        if sum(sizes) > 1 << _WORD_BITS:
            raise MetricUnavailable(f"codebooks of more than 2^{_WORD_BITS} codes cannot be read as words")
        offsets = [0] * len(layout) if shared else [sum(sizes[:number]) for number in range(len(layout))]
        length = sum(stream.length * (1 if whole else stream.num_subcodes) for stream in layout)
        step = max(1, math.ceil(len(self.store) * length / self.max_tokens))
        parts: list[list[np.ndarray]] = [[] for _ in layout]
        start = 0
        for tokens in self.store.blocks():
            chosen = slice(-start % step, None, step)
            start += len(tokens)
            for stream, offset, own in zip(layout, offsets, parts, strict=True):
                codes = tokens.indices[stream.name][chosen].numpy()
                own.append(_words(codes, stream.codebook_sizes, whole, offset))
        return [np.concatenate(own) for own in parts], sizes[0] if shared else sum(sizes)


def huffman_bits(counts: np.ndarray) -> int:
    """Bits that a Huffman code of words with these counts takes for all of them; 0 for a single word.

    Equal counts are joined many at a time, so the work depends on how many different counts there are.
    """
    weights, multiplicity = np.unique(counts, return_counts=True)
    number = dict(zip(weights.tolist(), multiplicity.tolist(), strict=True))
    heap = sorted(number)
    total = 0

    def add(weight: int, times: int) -> None:
        if weight not in number:
            heapq.heappush(heap, weight)
        number[weight] = number.get(weight, 0) + times

    while heap:
        weight = heapq.heappop(heap)
        times = number.pop(weight)
        if times > 1:
            total += 2 * weight * (times // 2)
            add(2 * weight, times // 2)
            if times % 2:
                add(weight, 1)
        elif heap:
            other = heap[0]
            total += weight + other
            number[other] -= 1
            if not number[other]:
                heapq.heappop(heap)
                del number[other]
            add(weight + other, 1)
    return total


def _words(codes: np.ndarray, sizes: Sequence[int], whole: bool, offset: int) -> np.ndarray:
    """Codes ``(n, N, G)`` as words ``(n, N, 1)``, or ``(n, N, G)`` if not ``whole``; -1 where a code is dropped."""
    if not whole:
        return np.where(codes < 0, -1, codes + (offset + np.cumsum([0, *sizes[:-1]])))
    words = np.zeros(codes.shape[:2], np.int64)
    for column, size in enumerate(sizes):
        words = words * size + codes[:, :, column]
    return np.where((codes < 0).any(2), -1, words + offset)[:, :, None]


def _pairs(streams: Sequence[np.ndarray], layout: Sequence[Stream], above: bool) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours and their words, ``(images, M)`` each: the word before (on a grid to the left), or the one above."""
    found = []
    for stream, words in zip(layout, streams, strict=True):
        if stream.grid is None:
            if not above:
                found.append((words[:, :-1], words[:, 1:]))
            continue
        grid = words.reshape(len(words), *stream.grid, -1)  # (images, h, w, S)
        found.append((grid[:, :-1], grid[:, 1:]) if above else (grid[:, :, :-1], grid[:, :, 1:]))
    empty = np.empty((len(streams[0]), 0), np.int32)
    before = [part.reshape(len(part), -1) for part, _ in found]
    after = [part.reshape(len(part), -1) for _, part in found]
    return np.concatenate([empty, *before], 1), np.concatenate([empty, *after], 1)


def _neighbours(before: np.ndarray, words: np.ndarray, name: str) -> dict[str, float]:
    """What neighbours ``(images, M)`` tell about the words beside them, in bits."""
    if not ((before >= 0) & (words >= 0)).any():
        return {}
    joint, neighbour, information = _information(before, words)
    values = {f"conditional_entropy_{name}": joint - neighbour, f"mutual_information_{name}": information}
    if name == "left":
        values["bigram_entropy"] = joint
    strangers = np.roll(before, 1, axis=0)
    if len(before) > 1 and ((strangers >= 0) & (words >= 0)).any():
        values[f"mutual_information_{name}_excess"] = information - _information(strangers, words)[2]
    return values


def _information(before: np.ndarray, words: np.ndarray) -> tuple[float, float, float]:
    """Entropy of the pairs, entropy of the first of them, mutual information of the two."""
    kept = (before >= 0) & (words >= 0)
    before, words = before[kept].astype(np.int64), words[kept]
    _, counts = np.unique(before * (int(words.max()) + 1) + words, return_counts=True)
    joint, first = _entropy(counts), _entropy(np.bincount(before))
    return joint, first, first + _entropy(np.bincount(words)) - joint


def _innovation(first: np.ndarray, ids: np.ndarray, left: tuple[np.ndarray, np.ndarray]) -> dict[str, list[int]]:
    """How many words, and pairs of neighbours, are known after some numbers of images."""
    images = np.array(log_spaced(len(ids)))
    curve = {
        "images": images.tolist(),
        "tokens": np.cumsum((ids >= 0).sum(1))[images - 1].tolist(),
        "types": np.searchsorted(np.sort(first), images - 1, side="right").tolist(),
    }
    before, words = left
    kept = (before >= 0) & (words >= 0)
    if kept.any():
        pairs = before[kept].astype(np.int64) * (int(words.max()) + 1) + words[kept]
        _, places = np.unique(pairs, return_index=True)
        begin = np.sort(np.nonzero(kept)[0][places])
        curve["bigram_types"] = np.searchsorted(begin, images - 1, side="right").tolist()
    return curve


def _heaps(curve: dict[str, list[int]], first: np.ndarray) -> dict[str, float]:
    known = np.sort(first)[math.ceil(0.9 * len(first)) - 1] + 1
    exponent = _slope(np.log(np.maximum(curve["tokens"], 1)), np.log(np.maximum(curve["types"], 1)))
    return {"heaps_exponent": exponent, "images_to_90pct_types": float(known)}


def _ranked(counts: np.ndarray) -> dict[str, list[int]]:
    """Counts in descending order, at some ranks."""
    ranks = np.array(log_spaced(len(counts)))
    return {"rank": ranks.tolist(), "count": np.sort(counts)[::-1][ranks - 1].tolist()}


def _zipf(counts: np.ndarray) -> dict[str, float]:
    """Exponents of the frequency over the rank: of all words, of the frequent ones and of the rare ones.

    The parts meet at the square root of their number, the middle of the logarithmic axis; points of a fit are evenly
    spaced along it, so that the many rare words do not outweigh the others.
    """
    table = _ranked(counts)
    rank, x, y = np.array(table["rank"]), np.log(table["rank"]), np.log(table["count"])
    head, tail = rank <= math.sqrt(len(counts)), rank >= math.sqrt(len(counts))
    return {
        "zipf_exponent": -_slope(x, y),
        "zipf_exponent_head": -_slope(x[head], y[head]),
        "zipf_exponent_tail": -_slope(x[tail], y[tail]),
    }


def _compression(counts: np.ndarray, ids: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Size under a Huffman code, and under xz, relative to a fixed rate."""
    if vocabulary == 1:
        return {}
    bits = math.log2(vocabulary)
    width = np.dtype("<u2" if len(counts) <= 1 << 16 else "<u4")
    stream = ids[ids >= 0][: _XZ_BYTES // width.itemsize].astype(width)
    packed = lzma.compress(stream.tobytes())
    return {
        "huffman_ratio": huffman_bits(counts) / (int(counts.sum()) * bits),
        "xz_ratio": 8 * len(packed) / (len(stream) * bits),
    }


def _entropy(counts: np.ndarray) -> float:
    """In bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the least-squares line; NaN for fewer than two points."""
    if len(x) < 2 or np.ptp(x) == 0:
        return math.nan
    return float(np.polyfit(x, y, 1)[0])
