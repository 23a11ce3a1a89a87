"""Residual quantization: every level quantizes what the levels before it left over (RQ-VAE, arXiv:2203.01941).

``r_0 = z``, ``code_i = quantizer_i(r_i)``, ``r_(i+1) = r_i - sg(code_i)``; the output is the sum of the codes. The
levels only assign; one estimator acts on the sum. Where every level has a straight-through estimator of its own, as in
vector-quantize-pytorch, the gradient reaches ``z`` once per level: depth times too large. The residuals keep their
gradient to ``z``, so the commitment loss of every level trains the encoder.

The levels are copies of one quantizer, one shared quantizer (a single codebook, as in RQ-VAE), or different ones: the
semantic ids of TIGER (arXiv:2305.05065) may have another codebook size per level, and residual FSQ needs a finer grid
per level (``FiniteScalarQuantizer(levels, scale=...)``).

Quantizer dropout (SoundStream, arXiv:2107.03312) leaves out the last levels of some samples in training, so that a
prefix of the levels decodes as well. Every level runs in every step, on masked tokens if need be: plain data-parallel
training sees all parameters used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.configurable import build
from .base import IndexBlock, Quantized, Quantizer, drop
from .distributed import from_first_rank
from .draws import draw_integers, draw_uniform
from .estimators import rotation, straight_through
from .neighbours import product_neighbours
from .product import joint_blocks, joint_losses, joint_statistics, joint_weights
from .search import search_dtype

ESTIMATORS = ("straight_through", "rotation", "none")


class Residual(Quantizer):
    """A stack of quantizers, each for the residual of those before it.

    A loss is the mean over the levels of that level's loss, which is a mean over the positions that the level keeps; a
    level that keeps none counts as 0. Losses of one name whose published weights differ between the levels stay apart
    as ``level_0_<name>``, ``level_1_<name>`` ...

    Args:
        quantizer: one quantizer for all levels, or a list with one for each.
        depth: number of levels; with a list it may be left out. RQ-VAE: 4.
        shared: all levels are the one quantizer itself, state and all. Otherwise it becomes level 0, and the others are
            built anew from its configuration, each with an initialisation of its own.
        dropout: share of the training samples that keep only their first levels.
        dropout_min_depth: the least number of levels that such a sample keeps; their number is uniform from here to
            ``depth``.
        dropout_per_sample: draw per sample. Otherwise one draw decides for the whole batch, on all ranks alike.
        estimator: how the gradient passes from the sum of the codes to ``z``: ``straight_through``, ``rotation`` or
            ``none``. The levels' own estimators are not used, so a projection into a level would learn from that
            level's losses alone: project around the stack instead, ``Factorized(Residual(...), dim)``.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, sum of the levels' G)``. ``decode`` also takes the columns of the
        first levels alone; missing and ``-1`` columns add nothing to the sum.

    Raises:
        ValueError: for levels that do not fit together, and numbers out of range.
    """

    def __init__(
        self,
        quantizer: Quantizer | Sequence[Quantizer],
        depth: int | None = None,
        shared: bool = False,
        dropout: float = 0.0,
        dropout_min_depth: int = 1,
        dropout_per_sample: bool = True,
        estimator: str = "straight_through",
    ) -> None:
        super().__init__()
        levels = _levels(quantizer, depth, shared)
        self.depth = len(levels)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie between 0 and 1; got {dropout}")
        if not 1 <= dropout_min_depth <= self.depth:
            raise ValueError(f"dropout_min_depth must lie between 1 and depth, {self.depth}; got {dropout_min_depth}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}; got {estimator!r}")
        self.shared = shared
        self.dropout = dropout
        self.dropout_min_depth = dropout_min_depth
        self.dropout_per_sample = dropout_per_sample
        self.estimator = estimator
        self.dim = levels[0].dim
        self.codebook_sizes = tuple(size for level in levels for size in level.codebook_sizes)
        self._loss_names, self.default_loss_weights = joint_weights(levels, "level")
        self.quantizers = nn.ModuleList(levels[:1] if shared else levels)

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents = rest = z.to(search_dtype(z))
        kept = self._kept_levels(len(z), z.device, generator)
        total, parts = None, []
        for number, level in enumerate(self._all_levels()):
            own = None if kept is None else kept > number
            own = keep_samples(mask, own, z.shape[:-1])
            part = level.assign(drop(rest, own), own, generator=generator)
            total = part.quantized if total is None else total + part.quantized
            rest = rest - part.quantized.detach()
            parts.append(part)
        losses = joint_losses(parts, self._loss_names)
        indices = torch.cat([part.indices for part in parts], -1)
        return Quantized(total, indices, losses, joint_statistics(parts, self.codebook_sizes), latents)

    def estimate(self, assigned: Quantized) -> Tensor:
        return apply_estimator(self.estimator, assigned.latents, assigned.quantized)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        rest, indices = drop(z, mask).to(search_dtype(z)), []
        with torch.autocast(z.device.type, enabled=False):
            for level in self._all_levels():
                indices.append(level.encode(rest, mask))
                rest = rest - level.decode(indices[-1])
        return torch.cat(indices, -1)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        total = None
        with torch.autocast(indices.device.type, enabled=False):
            for level, own in self._split(indices):
                codes = level.decode(own)
                total = codes if total is None else total + codes
        return total

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Quantizer.neighbour_distances`; the levels are the factors of the product space.

        A token whose last levels are dropped keeps them dropped. If its other levels have fewer than ``k``
        combinations, the rest of its neighbours are ``-1``, infinitely far away.
        """
        self.check_indices(indices)
        parts = []
        for level, own in self._split(indices):
            m = min(k, math.prod(level.codebook_sizes))
            found, distances = level.neighbour_distances(own, m)
            found, distances = found.reshape(-1, m, level.num_subcodes), distances.reshape(-1, m)
            # A dropped level has one way to be dropped, not m.
            copies = (found < 0).all(2) & (torch.arange(m, device=indices.device) > 0)
            parts.append((found, distances.masked_fill(copies, torch.inf)))
        found, distances = product_neighbours(parts, k)  # (n, k, G), (n, k)
        missing = distances.isinf()
        found = found.masked_fill(missing.unsqueeze(2), -1)
        dropped = (indices < 0).all(-1).reshape(-1, 1)
        distances = distances.masked_fill(missing & dropped, 0)
        shape = indices.shape[:-1]
        return found.view(*shape, k, -1), distances.view(*shape, k)

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        return joint_blocks(self._all_levels(), shape)

    def check_indices(self, indices: Tensor) -> None:
        """Raise if ``indices`` is not int64 ``(B, *S, G)`` with the sub-codes of the first levels or of all."""
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64; got {indices.dtype}")
        if indices.ndim < 2 or indices.shape[-1] not in self._prefixes():
            raise ValueError(
                f"indices must have shape (B, *S, G) with G one of {self._prefixes()}, the sub-codes of the first "
                f"levels or of all; got {tuple(indices.shape)}"
            )

    def _all_levels(self) -> list[Quantizer]:
        """The quantizer of every level."""
        return list(self.quantizers) * (self.depth if self.shared else 1)

    def _prefixes(self) -> list[int]:
        """Number of sub-codes of the first level, of the first two, and so on."""
        sizes = [level.num_subcodes for level in self._all_levels()]
        return [sum(sizes[: number + 1]) for number in range(self.depth)]

    def _split(self, indices: Tensor) -> list[tuple[Quantizer, Tensor]]:
        """The levels whose columns are there, each with its columns ``(B, *S, G_i)``."""
        present = self._all_levels()[: self._prefixes().index(indices.shape[-1]) + 1]
        columns = indices.split([level.num_subcodes for level in present], -1)
        return [(level, own.contiguous()) for level, own in zip(present, columns, strict=True)]

    def _kept_levels(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor | None:
        """How many levels each sample keeps, ``(B,)``; ``None`` if all keep all."""
        if not self.training or not self.dropout:
            return None
        draws = (batch if self.dropout_per_sample else 1,)
        shorter = draw_uniform(draws, device, generator) < self.dropout
        choices = self.depth - self.dropout_min_depth + 1
        kept = self.dropout_min_depth + draw_integers(choices, draws, device, generator)
        kept = torch.where(shorter, kept, self.depth)
        if not self.dropout_per_sample and torch.is_grad_enabled():
            kept = from_first_rank(kept)
        return kept.expand(batch)


def apply_estimator(name: str, latents: Tensor, codes: Tensor) -> Tensor:
    """Codes ``(..., D)`` with the gradient to the latents that one of :data:`ESTIMATORS` gives."""
    if name == "none":
        return codes
    return {"straight_through": straight_through, "rotation": rotation}[name](latents, codes)


def keep_samples(mask: Tensor | None, keep: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask ``(B, *S)``, ``False`` also throughout the samples where ``keep`` ``(B,)`` is."""
    if keep is None:
        return mask
    keep = keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return keep if mask is None else keep & mask


def _levels(quantizer: Quantizer | Sequence[Quantizer], depth: int | None, shared: bool) -> list[Quantizer]:
    """The quantizer of every level; the same one again and again if it is shared."""
    if isinstance(quantizer, Quantizer):
        if depth is None or depth < 1:
            raise ValueError(f"depth must be at least 1 for one quantizer; got {depth}")
        if shared:
            return [quantizer] * depth
        return [quantizer, *(build(quantizer.config) for _ in range(depth - 1))]
    levels = list(quantizer)
    if shared:
        raise ValueError("shared=True needs one quantizer for all levels; got a list of them")
    if not levels or depth not in (None, len(levels)):
        raise ValueError(f"a list of quantizers has one for each level; got {len(levels)} for depth {depth}")
    if len({id(level) for level in levels}) < len(levels):
        raise ValueError("a quantizer occurs twice in the list; shared=True takes one for all levels")
    dims = [level.dim for level in levels]
    if len(set(dims)) > 1:
        raise ValueError(f"all levels quantize residuals of one size; got dim {dims}")
    return levels
