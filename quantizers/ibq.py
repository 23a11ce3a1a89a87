"""Index backpropagation quantization (IBQ, arXiv:2412.02692).

The code of a latent is the one with the largest inner product. The gradient passes through the softmax of all inner
products, to the latents and to every code, so a codebook of 2^18 codes of dimension 256 learns as a whole and stays in
use. There is no straight-through identity: what follows the quantizer reaches the encoder through the softmax alone.

Losses as published, under our names: ``quantization`` compares latents and codes with the gradient of both and of the
softmax, ``commitment`` pulls the latents to the codes, ``codebook`` the codes to the latents. Published code puts beta
= 0.25 on ``codebook``, and adds 1e-5 to the mean probabilities in the entropy (``entropy_eps``).

Probabilities never exist as an N x K tensor (see ``softmax.py`` and ``entropy.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .codebook import CodebookQuantizer
from .entropy import codebook_entropy
from .estimators import straight_through
from .search import search_dtype
from .softmax import finite_rows, likeliest_codes, softmax_codes


@dataclass
class SoftlyQuantized(Quantized):
    """What a quantizer returns whose gradient belongs to the assignment and not to latents and codes alone.

    Attributes:
        estimated: ``(B, *S, D)``, equal to ``quantized``, with the gradient through the probabilities.
    """

    estimated: Tensor | None = None


class IndexBackpropQuantizer(CodebookQuantizer):
    """Largest inner product, with the gradient of the softmax over all codes.

    Args:
        codebook_size: K, the number of codes.
        dim: D, the size of a code.
        l2_normalize: compare, return and train unit vectors. (The original's option of that name normalises for the
            search only.)
        temperature: of the softmax that carries the gradient.
        entropy_temperature: of the softmax whose entropies are the ``entropy`` loss; ``None`` for no such loss.
        sample_entropy_weight: share of the mean entropy of a token in the ``entropy`` loss.
        batch_entropy_weight: share of the entropy of the mean probabilities, which is subtracted.
        entropy_eps: added to the mean probabilities inside the logarithm; 0 is exact.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, 1)``.

    Raises:
        ValueError: for sizes or temperatures that are not positive.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        l2_normalize: bool = False,
        temperature: float = 1.0,
        entropy_temperature: float | None = 0.01,
        sample_entropy_weight: float = 1.0,
        batch_entropy_weight: float = 1.0,
        entropy_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive; got {codebook_size} and {dim}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        if entropy_temperature is not None and not entropy_temperature > 0:
            raise ValueError(f"entropy_temperature must be positive, or None; got {entropy_temperature}")
        if not entropy_eps >= 0:
            raise ValueError(f"entropy_eps must be at least 0; got {entropy_eps}")
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.l2_normalize = l2_normalize
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature
        self.sample_entropy_weight = sample_entropy_weight
        self.batch_entropy_weight = batch_entropy_weight
        self.entropy_eps = entropy_eps
        self.default_loss_weights = {"quantization": 1.0, "commitment": 1.0, "codebook": 0.25}
        if entropy_temperature is not None:
            self.default_loss_weights["entropy"] = 0.05
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))

    def assign(
        self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> SoftlyQuantized:
        latents = self.latents_of(z)  # (n, D)
        table = self.all_codes().to(latents.dtype)  # (K, D)
        keep = None if mask is None else mask.reshape(-1)
        finite = finite_rows(latents)
        found = likeliest_codes(latents, table)  # (n,)
        codes = self.codes_of(found)  # (n, D)
        codes = torch.where(finite.unsqueeze(1), codes, codes.detach())
        estimated = straight_through(softmax_codes(latents, table, None, found, self.temperature), codes.detach())
        losses = {
            "quantization": mean_over_kept((estimated - latents).square(), keep),
            "commitment": mean_over_kept((codes.detach() - latents).square(), keep),
            "codebook": mean_over_kept((codes - latents.detach()).square(), finite if keep is None else finite & keep),
        }
        indices = drop_indices(found.view(*z.shape[:-1], 1), mask)
        statistics = count_codes(indices, self.codebook_sizes, finite)
        if self.entropy_temperature is not None:
            entropies = self._entropies(latents, table, keep)
            losses["entropy"] = (
                self.sample_entropy_weight * entropies["sample_entropy"]
                - self.batch_entropy_weight * entropies["batch_entropy"]
            )
            statistics |= {name: value.detach() for name, value in entropies.items()}
        quantized, latents, estimated = (drop(rows.view(z.shape), mask) for rows in (codes, latents, estimated))
        return SoftlyQuantized(quantized, indices, losses, statistics, latents, estimated=estimated)

    def estimate(self, assigned: SoftlyQuantized) -> Tensor:
        return assigned.estimated

    def latents_of(self, z: Tensor) -> Tensor:
        return F.normalize(token_rows(z), dim=1) if self.l2_normalize else token_rows(z)

    def all_codes(self) -> Tensor:
        codebook = self.codebook.to(search_dtype(self.codebook))
        return F.normalize(codebook, dim=1) if self.l2_normalize else codebook

    def codes_of(self, flat: Tensor) -> Tensor:
        codes = F.embedding(flat, self.codebook).to(search_dtype(self.codebook))
        return F.normalize(codes, dim=1) if self.l2_normalize else codes

    @torch.no_grad()
    def find(self, latents: Tensor) -> Tensor:
        """Indices ``(n,)`` of the codes with the largest inner product with rows ``(n, D)``."""
        return likeliest_codes(latents, self.all_codes().to(latents.dtype))

    def _entropies(self, latents: Tensor, table: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        sample, batch = codebook_entropy(
            latents, table, None, self.entropy_temperature, keep, reduce=self.training, eps=self.entropy_eps
        )
        return {"sample_entropy": sample, "batch_entropy": batch}
