"""Vector quantization with a gradient-trained codebook (VQ-VAE, arXiv:1711.00937).

Each latent becomes its nearest code. The codebook learns from a codebook loss, the encoder from a commitment loss and,
straight through the code, from everything behind the quantizer. With ``l2_normalize`` latents and codes live on the
unit sphere, as in ViT-VQGAN (arXiv:2110.04627) and LlamaGen (arXiv:2406.06525); together with a low dimension that
keeps far more codes alive. The parameter is stored un-normalised, as the published checkpoints are.

Both losses are means over all elements (tokens and dimensions) of the kept positions. Where published code weights the
codebook loss by beta instead of the commitment loss (taming-transformers' default), that is a choice of loss weights.

A small encoder that starts from nothing tends to use a handful of codes. ``restart_after`` moves every code that no
rank has used for that many optimizer steps onto a latent of the present batch (random restart, as in Jukebox,
arXiv:2005.00341). It needs no statistic that depends on the batch size, and a moved code gets as many steps to be
used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, Quantizer, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .distributed import gather_rows, sum_over_ranks
from .neighbours import table_neighbours
from .search import nearest_codes

RESTART_CANDIDATES = 256  # latents per rank and step that a dead code may move to


class VectorQuantizer(Quantizer):
    """Nearest-code quantizer with straight-through gradient.

    Args:
        codebook_size: K, the number of codes.
        dim: D, the size of a code.
        l2_normalize: compare, return and train unit vectors.
        restart_after: optimizer steps after which an unused code moves to a latent; never if ``None``.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, 1)``. Computes in float32 (float64 latents: float64) and returns codes
        in that dtype, also under autocast.
    """

    default_loss_weights = {"commitment": 0.25, "codebook": 1.0}

    def __init__(
        self, codebook_size: int, dim: int, l2_normalize: bool = False, restart_after: int | None = None
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive; got {codebook_size} and {dim}")
        if restart_after is not None and restart_after < 1:
            raise ValueError(f"restart_after must be at least 1, or None; got {restart_after}")
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.l2_normalize = l2_normalize
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim))
        nn.init.uniform_(self.codebook, -1 / codebook_size, 1 / codebook_size)
        if l2_normalize:
            # At the length that is used: an optimizer step would turn a far shorter vector around.
            with torch.no_grad():
                self.codebook.copy_(F.normalize(self.codebook, dim=1))
        self.restart_after = restart_after
        if restart_after is not None:
            self.register_buffer("idle_steps", torch.zeros(codebook_size, dtype=torch.int64))
        self._used: Tensor | None = None  # (K,) int64, codes used since the last optimizer step
        self._candidates: tuple[Tensor, Tensor] | None = None  # (M, D) latents, (M,) whether each may be taken

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents = self._latents(z)  # (n, D)
        keep = None if mask is None else mask.reshape(-1)
        found = nearest_codes(latents, self._all_codes())  # (n,)
        codes = self._codes(found)  # (n, D)
        losses = {
            "commitment": mean_over_kept((latents - codes.detach()).square(), keep),
            "codebook": mean_over_kept((latents.detach() - codes).square(), keep),
        }
        indices = drop_indices(found.view(*z.shape[:-1], 1), mask)
        statistics = count_codes(indices, self.codebook_sizes)
        if self.restart_after is not None and self.training and torch.is_grad_enabled():
            self._gather(latents.detach(), keep, statistics["counts"])
        quantized = drop(codes.detach().view(z.shape), mask)
        return Quantized(quantized, indices, losses, statistics, drop(latents.view(z.shape), mask))

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        found = nearest_codes(self._latents(drop(z, mask)), self._all_codes())
        return drop_indices(found.view(*z.shape[:-1], 1), mask)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        flat = indices.reshape(-1)
        codes = self._codes(flat.clamp(min=0)).masked_fill((flat < 0).unsqueeze(1), 0)
        return codes.view(*indices.shape[:-1], self.dim)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        found, distances = table_neighbours(self._all_codes(), indices.reshape(-1), k)
        shape = indices.shape[:-1]
        return found.view(*shape, k, 1), distances.view(*shape, k)

    def _gather(self, latents: Tensor, keep: Tensor | None, counts: Tensor) -> None:
        """Note which codes were used, and some random latents that unused ones may move to."""
        self._used = counts if self._used is None else self._used + counts
        order = torch.rand(len(latents), device=latents.device)
        if keep is not None:
            order = order.masked_fill(~keep, -1)
        score, chosen = order.topk(min(RESTART_CANDIDATES, len(latents)))
        padding = RESTART_CANDIDATES - len(chosen)  # as many rows on every rank, whatever its batch holds
        self._candidates = F.pad(latents[chosen], (0, 0, 0, padding)), F.pad(score >= 0, (0, padding))

    @torch.no_grad()
    def commit_update(self) -> None:
        if self._used is None:
            return
        used, (latents, valid) = self._used, self._candidates
        self._used = self._candidates = None
        used, latents, valid = sum_over_ranks(used), gather_rows(latents), gather_rows(valid)
        # Everything below stays on the device: no code path depends on how many codes are dead.
        idle = torch.where(used > 0, 0, self.idle_steps + 1)
        dead = (idle >= self.restart_after) & valid.any()
        latents = latents[valid.to(torch.int64).argsort(descending=True, stable=True)]
        candidate = (dead.cumsum(0) - 1) % valid.sum().clamp(min=1)  # a different one each, as long as there are any
        self.codebook.copy_(torch.where(dead.unsqueeze(1), latents[candidate].to(self.codebook.dtype), self.codebook))
        self.idle_steps.copy_(torch.where(dead, 0, idle))

    def _latents(self, z: Tensor) -> Tensor:
        """``(B, *S, D)`` -> ``(n, D)`` in the search's dtype."""
        return F.normalize(token_rows(z), dim=1) if self.l2_normalize else token_rows(z)

    def _codes(self, flat: Tensor) -> Tensor:
        """Codes ``(n, D)`` of valid indices ``(n,)``."""
        codes = F.embedding(flat, self.codebook)
        return F.normalize(codes, dim=1) if self.l2_normalize else codes

    def _all_codes(self) -> Tensor:
        codebook = self.codebook.detach()
        return F.normalize(codebook, dim=1) if self.l2_normalize else codebook
