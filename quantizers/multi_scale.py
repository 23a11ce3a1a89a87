"""Multi-scale residual quantization: a pyramid of token maps, coarse to fine (VAR, arXiv:2404.02905).

A scale averages the residual over its cells, quantizes these tokens, enlarges the codes to the full grid, blends them
with a convolution of themselves (``Phi``) and takes the result from the residual; the sum over the scales is the
output. One quantizer serves all scales. The conventions are those of VAR and of ImageFolder (arXiv:2410.01756):

- ``losses="running"``: after each scale, the sum so far is compared with the whole latents. ``commitment`` trains the
  encoder; ``codebook`` trains the codes and Phi, and nothing else does: the gradient of what follows the quantizer goes
  to the latents only, as an identity. Both are means over the scales of means over the samples that keep a scale. VAR
  weights them 0.25 and 1. ImageFolder's vector quantizer forgets to divide the commitment loss by the number of scales:
  to train as it does, give that loss the weight 0.25 times the number of scales.
- ImageFolder searches by the angle alone, although the codes that it adds are not of unit length:
  :class:`DirectionVectorQuantizer`. In training a tenth of its samples keep only their first scales, 3 or more.

TokenFlow (arXiv:2412.03069) is ``losses="scales"``, ``estimator="per_scale"``, ``phi_ratio=0``: losses are those of the
quantizer at each scale, and the codes of a scale pass the gradient on to the (normalised) cells that they stand for. It
leaves out one scale other than the first in a tenth of its batches; ``skip=0.1`` draws for each sample.

ImageFolder's binary variant is ``l2_normalize=True`` with a list of lookup-free quantizers whose ``scale`` shrinks by
0.9 from one to the next. Its entropy loss looks at the residual in full resolution, of one sample only by an indexing
mistake; here it looks at the tokens that are quantized, of every kept sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import IndexBlock, Quantized, Quantizer, drop, mean_over_kept
from .draws import draw_integers, draw_uniform
from .estimators import straight_through
from .factorized import Factorized
from .product import mean_losses
from .residual import ESTIMATORS, apply_estimator, keep_samples
from .search import nearest_codes, search_dtype
from .vq import VectorQuantizer

ENLARGE = {1: "linear", 2: "bicubic"}  # by number of token axes
RUNNING = {"commitment": 0.25, "codebook": 1.0}


class MultiScaleResidual(Quantizer):
    """A pyramid of token maps from one quantizer.

    With a mask, a token is the mean over the kept positions of its cell, and dropped if there is none. A sample with a
    latent that is not finite trains no code at any scale, since the cells of the coarse scales spread it.

    Args:
        quantizer: the quantizer of every token; or a list of one for each scale, with equal codebook sizes.
        scales: size of each map, coarse to fine: a side, or one number per axis. The last is the grid of the latents.
        axes: number of token axes: 2 for a grid (codes are enlarged bicubically), 1 for a sequence (linearly).
        phi_sharing: number of Phi convolutions, spread evenly over the scales; one per scale if ``None``, and no more
            than there are scales.
        phi_ratio: r in ``Phi(h) = (1 - r) h + r conv(h)``; 0 for no Phi.
        losses: ``running`` (the sum so far against the latents, and those of the quantizer's losses that are neither
            ``commitment`` nor ``codebook``) or ``scales`` (all losses of the quantizer); means over the scales.
        estimator: ``straight_through``, ``rotation`` or ``none``, from the sum of the codes to the latents; or
            ``per_scale``, straight through from the codes of each scale to what the quantizer compared with them.
        l2_normalize: quantize unit latents (their residuals are not normalised again).
        dropout: share of the training samples that keep only their first scales.
        dropout_start: the least number of scales that such a sample keeps; their number is uniform from here to all.
        dropout_leading: these are the first ``int(B * dropout)`` samples of the batch, as in ImageFolder; otherwise
            each sample is one with probability ``dropout``.
        skip: share of the training samples that leave out one scale other than the first.

    Shape:
        latents ``(B, *S, D)`` with S the last of ``scales``, indices ``(B, M, G)``: the tokens of all scales in raster
        order, coarse to fine; :meth:`index_blocks` names them ``scale_0``, ``scale_1`` ... ``decode`` also takes the
        rows of the first scales alone; a scale that is missing, or ``-1`` throughout a sample, adds nothing.

    Raises:
        ValueError: for options that do not fit together and latents on another grid.
    """

    def __init__(
        self,
        quantizer: Quantizer | Sequence[Quantizer],
        scales: Sequence[int | Sequence[int]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        axes: int = 2,
        phi_sharing: int | None = 4,
        phi_ratio: float = 0.5,
        losses: str = "running",
        estimator: str = "straight_through",
        l2_normalize: bool = False,
        dropout: float = 0.0,
        dropout_start: int = 1,
        dropout_leading: bool = False,
        skip: float = 0.0,
    ) -> None:
        super().__init__()
        self.scales = _shapes(scales, axes)
        _check_options(losses, estimator, phi_ratio)
        for name, share in (("dropout", dropout), ("skip", skip)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {share}")
        if not 1 <= dropout_start <= len(self.scales):
            raise ValueError(f"dropout_start must lie between 1 and {len(self.scales)} scales; got {dropout_start}")
        quantizers = [quantizer] if isinstance(quantizer, Quantizer) else list(quantizer)
        _check_quantizers(quantizers, len(self.scales), losses)
        self.quantizers = nn.ModuleList(quantizers)
        self.dim = quantizers[0].dim
        self.codebook_sizes = quantizers[0].codebook_sizes
        self.losses = losses
        self.estimator = estimator
        self.l2_normalize = l2_normalize
        self.dropout = dropout
        self.dropout_start = dropout_start
        self.dropout_leading = dropout_leading
        self.skip = skip
        self.default_loss_weights = {**quantizers[0].default_loss_weights, **(RUNNING if losses == "running" else {})}
        self.phi = None
        if phi_ratio:
            self._phi_of_scale = _phi_of_scale(phi_sharing, len(self.scales))
            self.phi = nn.ModuleList(Phi(self.dim, phi_ratio, axes) for _ in set(self._phi_of_scale))

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        self._check_grid(z)
        latents = self._normalized(z)  # (B, *S, D)
        rest, finite = _poisoned(latents)
        kept = self._kept_scales(len(z), z.device, generator)  # (scales, B)
        total, stands_for, parts, running = None, None, [], []
        for scale, quantizer in enumerate(self._all_quantizers()):
            own = keep_samples(mask, None if kept is None else kept[scale], z.shape[:-1])
            tokens, token_mask = self._tokens(rest, own, scale)
            part = quantizer.assign(tokens, token_mask, generator=generator)
            codes = self._enlarge(self._trainable_codes(quantizer, part), part.indices, scale)  # (B, *S, D)
            total = codes if total is None else total + codes
            rest = drop(rest - codes.detach(), mask)
            parts.append(part)
            if self.losses == "running":
                running.append(_running_losses(latents, total, own, finite))
            if self.estimator == "per_scale":
                cells = self._enlarge(part.latents, part.indices, scale)
                stands_for = cells if stands_for is None else stands_for + cells
        losses = mean_losses([part.losses for part in parts]) | mean_losses(running)
        indices = torch.cat([part.indices.flatten(1, -2) for part in parts], 1)  # (B, M, G)
        quantized = drop(total.detach() if self.losses == "running" else total, mask)
        latents = drop(latents if stands_for is None else stands_for, mask)
        return Quantized(quantized, indices, losses, _statistics(parts), latents)

    def estimate(self, assigned: Quantized) -> Tensor:
        name = "straight_through" if self.estimator == "per_scale" else self.estimator
        return apply_estimator(name, assigned.latents, assigned.quantized)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        indices = []
        with torch.autocast(z.device.type, enabled=False):
            rest, _ = _poisoned(self._normalized(drop(z, mask)))
            for scale, quantizer in enumerate(self._all_quantizers()):
                tokens, token_mask = self._tokens(rest, mask, scale)
                indices.append(quantizer.encode(tokens, token_mask))
                rest = drop(rest - self._enlarge(quantizer.decode(indices[-1]), indices[-1], scale), mask)
        return torch.cat([index.flatten(1, -2) for index in indices], 1)

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        total, maps = None, self._maps(indices)
        with torch.autocast(indices.device.type, enabled=False):
            for scale, (quantizer, own) in enumerate(zip(self._all_quantizers(), maps, strict=False)):
                codes = self._enlarge(quantizer.decode(own), own, scale)
                total = codes if total is None else total + codes
        if len(maps) < len(self.scales):
            return total
        # The finest map says which positions a mask has dropped, unless it is missing as a whole.
        present = (maps[-1] >= 0).any(-1)  # (B, *S)
        nothing = ~present.flatten(1).any(1).view(-1, *[1] * (present.ndim - 1))
        return drop(total, present | nothing)

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Quantizer.neighbour_distances`, each token for itself, between the codes that its scale adds."""
        self.check_indices(indices)
        codes, distances = [], []
        for quantizer, own in zip(self._all_quantizers(), self._maps(indices), strict=False):
            found, far = quantizer.neighbour_distances(own.flatten(1, -2), k)
            codes.append(found)
            distances.append(far)
        return torch.cat(codes, 1), torch.cat(distances, 1)

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        if tuple(shape) != self.scales[-1]:
            raise ValueError(
                f"the last of scales, {self.scales[-1]}, must be the grid of the latents; got {tuple(shape)}"
            )
        return tuple(IndexBlock(f"scale_{i}", own, (0, self.num_subcodes)) for i, own in enumerate(self.scales))

    def check_latents(self, z: Tensor, mask: Tensor | None = None) -> None:
        super().check_latents(z, mask)
        self._check_grid(z)

    def check_indices(self, indices: Tensor) -> None:
        """Raise if ``indices`` is not int64 ``(B, M, G)`` with the tokens of the first scales or of all."""
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64; got {indices.dtype}")
        lengths = [math.prod(shape) for shape in self.scales]
        prefixes = [sum(lengths[: scale + 1]) for scale in range(len(lengths))]
        if indices.ndim != 3 or indices.shape[2] != self.num_subcodes or indices.shape[1] not in prefixes:
            raise ValueError(
                f"indices must have shape (B, M, {self.num_subcodes}) with M one of {prefixes}, the tokens of the "
                f"first scales or of all; got {tuple(indices.shape)}"
            )

    def _all_quantizers(self) -> list[Quantizer]:
        """The quantizer of every scale."""
        return list(self.quantizers) * (len(self.scales) if len(self.quantizers) == 1 else 1)

    def _check_grid(self, z: Tensor) -> None:
        if tuple(z.shape[1:-1]) != self.scales[-1]:
            raise ValueError(
                f"the last of scales, {self.scales[-1]}, must be the grid of the latents; "
                f"got latents {tuple(z.shape)} with the grid {tuple(z.shape[1:-1])}"
            )

    def _maps(self, indices: Tensor) -> list[Tensor]:
        """``(B, M, G)`` -> the maps ``(B, *shape, G)`` of the scales that are there."""
        maps, start = [], 0
        for shape in self.scales:
            stop = start + math.prod(shape)
            if stop <= indices.shape[1]:
                maps.append(indices[:, start:stop].contiguous().unflatten(1, shape))
            start = stop
        return maps

    def _normalized(self, z: Tensor) -> Tensor:
        latents = z.to(search_dtype(z))
        return F.normalize(latents, dim=-1) if self.l2_normalize else latents

    def _tokens(self, rest: Tensor, mask: Tensor | None, scale: int) -> tuple[Tensor, Tensor | None]:
        """The tokens of one scale and which of them are kept: the mean over the kept positions of each cell."""
        rest, shape = drop(rest, mask), self.scales[scale]
        if scale == len(self.scales) - 1:
            return rest, mask
        tokens = F.interpolate(rest.movedim(-1, 1), size=shape, mode="area").movedim(1, -1).contiguous()
        if mask is None:
            return tokens, None
        share = F.interpolate(mask.to(rest.dtype).unsqueeze(1), size=shape, mode="area").movedim(1, -1)
        kept = share > 0
        return tokens / share.where(kept, 1), kept.squeeze(-1)

    def _trainable_codes(self, quantizer: Quantizer, part: Quantized) -> Tensor:
        """Codes of one scale; running losses train all that they are decoded from."""
        if self.losses == "scales":
            return part.quantized
        return straight_through(quantizer.decode(part.indices), part.quantized.detach())

    def _enlarge(self, codes: Tensor, indices: Tensor, scale: int) -> Tensor:
        """Codes ``(B, *shape, D)`` of one scale -> what it adds, ``(B, *S, D)``."""
        maps = codes.to(search_dtype(codes)).movedim(-1, 1).contiguous()
        if scale < len(self.scales) - 1:
            maps = F.interpolate(maps, size=self.scales[-1], mode=ENLARGE[len(self.scales[-1])])
        if self.phi is not None:
            maps = self.phi[self._phi_of_scale[scale]](maps)
            absent = (indices < 0).flatten(1).all(1)  # (B,); its zeros have gone through Phi's bias
            maps = maps.masked_fill(absent.view(-1, *[1] * (maps.ndim - 1)), 0)
        return maps.movedim(1, -1)

    def _kept_scales(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor | None:
        """Whether each sample keeps each scale, bool ``(scales, B)``; ``None`` if all keep all."""
        if not self.training or not (self.dropout or self.skip):
            return None
        scale = torch.arange(len(self.scales), device=device).unsqueeze(1)
        if self.dropout_leading:
            shorter = torch.arange(batch, device=device) < int(batch * self.dropout)
        else:
            shorter = draw_uniform((batch,), device, generator) < self.dropout
        kept = scale < torch.where(shorter, self._draw_scales(batch, device, generator), len(self.scales))
        if self.skip:
            skipping = draw_uniform((batch,), device, generator) < self.skip
            skipped = 1 + draw_integers(len(self.scales) - 1, (batch,), device, generator)
            kept = kept & ~(skipping & (scale == skipped))
        return kept

    def _draw_scales(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """How many scales each sample ``(B,)`` keeps if it drops any."""
        choices = len(self.scales) - self.dropout_start + 1
        return self.dropout_start + draw_integers(choices, (batch,), device, generator)


class Phi(nn.Module):
    """``(1 - ratio) h + ratio conv(h)`` of maps ``(B, D, *S)``, with a convolution over 3 positions along each axis."""

    def __init__(self, dim: int, ratio: float, axes: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.convolution = (nn.Conv1d if axes == 1 else nn.Conv2d)(dim, dim, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        convolve = F.conv1d if maps.ndim == 3 else F.conv2d
        weight, bias = self.convolution.weight.to(maps.dtype), self.convolution.bias.to(maps.dtype)
        return (1 - self.ratio) * maps + self.ratio * convolve(maps, weight, bias, padding=1)


class DirectionVectorQuantizer(VectorQuantizer):
    """A vector quantizer that searches by the angle alone, but whose codes keep their length (ImageFolder).

    As ``l2_normalize=True`` in search and initial codebook, otherwise as ``l2_normalize=False``. It is made for
    :class:`MultiScaleResidual`, where a residual's direction decides and the losses see the sum of the codes.
    """

    @torch.no_grad()
    def find(self, latents: Tensor) -> Tensor:
        return nearest_codes(F.normalize(latents, dim=1), F.normalize(self.all_codes(), dim=1))

    def _make_codebook(self, size: int, kmeans_steps: int) -> None:
        super()._make_codebook(size, kmeans_steps)
        with torch.no_grad():
            self.codebook.copy_(F.normalize(self.codebook, dim=1))
            if self.ema:
                self.sums.copy_(self.codebook / size)


def _shapes(scales: Sequence[int | Sequence[int]], axes: int) -> tuple[tuple[int, ...], ...]:
    """The scales as tuples of one size per axis."""
    if axes not in ENLARGE:
        raise ValueError(f"axes must be 1 or 2; got {axes}")
    shapes = tuple((scale,) * axes if isinstance(scale, int) else tuple(scale) for scale in scales)
    if len(shapes) < 2:
        raise ValueError(f"scales must hold two sizes or more (one scale is the quantizer alone); got {scales}")
    for shape in shapes:
        if len(shape) != axes or not all(1 <= side <= last for side, last in zip(shape, shapes[-1], strict=True)):
            raise ValueError(
                f"scales must hold {axes} sizes each, from 1 to those of the last scale {shapes[-1]}; got {shape}"
            )
    return shapes


def _check_quantizers(quantizers: list[Quantizer], num_scales: int, losses: str) -> None:
    if len(quantizers) not in (1, num_scales) or len({id(quantizer) for quantizer in quantizers}) < len(quantizers):
        raise ValueError(f"quantizer must be one, or {num_scales} different ones, as many as scales; got {quantizers}")
    kinds = [(quantizer.dim, quantizer.codebook_sizes) for quantizer in quantizers]
    if len(set(kinds)) > 1:
        raise ValueError(f"the quantizers of all scales must have one dim and one codebook_sizes; got {kinds}")
    inner = [part for quantizer in quantizers for part in quantizer.modules() if isinstance(part, Factorized)]
    if losses == "running" and any(part.project_in is not None for part in inner):
        raise ValueError(
            "running losses train no projection into the quantizer (they replace its commitment loss); "
            "project around the scales instead: Factorized(MultiScaleResidual(...), dim)"
        )


def _check_options(losses: str, estimator: str, phi_ratio: float) -> None:
    if losses not in ("running", "scales"):
        raise ValueError(f"losses must be 'running' or 'scales'; got {losses!r}")
    if estimator not in (*ESTIMATORS, "per_scale"):
        raise ValueError(f"estimator must be one of {(*ESTIMATORS, 'per_scale')}; got {estimator!r}")
    if estimator == "per_scale" and phi_ratio:
        raise ValueError("estimator='per_scale' needs phi_ratio=0: the gradient would pass a Phi that did not act")
    if not 0 <= phi_ratio <= 1:
        raise ValueError(f"phi_ratio must lie between 0 and 1; got {phi_ratio}")


def _phi_of_scale(phi_sharing: int | None, num_scales: int) -> tuple[int, ...]:
    """Which convolution each scale uses: as in VAR, the one whose place between 0 and 1 is nearest. All are used."""
    if phi_sharing is not None and phi_sharing < 1:
        raise ValueError(f"phi_sharing must be at least 1, or None for one convolution per scale; got {phi_sharing}")
    count = num_scales if phi_sharing is None else min(phi_sharing, num_scales)
    first = 1 / (3 if count == 4 else 2) / count  # VAR moves four convolutions a little further apart
    # A middle scale may lie half-way between two places: rounded as in VAR's numpy.linspace, it takes the same one.
    step = ((1 - first) - first) / max(count - 1, 1)
    places = [i * step + first for i in range(count)]
    chosen = []
    for scale in range(num_scales):
        at = scale / (num_scales - 1)
        chosen.append(min(range(count), key=lambda i: abs(places[i] - at)))
    return tuple(chosen)


def _poisoned(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents that are NaN throughout a sample with any latent that is not finite, and which samples have none."""
    finite = latents.detach().isfinite().flatten(1).all(1)  # (B,)
    sample = finite.view(-1, *[1] * (latents.ndim - 1))
    return latents.where(sample, torch.nan), finite


def _running_losses(latents: Tensor, total: Tensor, mask: Tensor | None, finite: Tensor) -> dict[str, Tensor]:
    """The sum of the codes so far against the whole latents, a mean over the kept positions."""
    trained = keep_samples(mask, finite, latents.shape[:-1])  # a latent that is not finite trains no codes
    error = drop(latents.detach(), trained) - drop(total, trained)
    keep = None if mask is None else mask.reshape(-1)
    return {
        "commitment": mean_over_kept((latents - total.detach()).square().flatten(0, -2), keep),
        "codebook": mean_over_kept(error.square().flatten(0, -2), trained.reshape(-1)),
    }


def _statistics(parts: list[Quantized]) -> dict[str, Tensor]:
    """Counts of all scales together, means of scalars."""
    joint = {}
    for name in parts[0].statistics:
        values = [part.statistics[name] for part in parts]
        if name == "counts":
            joint[name] = torch.stack(values).sum(0)
        elif values[0].ndim == 0:
            joint[name] = torch.stack(values).mean()
    return joint
