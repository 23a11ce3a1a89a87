"""One index for several codebooks (TokenFlow, arXiv:2412.03069).

The latent consists of parts, TokenFlow's of a semantic and a pixel part, each with a codebook of its own. All codebooks
have as many codes, and code k of one belongs to code k of the others: the index minimises the weighted sum of the
parts' squared distances, so codes are near in meaning and in appearance at once. The quantized latent is the parts'
codes one after another.

That is vector quantization of the concatenated parts, each scaled by the root of its weight for the search only. The
losses are means over all elements of the concatenation without the weights, as published.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .codebook import CodebookQuantizer
from .codebook_state import add_to_sample, assign_replacements, restart_candidates, sample_of_all_ranks
from .distributed import sum_over_ranks
from .entropy import codebook_entropy
from .neighbours import table_neighbours
from .search import nearest_codes, search_dtype
from .softmax import finite_rows


class SharedIndex(CodebookQuantizer):
    """Nearest-code quantizer with one index and one codebook per part of the channels; straight-through gradient.

    Losses are ``commitment``, ``codebook`` and, with ``entropy_temperature``, ``entropy`` (weights 0.25, 1, 0.05).

    Args:
        codebook_size: K, the number of codes of every codebook.
        dims: channels of each part, in the order of the latents. TokenFlow: ``(32, 8)``, semantic and pixel.
        distance_weights: weight of each part's squared distance; 1 for all if ``None``.
        l2_normalize: compare, return and train every part as a unit vector.
        restart_after: optimizer steps after which an unused code moves to a latent, in all parts; never if ``None``.
        entropy_temperature: of the softmax of the weighted squared distances in the entropy loss; no such loss if
            ``None``. TokenFlow: 0.01.
        batch_entropy_weight: weight of the batch entropy against the sample entropy in that loss.
        entropy_eps: added inside the logarithm of the batch entropy (TokenFlow: 1e-5).

    Shape:
        latents ``(B, *S, sum(dims))``, indices ``(B, *S, 1)``. Computes in float32 (float64 latents: float64).

    Raises:
        ValueError: for sizes, weights or temperatures out of range.
    """

    default_loss_weights = {"commitment": 0.25, "codebook": 1.0}

    def __init__(
        self,
        codebook_size: int,
        dims: Sequence[int],
        distance_weights: Sequence[float] | None = None,
        l2_normalize: bool = True,
        restart_after: int | None = None,
        entropy_temperature: float | None = None,
        batch_entropy_weight: float = 1.0,
        entropy_eps: float = 0.0,
    ) -> None:
        super().__init__()
        weights = (1.0,) * len(dims) if distance_weights is None else tuple(distance_weights)
        _check_parts(codebook_size, dims, weights)
        _check_entropy(entropy_temperature, batch_entropy_weight, entropy_eps)
        if restart_after is not None and restart_after < 1:
            raise ValueError(f"restart_after must be at least 1, or None; got {restart_after}")
        self.dims, self.distance_weights, self.l2_normalize = tuple(dims), weights, l2_normalize
        self.entropy_temperature, self.batch_entropy_weight = entropy_temperature, batch_entropy_weight
        self.entropy_eps = entropy_eps
        self.dim = sum(dims)
        self.codebook_sizes = (codebook_size,)
        if entropy_temperature is not None:
            self.default_loss_weights = {**self.default_loss_weights, "entropy": 0.05}
        tables = [torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size) for dim in dims]
        # Unit vectors at the length that is used: an optimizer step would turn a far shorter vector around.
        self.codebooks = nn.ParameterList(F.normalize(table, dim=1) if l2_normalize else table for table in tables)
        self.restart_after = restart_after
        if restart_after is not None:
            self.register_buffer("idle_steps", torch.zeros(codebook_size, dtype=torch.int64))
        self._counts: Tensor | None = None  # (K,) int64, tokens of each code since the last optimizer step
        self._sample: tuple[Tensor, Tensor] | None = None  # keys and (m, D) random latents

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents = self.latents_of(z)  # (n, D)
        keep = None if mask is None else mask.reshape(-1)
        found = self.find(latents)  # (n,)
        codes = self.codes_of(found)  # (n, D)
        finite = finite_rows(latents)
        learn = finite if keep is None else finite & keep  # (n,), tokens that the codebooks learn from
        losses, statistics = self._losses(latents, codes, keep, learn)
        indices = drop_indices(found.view(*z.shape[:-1], 1), mask)
        statistics |= count_codes(indices, self.codebook_sizes, finite)
        if self.restart_after is not None and self.training and torch.is_grad_enabled():
            self._gather(latents.detach(), found, learn, generator)
        quantized = drop(codes.detach().view(z.shape), mask)
        return Quantized(quantized, indices, losses, statistics, drop(latents.view(z.shape), mask))

    def latents_of(self, z: Tensor) -> Tensor:
        return self._used(token_rows(z).split(self.dims, 1))

    def all_codes(self) -> Tensor:
        return self._used(list(self.codebooks))

    def codes_of(self, flat: Tensor) -> Tensor:
        return self._used([F.embedding(flat, codebook) for codebook in self.codebooks])

    @torch.no_grad()
    def find(self, latents: Tensor) -> Tensor:
        return nearest_codes(self._weighted(latents), self._weighted(self.all_codes()))

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As for every quantizer, by the weighted distance."""
        self.check_indices(indices)
        with torch.autocast(indices.device.type, enabled=False):
            found, distances = table_neighbours(self._weighted(self.all_codes()), indices.reshape(-1), k)
        shape = indices.shape[:-1]
        return found.view(*shape, k, 1), distances.view(*shape, k)

    def _used(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts ``(n, D_i)`` -> ``(n, D)`` as they are compared, but for the weights."""
        parts = [part.to(search_dtype(part)) for part in parts]
        return torch.cat([F.normalize(part, dim=1) for part in parts] if self.l2_normalize else parts, 1)

    def _weighted(self, rows: Tensor) -> Tensor:
        """Rows ``(n, D)`` whose plain squared distances are the weighted ones."""
        parts = zip(rows.split(self.dims, 1), self.distance_weights, strict=True)
        return torch.cat([part * weight**0.5 for part, weight in parts], 1)

    def _losses(
        self, latents: Tensor, codes: Tensor, keep: Tensor | None, learn: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        targets = latents.detach().masked_fill(~learn.unsqueeze(1), 0)
        losses = {
            "commitment": mean_over_kept((latents - codes.detach()).square(), keep),
            "codebook": mean_over_kept((targets - codes).square(), learn),
        }
        if self.entropy_temperature is None:
            return losses, {}
        table = self._weighted(self.all_codes().to(latents.dtype))
        sample, batch = codebook_entropy(
            2 * self._weighted(latents),  # 2 z.e - |e|^2 is the negative distance up to |z|^2, the same for all codes
            table,
            -table.square().sum(1),
            self.entropy_temperature,
            keep,
            reduce=self.training,
            eps=self.entropy_eps,
        )
        losses["entropy"] = sample - self.batch_entropy_weight * batch
        return losses, {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}

    # ---- restart of dead codes

    @property
    def _restart_candidates(self) -> int:
        return restart_candidates(self.codebook_sizes[0])

    @torch.no_grad()
    def _gather(self, latents: Tensor, found: Tensor, learn: Tensor, generator: torch.Generator | None) -> None:
        """Note which codes were used, and some random latents that unused ones may move to."""
        counts = torch.zeros(self.codebook_sizes[0], dtype=torch.int64, device=found.device)
        counts.scatter_add_(0, found, learn.to(torch.int64))
        self._counts = counts if self._counts is None else self._counts + counts
        self._sample = add_to_sample(self._sample, latents, learn, self._restart_candidates, generator)

    @torch.no_grad()
    def commit_update(self) -> None:
        if self._counts is None:
            return
        counts, sample = sum_over_ranks(self._counts), self._sample
        self._counts = self._sample = None
        keys, rows = sample_of_all_ranks(sample, self._restart_candidates)
        # A step without a single token is no step in which a code could have been used.
        idle = torch.where(counts > 0, 0, self.idle_steps + (counts.sum() > 0))
        moves, latents = assign_replacements(idle >= self.restart_after, keys, rows)
        self.idle_steps.copy_(torch.where(moves, 0, idle))
        for codebook, part in zip(self.codebooks, latents.split(self.dims, 1), strict=True):
            codebook.copy_(torch.where(moves.unsqueeze(1), part.to(codebook.dtype), codebook))


def _check_parts(codebook_size: int, dims: Sequence[int], weights: Sequence[float]) -> None:
    if codebook_size < 1 or not dims or min(dims) < 1:
        raise ValueError(f"codebook_size and dims must be positive; got {codebook_size} and {list(dims)}")
    if len(weights) != len(dims) or min(weights) < 0 or max(weights) <= 0:
        raise ValueError(
            f"distance_weights must be one number per part ({len(dims)}), none negative and not all zero; "
            f"got {list(weights)}"
        )


def _check_entropy(temperature: float | None, batch_weight: float, eps: float) -> None:
    if temperature is not None and temperature <= 0:
        raise ValueError(f"entropy_temperature must be positive, or None for no entropy loss; got {temperature}")
    if batch_weight < 0 or eps < 0:
        raise ValueError(f"batch_entropy_weight and entropy_eps must not be negative; got {batch_weight} and {eps}")
