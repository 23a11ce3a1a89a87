"""Tokens replaced by near neighbours, as pFID ("Robust Latent Matters", arXiv:2503.08354) wants them.

In every image a share alpha of the tokens is replaced, each by one of the delta codes nearest to its own, which is
among them. The paper counts ``alpha * tokens`` in every image and looks around the code; the published training code
(:class:`~vistok.quantizers.perturbation.LatentPerturbation`) draws every token for itself and looks around the latent.

The paper gives delta for four sizes of one codebook. For others it grows here with the size; where a token has several
sub-codes, each of them counts as a token, and is replaced within its own codebook with the delta of that codebook's
size.

Which tokens are replaced, and by which of the neighbours in order, is drawn once per image from (seed, its number). So
every pair of alpha and delta perturbs the same tokens, more of them with a larger alpha, and the result does not depend
on batches and processes.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from ...quantizers.base import Quantizer
from ...quantizers.factorized import Factorized
from ...quantizers.perturbation import TABLE_LIMIT, LatentPerturbation, latent_neighbours, replace_tokens
from ...tokenizers.base import Stream, Tokenizer, Tokens
from ..metric import MetricUnavailable, Originals
from ..variants import Codes
from .code_neighbours import Codebook, codebooks, ranked
from .counter_draws import DRAW_BITS, counter_draws
from .store import side_by_side

DELTAS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}
_LATENT_BLOCK = 1 << 22  # neighbours of latents looked up at a time


def deltas_for(codebook_size: int) -> tuple[int, int, int]:
    """The three deltas for a codebook: the published ones, else those of 16 384 codes scaled, from 2 to all codes."""
    if codebook_size in DELTAS:
        return DELTAS[codebook_size]
    low, middle, high = (
        min(max(2, (2 * delta * codebook_size + 16384) // 32768), codebook_size) for delta in DELTAS[16384]
    )
    return low, middle, high


class TokenPerturbation:
    """The draws and the neighbours that they fall on, shared by all pairs of alpha and delta.

    Args:
        codes: the tokenizer.
        neighbours: around the ``code`` or the ``latent``.
        count: ``exact`` or ``bernoulli``.
        seed: of the draws.

    Attributes:
        deltas: for each of the three strengths, delta of every codebook.
        published: whether there is one codebook, of a size for which the paper gives deltas.

    Raises:
        ValueError: for an unknown option.
        MetricUnavailable: for a tokenizer whose codes have no neighbours.
    """

    def __init__(
        self,
        codes: Codes,
        neighbours: Literal["code", "latent"] = "code",
        count: Literal["exact", "bernoulli"] = "exact",
        seed: int = 0,
    ) -> None:
        if neighbours not in ("code", "latent"):
            raise ValueError(f"neighbours must be 'code' or 'latent'; got {neighbours!r}")
        if count not in ("exact", "bernoulli"):
            raise ValueError(f"count must be 'exact' or 'bernoulli'; got {count!r}")
        self.codes, self.neighbours, self.count, self.seed = codes, neighbours, count, seed
        self._known: dict[tuple[Stream, ...], Tensor] = {}
        self.books = _stream_codebooks(codes.tokenizer)
        every = list(dict.fromkeys(book for books in self.books for book in books))
        if neighbours == "latent" and (len(self.books), len(self.books[0]), every[0].width) != (1, 1, 1):
            raise MetricUnavailable("neighbours of latents need one index per token; use neighbours of codes")
        if neighbours == "latent" and every[0].size > TABLE_LIMIT:
            raise MetricUnavailable(f"neighbours of latents need at most {TABLE_LIMIT} codes; use neighbours of codes")
        self.deltas = list(zip(*(deltas_for(book.size) for book in every), strict=True))  # 3 x codebooks
        self.published = len(every) == len(self.books) == len(self.books[0]) == 1 and every[0].size in DELTAS

    def tokens(self, originals: Originals, alpha: float, strength: int) -> Tokens:
        """The perturbed tokens of a batch.

        Args:
            originals: a batch.
            alpha: share of the tokens to replace, 0 to 1.
            strength: 0, 1 or 2, which of the three deltas.
        """
        tokens = self.codes.tokens(originals)
        draws, others = originals.once(("perturbation", id(self)), lambda: self._prepare(originals, tokens))
        flat = side_by_side(tokens)  # (B, L)
        changed = self._chosen(draws, alpha)[:, self._places(tokens)]  # (B, L)
        flat = replace_tokens(flat.unsqueeze(2), others[strength].unsqueeze(2), changed).squeeze(2)
        parts = flat.split([stream.length * stream.num_subcodes for stream in tokens.layout], 1)
        indices = {
            stream.name: part.reshape(-1, stream.length, stream.num_subcodes)
            for stream, part in zip(tokens.layout, parts, strict=True)
        }
        return Tokens(indices, tokens.layout, tokens.mask)

    def _prepare(self, originals: Originals, tokens: Tokens) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Draws that choose among P places ``(B, P)`` and which places hold a token; codes to take, ``(3, B, L)``."""
        flat = side_by_side(tokens)
        places = self._places(tokens)
        number = sum(stream.length * len(books) for stream, books in zip(tokens.layout, self.books, strict=True))
        choice, rank = (
            counter_draws(self.seed, originals.index.to(flat.device), 2 * number).unflatten(1, (-1, 2)).unbind(2)
        )
        held = torch.zeros_like(choice).index_add_(1, places, (flat >= 0).long()) > 0  # (B, P)
        find = self._near_codes if self.neighbours == "code" else functools.partial(self._near_latents, originals)
        others, start = [], 0
        for stream, books in zip(tokens.layout, self.books, strict=True):
            stop = start + stream.length * len(books)
            own = rank[:, start:stop].unflatten(1, (stream.length, len(books)))  # (B, N, books)
            others.append(find(tokens.indices[stream.name], books, own))  # (3, B, N, G)
            start = stop
        return (choice, held), torch.cat([part.flatten(2) for part in others], 2)

    def _chosen(self, draws: tuple[Tensor, Tensor], alpha: float) -> Tensor:
        """Which places are to be replaced, ``(B, P)``; those for a smaller alpha are among them."""
        choice, held = draws
        if self.count == "bernoulli":
            return held & (choice < round(alpha * (1 << DRAW_BITS)))
        order = choice.masked_fill(~held, 1 << DRAW_BITS).argsort(dim=1, stable=True).argsort(dim=1)
        numbers = (torch.arange(held.shape[1] + 1, dtype=torch.float64) * alpha + 0.5 + 1e-9).long()  # half up
        return order < numbers.to(held.device)[held.sum(1, keepdim=True)]

    def _near_codes(self, indices: Tensor, books: list[Codebook], draws: Tensor) -> Tensor:
        """Neighbours of codes ``(B, N, G)`` at drawn ranks ``(B, N, books)``, ``(3, B, N, G)``."""
        found = []
        widths = [book.width for book in books]
        for book, own, drawn in zip(books, indices.split(widths, 2), draws.unbind(2), strict=True):
            ranks, k = self._ranks(book, drawn)
            codes = book.at(own.flatten(0, 1), ranks, k)  # (n, 3, g)
            found.append(codes.unflatten(0, own.shape[:2]).movedim(2, 0))
        return torch.cat(found, 3)

    def _near_latents(self, originals: Originals, indices: Tensor, books: list[Codebook], draws: Tensor) -> Tensor:
        """Neighbours of the latents that became ``indices``, ``(3, B, N, 1)``."""
        quantizer, latents = self._latents(originals, indices)
        ranks, k = self._ranks(books[0], draws.squeeze(2))
        step = max(1, _LATENT_BLOCK // k)
        blocks = zip(latents.flatten(0, -2).split(step), ranks.split(step), strict=True)
        found = torch.cat([ranked(latent_neighbours(quantizer, own, k), rank) for own, rank in blocks])  # (n, 3, 1)
        return found.unflatten(0, indices.shape[:2]).movedim(2, 0)

    def _ranks(self, book: Codebook, draws: Tensor) -> tuple[Tensor, int]:
        """Uniform ranks below each delta of a codebook, ``(n, 3)``, and the largest delta."""
        deltas = deltas_for(book.size)
        return torch.stack([(draws.flatten() * delta) >> DRAW_BITS for delta in deltas], 1), max(deltas)

    def _latents(self, originals: Originals, indices: Tensor) -> tuple[Any, Tensor]:
        """The quantizer with the codebook, and the latents ``(B, *S, D)`` as it compares them with its codes."""
        tokenizer, autocast = self.codes.tokenizer, self.codes.autocast
        (stream,) = tokenizer.layout(tuple(originals.images.shape[2:]))
        with torch.no_grad(), torch.autocast(originals.images.device.type, autocast, enabled=autocast is not None):
            z = tokenizer.latents(originals.images.float() / 255)
            result = tokenizer.quantizer(z.unflatten(1, stream.grid or (stream.length,)))
        quantizer = tokenizer.quantizer
        while isinstance(quantizer, (Factorized, LatentPerturbation)):
            quantizer, result = quantizer.quantizer, result.parts[0]
        return quantizer, result.latents

    def _places(self, tokens: Tokens) -> Tensor:
        """int64 ``(L,)``: to which place every code of an image belongs; codes that name one code together share it."""
        if tokens.layout not in self._known:
            places, start = [], 0
            for stream, books in zip(tokens.layout, self.books, strict=True):
                own = torch.tensor([number for number, book in enumerate(books) for _ in range(book.width)])  # (G,)
                places.append((start + torch.arange(stream.length).unsqueeze(1) * len(books) + own).flatten())
                start += stream.length * len(books)
            self._known[tokens.layout] = torch.cat(places)
        return self._known[tokens.layout].to(next(iter(tokens.indices.values())).device)


def _stream_codebooks(tokenizer: Tokenizer) -> list[list[Codebook]]:
    """For every stream, the codebooks of its sub-codes.

    Raises:
        MetricUnavailable: if the tokenizer has no codes, or no quantizer to ask for neighbours.
    """
    if not tokenizer.layout():
        raise MetricUnavailable(f"{type(tokenizer).__name__} has continuous latents, no codes to replace")
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, Quantizer):
        raise MetricUnavailable(f"{type(tokenizer).__name__} has no .quantizer that knows which codes are neighbours")
    return codebooks(quantizer)
