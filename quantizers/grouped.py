"""The same quantizer on groups of the channels: several small codes per token instead of one large one.

UniTok (arXiv:2502.20321) cuts 64 channels into eight groups with a codebook of 4096 codes each:
``Grouped(VectorQuantizer(4096, 8, l2_normalize=True), 8)``. WeTok (arXiv:2508.05599) cuts a lookup-free code into
groups, ``Grouped(LookupFreeQuantizer(8), 4, shared=True)``, so that the entropy of 2^8 codes stays tractable. K codes
in each of G groups express K^G vectors at the cost of searching G times K.

With ``shared`` one quantizer sees the groups as further tokens. WeTok's entropy works like that: the probabilities are
averaged over tokens *and* groups, so a group may neglect codes that another group uses. Independent groups have an
entropy each, and the loss is their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.configurable import build
from .base import IndexBlock, Quantized, Quantizer, count_codes, drop
from .product import joint_blocks, joint_neighbours, joint_statistics, mean_losses


class Grouped(Quantizer):
    """A quantizer on each of several equal groups of the channels.

    Losses and scalar statistics are means over the groups, their weights those of the quantizer.

    Args:
        quantizer: quantizes one group. It becomes group 0; the others are built anew from its configuration, each with
            an initialisation of its own.
        groups: number of groups.
        shared: one quantizer for all groups, which it sees as further tokens. It must treat every token by itself.

    Shape:
        latents ``(B, *S, groups * D)``, group after group; indices ``(B, *S, groups * G)`` in the same order.
    """

    def __init__(self, quantizer: Quantizer, groups: int, shared: bool = False) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be at least 1; got {groups}")
        self.groups = groups
        self.shared = shared
        copies = 0 if shared else groups - 1
        self.quantizers = nn.ModuleList([quantizer, *(build(quantizer.config) for _ in range(copies))])
        self.dim = groups * quantizer.dim
        self.codebook_sizes = groups * tuple(quantizer.codebook_sizes)
        self.default_loss_weights = dict(quantizer.default_loss_weights)

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        if self.shared:
            return self._assign_shared(z, mask, generator)
        parts = [
            quantizer.assign(own, mask, generator=generator)
            for quantizer, own in zip(self.quantizers, self._tokens(z).unbind(-2), strict=True)
        ]
        return Quantized(
            torch.cat([part.quantized for part in parts], -1),
            torch.cat([part.indices for part in parts], -1),
            mean_losses([part.losses for part in parts]),
            joint_statistics(parts, self.codebook_sizes),
            torch.cat([part.latents for part in parts], -1),
            tuple(parts),
        )

    def estimate(self, assigned: Quantized) -> Tensor:
        parts = zip(self.quantizers, assigned.parts, strict=True)
        codes = [quantizer.estimate(part) for quantizer, part in parts]
        return codes[0].flatten(-2) if self.shared else torch.cat(codes, -1)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        tokens = self._tokens(drop(z, mask))  # (B, *S, groups, D)
        if self.shared:
            return self.quantizers[0].encode(tokens, self._token_mask(mask)).flatten(-2)
        groups = zip(self.quantizers, tokens.unbind(-2), strict=True)
        return torch.cat([quantizer.encode(own, mask) for quantizer, own in groups], -1)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        tokens = self._tokens(indices)  # (B, *S, groups, G)
        if self.shared:
            return self.quantizers[0].decode(tokens).flatten(-2)
        groups = zip(self.quantizers, tokens.unbind(-2), strict=True)
        return torch.cat([quantizer.decode(own) for quantizer, own in groups], -1)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        return joint_neighbours(self._members(), indices, k)

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        return joint_blocks(self._members(), shape)

    def _assign_shared(self, z: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        tokens = self._tokens(z)  # (B, *S, groups, D)
        part = self.quantizers[0].assign(tokens, self._token_mask(mask), generator=generator)
        statistics = dict(part.statistics)
        if statistics.pop("counts", None) is not None:  # of all groups together; a token has sub-codes of each
            countable = part.indices.masked_fill(~tokens.isfinite().all(-1, keepdim=True), -1)
            statistics.update(count_codes(countable.flatten(-2), self.codebook_sizes))
        return Quantized(
            part.quantized.flatten(-2),
            part.indices.flatten(-2),
            dict(part.losses),
            statistics,
            part.latents.flatten(-2),
            (part,),
        )

    def _members(self) -> list[Quantizer]:
        """The quantizer of every group."""
        return list(self.quantizers) * (self.groups if self.shared else 1)

    def _tokens(self, values: Tensor) -> Tensor:
        """``(B, *S, groups * C)`` -> ``(B, *S, groups, C)``."""
        return values.unflatten(-1, (self.groups, -1))

    def _token_mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.unsqueeze(-1).expand(*mask.shape, self.groups)
