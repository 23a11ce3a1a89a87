"""Several quantizers side by side, each with its own part of the latents.

Either every branch has its own slice of the channels (FQGAN, arXiv:2411.16681: visual and semantic codebooks), or, with
``lengths``, its own range of the tokens (Hita, arXiv:2507.02358: holistic and patch tokens; ImageFolder,
arXiv:2410.01756: semantic and detail tokens, each range a grid). A branch with projections of its own is a
:class:`~.factorized.Factorized`; branches may be containers themselves.

Two published penalties keep the branches apart. FQGAN's ``disentanglement`` is the squared cosine between the codes of
a token in two branches. ImageFolder's ``dependency`` is the cosine between two branches averaged over their tokens; it
is not squared, so it does not push towards orthogonal codes but towards opposite ones. Both look at the codes that the
decoder sees, through each branch's gradient estimator, so plain codebooks get no gradient from them.

Losses are means over the branches, where some originals add the branches up: multiply the weights then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import COUNTS_LIMIT, IndexBlock, Quantized, Quantizer, drop, mean_over_kept, token_rows
from .neighbours import product_neighbours


class Product(Quantizer):
    """Quantizers side by side on slices of the channels, or on ranges of the tokens.

    The estimator of every branch acts on its own part. Losses of the same name are averaged over the branches that have
    them; where their published weights differ they stay apart as ``branch_0_<name>``, ``branch_1_<name>`` ... Scalar
    statistics are averaged.

    Args:
        branches: the quantizers, in the order of their channels or ranges.
        lengths: token ranges instead of channel slices: per branch a number of tokens, or a grid ``(h, w)`` that its
            range is given to the branch as (for quantizers that need one).
        disentanglement: add FQGAN's loss ``disentanglement``: squared cosine between the branches' codes of a token, a
            mean over tokens and pairs of branches. Weight 0.1.
        dependency: add ImageFolder's loss ``dependency``: cosine between the branches' codes averaged over the tokens
            of a sample, a mean over samples and pairs of branches. Weight 1.

    Shape:
        Channel slices: latents ``(B, *S, sum(D_b))``, indices ``(B, *S, sum(G_b))``. Token ranges: latents
        ``(B, sum(lengths), D)``, indices ``(B, M, sum(G_b))`` with the ranges one after another (M tokens, as many as
        the latents have unless a branch changes the number) and ``-1`` in the columns of the other branches;
        :meth:`index_blocks` names the parts ``branch_0``, ``branch_1`` ...

    Raises:
        ValueError: if branches do not fit together: unequal dimensions under ``lengths`` or a penalty, a penalty for
            one branch, ``disentanglement`` of token ranges (their tokens do not correspond).
    """

    def __init__(
        self,
        branches: Sequence[Quantizer],
        lengths: Sequence[int | Sequence[int]] | None = None,
        disentanglement: bool = False,
        dependency: bool = False,
    ) -> None:
        super().__init__()
        _check_branches(branches, lengths, disentanglement, dependency)
        self.branches = nn.ModuleList(branches)
        self.shapes = None if lengths is None else tuple(_token_shape(length) for length in lengths)
        self.disentanglement = disentanglement
        self.dependency = dependency
        self.dim = branches[0].dim if lengths is not None else sum(branch.dim for branch in branches)
        self.codebook_sizes = tuple(size for branch in branches for size in branch.codebook_sizes)
        self._loss_names, self.default_loss_weights = joint_weights(branches, "branch")
        if disentanglement:
            self.default_loss_weights["disentanglement"] = 0.1
        if dependency:
            self.default_loss_weights["dependency"] = 1.0

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        masks = self._split_mask(mask)
        parts = [
            branch.assign(own, kept, generator=generator)
            for branch, own, kept in zip(self.branches, self._split(z), masks, strict=True)
        ]
        losses = joint_losses(parts, self._loss_names)
        if self.disentanglement or self.dependency:
            losses.update(self._penalties(parts, masks))
        return Quantized(
            self._join([part.quantized for part in parts]),
            self._join_indices([part.indices for part in parts]),
            losses,
            joint_statistics(parts, self.codebook_sizes),
            self._join([part.latents for part in parts]),
            tuple(parts),
        )

    def estimate(self, assigned: Quantized) -> Tensor:
        parts = zip(self.branches, assigned.parts, strict=True)
        return self._join([branch.estimate(part) for branch, part in parts])

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_latents(z, mask)
        parts = zip(self.branches, self._split(drop(z, mask)), self._split_mask(mask), strict=True)
        return self._join_indices([branch.encode(own, kept) for branch, own, kept in parts])

    def decode(self, indices: Tensor) -> Tensor:
        self.check_indices(indices)
        parts = zip(self.branches, self._split_indices(indices), strict=True)
        return self._join([branch.decode(own) for branch, own in parts])

    @torch.no_grad()
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.check_indices(indices)
        if self.shapes is None:
            return joint_neighbours(self.branches, indices, k)
        # A token has the codes of one branch only, so there is no product to form.
        codes, distances = [], []
        for number, own in enumerate(self._split_indices(indices)):
            found, far = self.branches[number].neighbour_distances(own, k)
            codes.append(self._own_columns(found.flatten(1, -3), number))  # (B, M_b, k, G)
            distances.append(far.flatten(1, -2))  # (B, M_b, k)
        return torch.cat(codes, 1), torch.cat(distances, 1)

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        if self.shapes is None:
            return joint_blocks(self.branches, shape)
        if math.prod(shape) != self._num_tokens:
            raise ValueError(f"latents must have {self._num_tokens} tokens, the sum of lengths; got {tuple(shape)}")
        blocks = []
        for number, own_blocks in enumerate(self._branch_blocks()):
            first = self._first_column(number)
            for block in own_blocks:
                name = f"branch_{number}_{block.name}" if block.name else f"branch_{number}"
                columns = (first + block.columns[0], first + block.columns[1])
                blocks.append(IndexBlock(name, block.shape, columns))
        return tuple(blocks)

    def check_latents(self, z: Tensor, mask: Tensor | None = None) -> None:
        super().check_latents(z, mask)
        if self.shapes is not None and (z.ndim != 3 or z.shape[1] != self._num_tokens):
            raise ValueError(
                f"z must have shape (B, {self._num_tokens}, {self.dim}), one token axis with the ranges "
                f"{[math.prod(shape) for shape in self.shapes]}; got {tuple(z.shape)}"
            )

    def _penalties(self, parts: list[Quantized], masks: list[Tensor | None]) -> dict[str, Tensor]:
        """The losses between branches, on the codes that the decoder sees."""
        codes = [
            drop(branch.estimate(part), kept) for branch, part, kept in zip(self.branches, parts, masks, strict=True)
        ]
        losses = {}
        if self.disentanglement:
            keep = None if masks[0] is None else masks[0].reshape(-1)
            losses["disentanglement"] = _mean_over_pairs([token_rows(code) for code in codes], keep, square=True)
        if self.dependency:
            keep = None
            if masks[0] is not None:
                keep = torch.stack([kept.flatten(1).any(1) for kept in masks]).all(0)  # (B,)
            # A cosine does not change with the lengths, so the sum over tokens stands for their mean.
            pooled = [token_rows(code.flatten(1, -2).sum(1)) for code in codes]  # (B, D)
            losses["dependency"] = _mean_over_pairs(pooled, keep, square=False)
        return losses

    @property
    def _num_tokens(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def _first_column(self, number: int) -> int:
        return sum(branch.num_subcodes for branch in self.branches[:number])

    def _branch_blocks(self) -> list[tuple[IndexBlock, ...]]:
        return [branch.index_blocks(shape) for branch, shape in zip(self.branches, self.shapes, strict=True)]

    def _split(self, z: Tensor) -> list[Tensor]:
        """The part of every branch of latents ``(B, *S, D)``."""
        if self.shapes is None:
            return list(z.split([branch.dim for branch in self.branches], -1))
        ranges = z.split([math.prod(shape) for shape in self.shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(ranges, self.shapes, strict=True)]

    def _split_mask(self, mask: Tensor | None) -> list[Tensor | None]:
        if mask is None or self.shapes is None:
            return [mask] * len(self.branches)
        return self._split(mask)

    def _join(self, codes: list[Tensor]) -> Tensor:
        if self.shapes is None:
            return torch.cat(codes, -1)
        return torch.cat([code.flatten(1, -2) for code in codes], 1)

    def _join_indices(self, indices: list[Tensor]) -> Tensor:
        if self.shapes is None:
            return torch.cat(indices, -1)
        flat = [own.flatten(1, -2) for own in indices]
        return torch.cat([self._own_columns(own, number) for number, own in enumerate(flat)], 1)

    def _own_columns(self, indices: Tensor, number: int) -> Tensor:
        """``(..., G_b)`` of one branch -> ``(..., G)`` with ``-1`` in the columns of the others."""
        before = self._first_column(number)
        return F.pad(indices, (before, self.num_subcodes - before - indices.shape[-1]), value=-1)

    def _split_indices(self, indices: Tensor) -> list[Tensor]:
        columns = indices.split([branch.num_subcodes for branch in self.branches], -1)
        if self.shapes is None:
            return list(columns)
        branch_blocks = self._branch_blocks()
        lengths = [sum(block.length for block in blocks) for blocks in branch_blocks]
        if indices.ndim != 3 or indices.shape[1] != sum(lengths):
            raise ValueError(
                f"indices must have shape (B, {sum(lengths)}, {self.num_subcodes}), one token axis with the ranges "
                f"{lengths}; got {tuple(indices.shape)}"
            )
        parts, start = [], 0
        for own, blocks, length in zip(columns, branch_blocks, lengths, strict=True):
            part = own[:, start : start + length]
            # Indices in named blocks are flat; without, they stand on the token axes of the latents.
            parts.append(part if blocks[0].name else part.unflatten(1, blocks[0].shape))
            start += length
        return parts


def mean_losses(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of the losses of each name over the parts that have it."""
    names = dict.fromkeys(name for part in losses for name in part)
    return {name: _mean([part[name] for part in losses if name in part]) for name in names}


