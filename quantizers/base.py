"""The quantizer contract: continuous latents in, integer codes and quantized latents out.

Every quantizer is channel-last: latents are ``(B, *S, D)`` with any number of token axes ``S`` (one for a sequence, two
for a grid), indices ``(B, *S, G)`` int64 with G sub-codes per token (1 for plain vector quantization; groups, residual
depth or factors otherwise). ``-1`` marks a dropped position. The layout is never guessed from ``ndim``.

A quantizer does two things, kept apart so that quantizers nest: :meth:`Quantizer.assign` finds codes and losses, and
:meth:`Quantizer.estimate` says how a gradient passes from the codes to the latents. ``forward`` does both. A container
that sums codes (residual quantization) assigns with its stages and estimates once, on the sum: with an estimator per
stage the gradient would arrive once per stage. Losses are unweighted, and present in training and evaluation alike: the
weights belong to the training objective.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layers.configurable import Configurable
from .estimators import straight_through
from .search import search_dtype

COUNTS_LIMIT = 1 << 20  # codes; implicit codebooks can be far larger than any histogram of them


@dataclass
class Quantized:
    """What a quantizer returns.

    Attributes:
        quantized: ``(B, *S, D)`` quantized latents; gradients reach ``z`` through the quantizer's estimator.
        indices: ``(B, *S, G)`` int64, ``-1`` where the mask dropped a position.
        losses: unweighted scalar tensors by name.
        statistics: detached tensors. ``counts`` is int64 of length ``sum(codebook_sizes)``: how often each code was
            used in this call, the sub-codes one after another (absent above 2^20 codes).
        latents: ``(B, *S, D)`` what ``quantized`` stands for: the latents as the quantizer compares them with its
            codes (normalised, bounded ...), zero at dropped positions, with their gradient.
        parts: in a container that estimates with its inner quantizers, what their ``assign`` returned, in their order.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    parts: tuple[Quantized, ...] = ()


