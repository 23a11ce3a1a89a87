"""Quantizers whose codes stand in a table that can be listed.

Plain vector quantization (arXiv:1711.00937), SimVQ, index backpropagation and two codebooks under one index differ in
where the table comes from and how it learns. What they share is here: search, lookup and neighbours. A subclass
says how latents enter the search (:meth:`CodebookQuantizer.latents_of`), what the table is
(:meth:`CodebookQuantizer.all_codes`) and how single codes are looked up (:meth:`CodebookQuantizer.codes_of`).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import Quantizer, drop, drop_indices
from .neighbours import table_neighbours
from .search import nearest_codes


class CodebookQuantizer(Quantizer):
    """Base of the quantizers with one codebook of K codes and one index per token.

    A subclass implements ``assign`` and the three methods below; :meth:`find` too if its code is not the nearest one.
    """

    @abstractmethod
    def latents_of(self, z: Tensor) -> Tensor:
        """Latents ``(B, *S, D)`` -> rows ``(n, D)`` as they are compared with the codes, in the dtype of the search."""

    @abstractmethod
    def all_codes(self) -> Tensor:
        """The table ``(K, D)`` as latents are compared with it, with its gradient."""

    @abstractmethod
    def codes_of(self, flat: Tensor) -> Tensor:
        """Codes ``(n, D)`` of valid indices ``(n,)``, with their gradient; the rows of :meth:`all_codes`."""

    @torch.no_grad()
    def find(self, latents: Tensor) -> Tensor:
        """Indices ``(n,)`` of the codes of rows ``(n, D)``: the nearest ones."""
        return nearest_codes(latents, self.all_codes())

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            found = self.find(self.latents_of(drop(z, mask)))
        return drop_indices(found.view(*z.shape[:-1], 1), mask)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        flat = indices.reshape(-1)
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.codes_of(flat.clamp(min=0)).masked_fill((flat < 0).unsqueeze(1), 0)
        return codes.view(*indices.shape[:-1], self.dim)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        with torch.autocast(indices.device.type, enabled=False):
            found, distances = table_neighbours(self.all_codes(), indices.reshape(-1), k)
        shape = indices.shape[:-1]
        return found.view(*shape, k, 1), distances.view(*shape, k)
