"""The regularizer contract: what happens to tokens between quantizer and decoder, in training only.

A regularizer sees the quantized latents of a batch and returns them changed: some tokens dropped, replaced or
perturbed. It stands after the quantizer, so codes and quantizer losses are those of the full sequence.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..layers.configurable import Configurable


class Regularizer(Configurable):
    """Base class of token regularizers."""

    @abstractmethod
    def forward(self, quantized: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Quantized latents for the decoder, and which of them it may see.

        Args:
            quantized: ``(B, N, D)`` quantized latents.
            indices: ``(B, N, G)`` their codes.
            mask: ``(B, N)`` bool, ``True`` = keep, or ``None`` if every token is kept.

        Returns:
            ``(B, N', D)`` with ``N' <= N``, and a mask ``(B, N')`` or ``None``.
        """
