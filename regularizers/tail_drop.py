"""Tail token drop (One-D-Piece, arXiv:2501.10064): train on prefixes, so that a sequence may end anywhere.

The number k of tokens that stay is uniform over 1 .. N. What early tokens carry then serves every length, and the
information of an image gathers at the front of its sequence. The drop comes after the quantizer: codes and quantizer
losses are those of the full sequence.

The original draws one k for the batch of a device. That keeps the sequence dense, so the dropped tokens cost nothing
in the decoder; a k for every sample estimates the same loss with less noise, at the cost of the full sequence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .base import Regularizer


class TailTokenDrop(Regularizer):
    """Keeps the first k tokens, k uniform over ``min_tokens`` .. N.

    Args:
        per: ``"batch"``: one k, drawn on the host, and the sequence is cut to k tokens; every decoder that takes
            shorter sequences will do. ``"sample"``: a k for every sample, drawn on the device, and a mask; the decoder
            must take masks.
        min_tokens: the smallest k.
        multiple_of: round k up to a multiple of this (or to N): fewer different lengths, so fewer compilations.

    Raises:
        ValueError: for an unknown ``per``, or numbers below 1.
    """

    def __init__(self, per: Literal["sample", "batch"] = "sample", min_tokens: int = 1, multiple_of: int = 1) -> None:
        super().__init__()
        if per not in ("sample", "batch"):
            raise ValueError(f"per must be 'sample' or 'batch'; got {per!r}")
        if min_tokens < 1 or multiple_of < 1:
            raise ValueError(f"min_tokens and multiple_of must be at least 1; got {min_tokens} and {multiple_of}")
        self.per = per
        self.min_tokens = min_tokens
        self.multiple_of = multiple_of

    def forward(self, quantized: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Regularizer.forward`.

        Raises:
            ValueError: for a sequence shorter than ``min_tokens``.
        """
        batch, length = quantized.shape[:2]
        if length < self.min_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, but the sequence has only {length} tokens")
        if self.per == "batch":
            kept = int(self._lengths((), length, torch.device("cpu")))  # a number of the host: nothing waits
            return quantized[:, :kept], None if mask is None else mask[:, :kept]
        lengths = self._lengths((batch, 1), length, quantized.device)
        keep = torch.arange(length, device=quantized.device) < lengths  # (B, N)
        return quantized, keep if mask is None else keep & mask

    def _lengths(self, shape: tuple[int, ...], length: int, device: torch.device) -> Tensor:
        drawn = torch.randint(self.min_tokens, length + 1, shape, device=device)
        return (drawn + self.multiple_of - 1) // self.multiple_of * self.multiple_of  # more than N keeps all