@dataclass(frozen=True)
class IndexBlock:
    """A rectangular part of an index tensor whose tokens belong together.

    Attributes:
        name: what it holds (``scale_2``, ``branch_0``); empty if the whole index tensor is one block.
        shape: its token axes; blocks follow one another along the flattened token axis of the index tensor.
        columns: ``(start, stop)`` of its sub-codes; the others are ``-1`` in its rows.
    """

    name: str
    shape: tuple[int, ...]
    columns: tuple[int, int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return math.prod(self.shape)


class Quantizer(Configurable):
    """Base class of all quantizers.

    A subclass sets :attr:`dim` and :attr:`codebook_sizes` and implements :meth:`assign`, :meth:`encode`,
    :meth:`decode` and :meth:`neighbour_distances`; :meth:`estimate` if its gradient is not the straight-through one.

    Attributes:
        dim: D, the size of one latent.
        codebook_sizes: number of codes of each of the G sub-codes.
        default_loss_weights: published weight of every loss that :meth:`forward` returns; a training objective may
            override them.
        float32_buffers: names of buffers that stay float32 when the module is cast (running statistics stall in half
            precision).
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    default_loss_weights: Mapping[str, float] = {}
    float32_buffers: tuple[str, ...] = ()

    @property
    def num_subcodes(self) -> int:
        """G, the number of indices that one token carries."""
        return len(self.codebook_sizes)

    @property
    def bits(self) -> float:
        """Bits of one token at a fixed rate: the sum of log2 of the codebook sizes."""
        return float(sum(math.log2(size) for size in self.codebook_sizes))

    def forward(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        """Quantize latents ``(B, *S, D)``; ``mask`` is bool ``(B, *S)``, ``True`` = keep.

        A dropped position gets index ``-1`` and a zero vector, and counts for no loss, gradient or statistic. Computes
        in float32 (float64 latents: float64), also under autocast. A latent that is not finite keeps its position and
        some valid index; it changes no codebook state, and the losses that reach the encoder become not finite.

        Args:
            z: latents.
            mask: positions to keep.
            generator: source of random numbers for the quantizers that draw any in training.
        """
        self.check_latents(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            result = self.assign(drop(z, mask), mask, generator=generator)
            result.quantized = drop(self.estimate(result), mask)
        return result

    @abstractmethod
    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        """Find codes and losses, without the step that lets a gradient pass from codes to latents.

        Args:
            z: checked latents ``(B, *S, D)``, zero at dropped positions, autocast off.
            mask: bool ``(B, *S)`` or ``None``.
            generator: source of random numbers.

        Returns:
            As :meth:`forward`, except that ``quantized`` carries no gradient to ``z``: only one to the parameters that
            are trained by what follows the quantizer (an output projection, say). ``latents`` is filled in, zero
            vectors and ``-1`` stand at dropped positions.
        """

    def estimate(self, assigned: Quantized) -> Tensor:
        """``(B, *S, D)`` equal to ``assigned.quantized``, with a gradient to ``assigned.latents``: straight through."""
        return straight_through(assigned.latents, assigned.quantized)

    @abstractmethod
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices ``(B, *S, G)`` of latents ``(B, *S, D)``: deterministic, without gradient."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Latents ``(B, *S, D)`` of indices ``(B, *S, G)``, bit-equal to ``forward(z).quantized`` in eval.

        ``-1`` decodes to the zero vector.
        """

    @abstractmethod
    def neighbour_distances(self, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` codes nearest to each given code, and how far away they are.

        Sub-codes of one token are one point of a product space: squared distances add up, also over the levels of
        residual quantization.

        Args:
            indices: ``(B, *S, G)``.
            k: between 1 and the number of codes of a token.

        Returns:
            Codes ``(B, *S, k, G)``, nearest first; the code itself leads, equal distances are ordered by the lowest
            index, ``-1`` has neighbours ``-1``. Squared distances ``(B, *S, k)``.

        Raises:
            ValueError: for ``k`` out of range.
        """

    def neighbours(self, indices: Tensor, k: int) -> Tensor:
        """The codes of :meth:`neighbour_distances`, ``(B, *S, k, G)``: for latent perturbation and pFID."""
        return self.neighbour_distances(indices, k)[0]

    def index_blocks(self, shape: tuple[int, ...]) -> tuple[IndexBlock, ...]:
        """How the indices of latents with token axes ``shape`` are arranged: one block unless a quantizer says more."""
        return (IndexBlock("", tuple(shape), (0, self.num_subcodes)),)

    def commit_update(self) -> None:
        """Apply the state changes that training forward passes have gathered, in this and all nested quantizers.

        Called once after every optimizer step, on all ranks, so gradient accumulation, a second forward pass or
        activation checkpointing count once.
        """
        for part in nested_quantizers(self):
            part.commit_update()

    def check_latents(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Raise if ``z`` is not floating ``(B, *S, dim)`` or ``mask`` not bool ``(B, *S)``."""
        if z.ndim < 2 or z.shape[-1] != self.dim:
            raise ValueError(f"z must have shape (B, *S, {self.dim}), channels last; got {tuple(z.shape)}")
        if not z.is_floating_point():
            raise TypeError(f"z must be a floating-point tensor; got {z.dtype}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = keep); got {mask.dtype}")
        if mask.shape != z.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(z.shape[:-1])} to match z; got {tuple(mask.shape)}")

    def check_indices(self, indices: Tensor) -> None:
        """Raise if ``indices`` is not int64 ``(B, *S, G)``; ranges are checked by ``Tokens.validate``."""
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64; got {indices.dtype}")
        if indices.ndim < 2 or indices.shape[-1] != self.num_subcodes:
            raise ValueError(
                f"indices must have shape (B, *S, {self.num_subcodes}), one entry per sub-code; "
                f"got {tuple(indices.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # Module.to, .half and .bfloat16 all pass here; the state of running averages moves but is never cast down.
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, torch.empty_like(new, dtype=torch.float32) if new.is_meta else old.to(new.device))
        return self


def nested_quantizers(module: torch.nn.Module) -> list[Quantizer]:
    """The outermost quantizers inside a module (not the module itself), each once."""
    found: list[Quantizer] = []
    for child in module.children():
        found += [child] if isinstance(child, Quantizer) else nested_quantizers(child)
    return list(dict.fromkeys(found))


def drop(values: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, *S, C)`` with zeros where ``mask`` ``(B, *S)`` is ``False``, whatever stood there."""
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)


def drop_indices(indices: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, *S, G)`` with ``-1`` where ``mask`` ``(B, *S)`` is ``False``."""
    return indices if mask is None else indices.masked_fill(~mask.unsqueeze(-1), -1)


def token_rows(z: Tensor) -> Tensor:
    """``(B, *S, D)`` -> ``(n, D)`` in the dtype that quantizers compute in."""
    return z.reshape(-1, z.shape[-1]).to(search_dtype(z))


def mean_over_kept(values: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of ``(n, C)`` over all elements of the rows where ``keep`` ``(n,)`` is ``True``; 0 if there are none."""
    if keep is None:
        return values.mean() if values.numel() else values.sum()
    values = values.masked_fill(~keep.unsqueeze(1), 0)
    return values.sum() / (keep.sum().clamp(min=1) * values.shape[1])


def count_codes(indices: Tensor, codebook_sizes: tuple[int, ...], finite: Tensor | None = None) -> dict[str, Tensor]:
    """Statistics entry ``{"counts": (sum(codebook_sizes),)}`` of indices ``(..., G)``; empty above 2^20 codes.

    Args:
        indices: int64, ``-1`` counts for nothing.
        codebook_sizes: number of codes of each of the G sub-codes.
        finite: bool ``(...)``, positions to count; all if ``None``.
    """
    total = sum(codebook_sizes)
    if total > COUNTS_LIMIT:
        return {}
    flat = indices.reshape(-1, len(codebook_sizes))  # (n, G)
    if finite is not None:
        flat = flat.masked_fill(~finite.reshape(-1, 1), -1)
    # One slot in front takes what does not count. The offsets are added as numbers: no table has to reach the device.
    slots, start = [], 1
    for column, size in zip(flat.unbind(1), codebook_sizes, strict=True):
        slots.append(column + start if start == 1 else torch.where(column < 0, 0, column + start))
        start += size
    slot = slots[0] if len(slots) == 1 else torch.cat(slots)
    counts = torch.zeros(total + 1, dtype=torch.int64, device=indices.device)
    return {"counts": counts.scatter_add_(0, slot, torch.ones_like(slot))[1:]}