def joint_weights(quantizers: Sequence[Quantizer], part: str) -> tuple[list[dict[str, str]], dict[str, float]]:
    """How the losses of several quantizers are called together, and their weights.

    A loss keeps its name if all that have it weight it alike, else it becomes ``<part>_0_<name>`` and so on. Either way
    the weighted sum is the mean of the quantizers' own terms.

    Args:
        quantizers: in their order.
        part: what one of them is to the container (``branch``, ``level``).

    Returns:
        Per quantizer its losses' names, old to new; and the weight of every new name.
    """
    names: list[dict[str, str]] = [{} for _ in quantizers]
    weights = {}
    for name in dict.fromkeys(name for quantizer in quantizers for name in quantizer.default_loss_weights):
        having = {i: q.default_loss_weights[name] for i, q in enumerate(quantizers) if name in q.default_loss_weights}
        alike = len(set(having.values())) == 1
        for number, weight in having.items():
            joint = name if alike else f"{part}_{number}_{name}"
            names[number][name] = joint
            weights[joint] = weight if alike else weight / len(having)
    return names, weights


def joint_losses(parts: Sequence[Quantized], names: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """Mean of the losses of each new name (see :func:`joint_weights`) over the parts that have it."""
    renamed = zip(names, parts, strict=True)
    return mean_losses([{own[name]: loss for name, loss in part.losses.items()} for own, part in renamed])


def joint_statistics(parts: Sequence[Quantized], codebook_sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Statistics of quantizers side by side: counts one after another, if all have them; means of scalars."""
    names = dict.fromkeys(name for part in parts for name in part.statistics)
    joint = {}
    for name in names:
        values = [part.statistics[name] for part in parts if name in part.statistics]
        if name == "counts":
            if len(values) == len(parts) and sum(codebook_sizes) <= COUNTS_LIMIT:
                joint[name] = torch.cat(values)
        elif all(value.ndim == 0 for value in values):
            joint[name] = _mean(values)
    return joint


def joint_neighbours(quantizers: Sequence[Quantizer], indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nearest codes of tokens that have sub-codes of several quantizers: squared distances add up.

    Args:
        quantizers: in the order of their sub-codes.
        indices: ``(B, *S, G)``.
        k: number of neighbours.

    Returns:
        Codes ``(B, *S, k, G)`` and squared distances ``(B, *S, k)``.
    """
    parts = []
    columns = indices.split([quantizer.num_subcodes for quantizer in quantizers], -1)
    for quantizer, own in zip(quantizers, columns, strict=True):
        found, distances = quantizer.neighbour_distances(own, min(k, math.prod(quantizer.codebook_sizes)))
        parts.append((found.flatten(0, -3), distances.flatten(0, -2)))
    found, distances = product_neighbours(parts, k)  # (n, k, G), (n, k)
    shape = indices.shape[:-1]
    return found.view(*shape, k, indices.shape[-1]), distances.view(*shape, k)


def joint_blocks(quantizers: Sequence[Quantizer], shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
    """Index blocks of quantizers side by side: those that all of them have, with the sub-codes of all.

    Raises:
        ValueError: if they arrange their indices differently, or in blocks that hold only some of their sub-codes.
    """
    arrangements = []
    for quantizer in quantizers:
        blocks = quantizer.index_blocks(shape)
        partial = any(block.columns != (0, quantizer.num_subcodes) for block in blocks)
        arrangements.append(None if partial else tuple((block.name, block.shape) for block in blocks))
    if arrangements[0] is None or len(set(arrangements)) > 1:
        raise ValueError(
            "quantizers side by side on the channels must arrange their indices alike, all sub-codes in every block; "
            f"got {[type(quantizer).__name__ for quantizer in quantizers]}"
        )
    columns = (0, sum(quantizer.num_subcodes for quantizer in quantizers))
    return tuple(IndexBlock(name, block_shape, columns) for name, block_shape in arrangements[0])


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


def _mean_over_pairs(codes: list[Tensor], keep: Tensor | None, square: bool) -> Tensor:
    """Mean (squared) cosine between the rows of every two of several ``(n, D)``."""
    directions = [F.normalize(code, dim=1) for code in codes]
    cosines = torch.stack([(a * b).sum(1) for a, b in combinations(directions, 2)], 1)  # (n, pairs)
    return mean_over_kept(cosines.square() if square else cosines, keep)


def _token_shape(length: int | Sequence[int]) -> tuple[int, ...]:
    return (length,) if isinstance(length, int) else tuple(length)


def _check_branches(
    branches: Sequence[Quantizer],
    lengths: Sequence[int | Sequence[int]] | None,
    disentanglement: bool,
    dependency: bool,
) -> None:
    if not branches or not all(isinstance(branch, Quantizer) for branch in branches):
        raise ValueError(f"branches must be one or more quantizers; got {branches!r}")
    if len({id(branch) for branch in branches}) < len(branches):
        raise ValueError("branches must be different quantizers; Grouped(..., shared=True) shares one among groups")
    dims = [branch.dim for branch in branches]
    if (lengths is not None or disentanglement or dependency) and len(set(dims)) > 1:
        raise ValueError(f"lengths, disentanglement and dependency need branches of one dim; got {dims}")
    if (disentanglement or dependency) and len(branches) < 2:
        raise ValueError("disentanglement and dependency compare branches; got one branch")
    if lengths is None:
        return
    shapes = [_token_shape(length) for length in lengths]
    if len(shapes) != len(branches) or any(not shape or min(shape) < 1 for shape in shapes):
        raise ValueError(f"lengths must hold a positive number of tokens per branch ({len(branches)}); got {lengths!r}")
    if disentanglement:
        raise ValueError("disentanglement compares codes of the same token; token ranges share none: use dependency")
