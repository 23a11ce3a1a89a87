"""The quantizer contract: continuous latents in, integer codes and quantized latents out.

Every quantizer is channel-last: latents are ``(B, *S, D)`` with any number of token axes ``S`` (one for a sequence, two
for a grid), indices ``(B, *S, G)`` int64 with G sub-codes per token (1 for plain vector quantization; groups, residual
depth or factors otherwise). ``-1`` marks a dropped position. The layout is never guessed from ``ndim``.

The gradient estimator is applied once, at the outermost quantizer; losses are unweighted, and present in training and
evaluation alike: the weights belong to the training objective.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layers.configurable import Configurable


@dataclass
class Quantized:
    """What a quantizer returns.

    Attributes:
        quantized: ``(B, *S, D)`` quantized latents; gradients reach ``z`` through the quantizer's estimator.
        indices: ``(B, *S, G)`` int64, ``-1`` where the mask dropped a position.
        losses: unweighted scalar tensors by name.
        statistics: detached tensors. ``counts`` is int64 of length ``sum(codebook_sizes)``: how often each code was
            used in this call, the sub-codes one after another.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(Configurable):
    """Base class of all quantizers.

    A subclass sets :attr:`dim` and :attr:`codebook_sizes` and implements the four methods below.

    Attributes:
        dim: D, the size of one latent.
        codebook_sizes: number of codes of each of the G sub-codes.
        default_loss_weights: published weight of every loss that :meth:`forward` returns; a training objective may
            override them.
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    default_loss_weights: Mapping[str, float] = {}

    @property
    def num_subcodes(self) -> int:
        """G, the number of indices that one token carries."""
        return len(self.codebook_sizes)

    @property
    def bits(self) -> float:
        """Bits of one token at a fixed rate: the sum of log2 of the codebook sizes."""
        return float(sum(math.log2(size) for size in self.codebook_sizes))

    @abstractmethod
    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize latents ``(B, *S, D)``; ``mask`` is bool ``(B, *S)``, ``True`` = keep.

        A dropped position gets index ``-1`` and a zero vector, and counts for no loss, gradient or statistic.
        """

    @abstractmethod
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices ``(B, *S, G)`` of latents ``(B, *S, D)``: deterministic, without gradient."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Latents ``(B, *S, D)`` of indices ``(B, *S, G)``, bit-equal to ``forward(z).quantized`` in eval.

        ``-1`` decodes to the zero vector.
        """

    @abstractmethod
    def neighbours(self, indices: Tensor, k: int) -> Tensor:
        """The ``k`` codes nearest to each given code, ``(B, *S, k, G)``, nearest first (the code itself leads)."""

    def commit_update(self) -> None:
        """Apply the state changes that training forward passes have gathered.

        Called once after every optimizer step, on all ranks, so gradient accumulation, a second forward pass or
        activation checkpointing count once.
        """

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
