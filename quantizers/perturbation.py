"""Latent perturbation (RobustTok, arXiv:2503.08354): train the decoder on codes that are nearly right.

A generator of tokens makes mistakes, and mostly small ones. In training, some tokens of some samples are replaced by
one of the codes nearest to theirs before the decoder sees them. Losses, indices and statistics are those of the clean
codes, and the gradient takes the way it would take from the clean codes.

The paper looks for neighbours around the chosen code; its code looks around the latent, perturbs the first samples of
the batch, none if the batch is small, and anneals along a line that jumps at its end. All of that can be chosen here;
the defaults are the paper's neighbours, random samples in the exact share, and a line that does not jump.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .base import IndexBlock, Quantized, Quantizer, drop
from .draws import draw_uniform
from .estimators import straight_through
from .neighbours import nearest_rows

TABLE_LIMIT = 1 << 20  # codes that around="latent" compares with every latent


class LatentPerturbation(Quantizer):
    """Replaces tokens by neighbours in training; in evaluation it is the quantizer inside.

    A replaced token draws one of ``num_neighbours`` codes, its own among them, so it changes with probability
    ``token_probability * (1 - 1 / num_neighbours)``. Wrap it around a quantizer with the codebook, inside a projection
    if there is one: a projection inside would not learn from the replaced codes.

    Args:
        quantizer: the quantizer inside.
        token_probability: alpha, how likely a token of a chosen sample is replaced.
        sample_fraction: beta, the share of samples chosen.
        num_neighbours: delta, how many nearest codes to draw from.
        around: look for codes near the chosen ``"code"``, or near the ``"latent"`` as the published code does; that
            needs one index per latent and a codebook of at most 2^20 codes.
        samples: choose ``"random"`` samples, on average exactly the fraction; or the ``"first"``
            ``int(batch * sample_fraction)``, as the published code does.
        anneal_start: optimizer step at which ``token_probability`` and ``num_neighbours`` begin to fall; never if
            ``None``. The published recipe falls from epoch 40 to 120 of 200.
        anneal_end: optimizer step at which they have reached ``end_ratio`` of themselves.
        end_ratio: what is left of both at the end; ``num_neighbours`` is cut to an integer, at least 1.
        continuous: ``False`` for the published schedule, see :func:`anneal_ratio`; equal for ``end_ratio=0.5``.

    Shape:
        that of the quantizer inside.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        token_probability: float = 1.0,
        sample_fraction: float = 0.1,
        num_neighbours: int = 100,
        around: Literal["code", "latent"] = "code",
        samples: Literal["random", "first"] = "random",
        anneal_start: int | None = None,
        anneal_end: int | None = None,
        end_ratio: float = 0.5,
        continuous: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("token_probability", token_probability),
            ("sample_fraction", sample_fraction),
            ("end_ratio", end_ratio),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value}")
        codes = math.prod(quantizer.codebook_sizes)
        if not 1 <= num_neighbours <= codes:
            raise ValueError(
                f"num_neighbours must lie between 1 and the number of codes, {codes}; got {num_neighbours}"
            )
        if around not in ("code", "latent") or samples not in ("random", "first"):
            raise ValueError(
                f"around must be 'code' or 'latent' and samples 'random' or 'first'; got {around!r} and {samples!r}"
            )
        if around == "latent" and (quantizer.num_subcodes > 1 or codes > TABLE_LIMIT):
            raise ValueError(
                f"around='latent' compares latents with every code, so it needs one index per token and at most "
                f"{TABLE_LIMIT} codes; {type(quantizer).__name__} has sizes {quantizer.codebook_sizes}"
            )
        if (anneal_start is None) != (anneal_end is None) or (
            anneal_start is not None and not 0 <= anneal_start < anneal_end
        ):
            raise ValueError(
                f"anneal_start and anneal_end must both be None, or 0 <= anneal_start < anneal_end; got {anneal_start} "
                f"and {anneal_end}"
            )
        self.quantizer = quantizer
        self.dim = quantizer.dim
        self.codebook_sizes = quantizer.codebook_sizes
        self.token_probability = token_probability
        self.sample_fraction = sample_fraction
        self.num_neighbours = num_neighbours
        self.around = around
        self.samples = samples
        self.anneal = None if anneal_start is None else (anneal_start, anneal_end)
        self.end_ratio = end_ratio
        self.continuous = continuous
        if self.anneal is not None:
            self.register_buffer("optimizer_steps", torch.zeros((), dtype=torch.int64))

    @property
    def default_loss_weights(self) -> Mapping[str, float]:
        return self.quantizer.default_loss_weights

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        clean = self.quantizer.assign(z, mask, generator=generator)
        quantized = drop(self._perturbed(clean, generator), mask) if self.training else clean.quantized
        return Quantized(quantized, clean.indices, clean.losses, clean.statistics, clean.latents, (clean,))

    def estimate(self, assigned: Quantized) -> Tensor:
        """The value of the replaced codes, the gradient of the clean ones."""
        (clean,) = assigned.parts
        estimated = self.quantizer.estimate(clean)
        if assigned.quantized is clean.quantized:
            return estimated
        return straight_through(estimated, assigned.quantized.detach())

    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.quantizer.encode(z, mask)

    def decode(self, indices: Tensor) -> Tensor:
        return self.quantizer.decode(indices)

    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.quantizer.neighbour_distances(indices, k)

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        return self.quantizer.index_blocks(shape)

    @torch.no_grad()
    def commit_update(self) -> None:
        if self.anneal is not None:
            self.optimizer_steps += 1
        super().commit_update()

    def _perturbed(self, clean: Quantized, generator: torch.Generator | None) -> Tensor:
        """``(B, *S, D)``: the clean codes, replaced where the draws say so; what is drawn stays on the device."""
        batch = len(clean.indices)
        share = batch * self.sample_fraction
        number = math.floor(share + 1e-9) if self.samples == "first" else math.ceil(share - 1e-9)
        if number == 0:
            return clean.quantized
        device = clean.indices.device
        chosen = torch.arange(number, device=device)  # (M,) samples
        indices = clean.indices
        if self.samples == "random":
            chosen = draw_uniform((batch,), device, generator).argsort()[:number]
            indices = indices.index_select(0, chosen)
        else:
            indices = indices[:number]
        kept, rank = self._draw(indices.shape[:-1], device, generator)  # (M, *S) each
        changed = (rank > 0) & ~kept
        if self.samples == "random":
            # The last of the chosen samples counts in part of the calls only: the share is exact on average.
            used = torch.arange(1, number + 1, device=device) <= draw_uniform((), device, generator) + share
            changed = changed & used.view(-1, *(1,) * (changed.ndim - 1))
        near = self._candidates(clean, chosen, indices)  # (M, *S, k, G)
        replaced = replace_tokens(indices, neighbour_at(near, rank), changed)
        codes = self.quantizer.decode(replaced).detach()
        before = clean.quantized.index_select(0, chosen)
        if codes.shape[:-1] == changed.shape:  # else a token is not one index: several scales, say
            codes = torch.where(changed.unsqueeze(-1), codes.to(before.dtype), before)
        return clean.quantized.index_copy(0, chosen, codes.to(before.dtype))

    @torch.no_grad()
    def _candidates(self, clean: Quantized, chosen: Tensor, indices: Tensor) -> Tensor:
        """The nearest codes of the chosen samples, ``(M, *S, k, G)``, nearest first."""
        if self.around == "code":
            return self.quantizer.neighbours(indices, self.num_neighbours)
        latents = clean.latents.detach().index_select(0, chosen)
        if latents.shape[:-1] != indices.shape[:-1]:
            raise ValueError(
                f"around='latent' needs one index per latent; {type(self.quantizer).__name__} has indices "
                f"{tuple(indices.shape)} for latents {tuple(latents.shape)}"
            )
        return latent_neighbours(self.quantizer, latents, self.num_neighbours)

    def _draw(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Which tokens stay, and which of the nearest codes the others take: bool and int64 of shape ``(M, *S)``."""
        probability, number = self._strength()
        kept = draw_uniform(shape, device, generator) >= probability
        return kept, (draw_uniform(shape, device, generator) * number).long()

    def _strength(self) -> tuple[float | Tensor, int | Tensor]:
        """alpha and delta at the present optimizer step; tensors while they are annealed."""
        if self.anneal is None:
            return self.token_probability, self.num_neighbours
        steps = self.optimizer_steps
        steps = steps.float() if steps.device.type == "mps" else steps.double()  # no float64 there
        ratio = anneal_ratio(steps, *self.anneal, self.end_ratio, self.continuous)
        return self.token_probability * ratio, (self.num_neighbours * ratio).floor().clamp(min=1)


@torch.no_grad()
def latent_neighbours(quantizer: Quantizer, latents: Tensor, k: int) -> Tensor:
    """The ``k`` codes nearest to any latents, as the published code looks for them, ``(B, *S, k, 1)``, nearest first.

    Args:
        quantizer: of one index per token, with a codebook that can be listed.
        latents: ``(B, *S, D)`` as the quantizer compares them with its codes (:attr:`~.base.Quantized.latents`).
        k: between 1 and the number of codes.
    """
    (size,) = quantizer.codebook_sizes
    codes = quantizer.decode(torch.arange(size, device=latents.device).unsqueeze(1))  # (K, D)
    found, _ = nearest_rows(latents.flatten(0, -2), codes, k)
    return found.view(*latents.shape[:-1], k, 1)


def neighbour_at(near: Tensor, rank: Tensor) -> Tensor:
    """Tokens ``(B, *S, G)`` out of ``near`` ``(B, *S, k, G)``, each the one at its ``rank``, int64 ``(B, *S)``."""
    where = rank[..., None, None].expand(*rank.shape, 1, near.shape[-1])
    return near.gather(-2, where).squeeze(-2)


def replace_tokens(indices: Tensor, others: Tensor, changed: Tensor) -> Tensor:
    """Tokens ``(B, *S, G)`` with ``others`` in their place where ``changed``, bool ``(B, *S)``; dropped ones stay."""
    return torch.where(changed.unsqueeze(-1) & (indices >= 0), others, indices)


def anneal_ratio(position: Tensor, start: float, end: float, end_ratio: float = 0.5, continuous: bool = True) -> Tensor:
    """How much of the perturbation is left: 1 up to ``start``, ``end_ratio`` after ``end``, a straight line between.

    The published line is ``1 - progress * end_ratio``, which only meets ``end_ratio`` if that is 0.5 and jumps
    elsewhere; ``continuous`` goes to ``end_ratio`` instead.

    Args:
        position: floating-point tensor, an optimizer step or an epoch.
        start: where the line begins.
        end: where it ends.
        end_ratio: the value after the end.
        continuous: ``False`` for the published line.
    """
    progress = ((position - start) / (end - start)).clamp(0, 1)
    if continuous:
        return 1 - progress * (1 - end_ratio)
    return torch.where(position > end, end_ratio, 1 - progress * end_ratio)
