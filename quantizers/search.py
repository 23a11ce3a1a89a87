"""Nearest-code search in blocks.

``argmin_k |z - e_k|^2`` equals ``argmax_k z.e_k - |e_k|^2 / 2``; the search runs over blocks of tokens and codes with
one small buffer and a running maximum, so memory never grows with N x K. It computes in float32 (float64 for float64
latents) whatever the autocast or the TF32 setting: in bfloat16 several per cent of the indices come out wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CODE_BLOCK = 8192
CPU_BUFFER = 1 << 19  # elements: 2 MB of float32 stay in a core's cache
GPU_BUFFER = 1 << 26


def search_dtype(z: Tensor) -> torch.dtype:
    """The dtype that quantizers compute in: float64 stays, everything else becomes float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and reduced-precision float32 matrix products off (inside an operator: it cannot be traced)."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def nearest_codes(z: Tensor, codebook: Tensor, *, buffer_elements: int | None = None) -> Tensor:
    """Index of the code nearest to each latent in squared Euclidean distance; the lowest index wins a tie.

    Args:
        z: ``(N, D)`` latents. A latent that is not finite gets some valid index.
        codebook: ``(K, D)`` codes.
        buffer_elements: size of the block of scores held at a time; chosen by device if ``None``.

    Returns:
        ``(N,)`` int64, without gradient.
    """
    return _nearest_codes(z.detach(), codebook.detach(), buffer_elements or 0)


# An operator of its own, so that torch.compile sees one call and no loop over blocks.
@torch.library.custom_op("vistok::nearest_codes", mutates_args=())
def _nearest_codes(z: Tensor, codebook: Tensor, buffer_elements: int) -> Tensor:
    dtype = search_dtype(z)
    with torch.no_grad(), full_precision(z.device):
        codebook = codebook.to(dtype)
        # Distances do not change when both sides move; centred, a common offset cannot eat the precision.
        centre = codebook.mean(0)
        codes = codebook - centre  # (K, D)
        latents = z.to(dtype) - centre  # (N, D)
        bias = codes.square().sum(1).mul_(-0.5)  # (K,)
        return best_scores(latents, codes, bias, buffer_elements)


@_nearest_codes.register_fake
def _(z: Tensor, codebook: Tensor, buffer_elements: int) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def best_scores(latents: Tensor, codes: Tensor, bias: Tensor, buffer_elements: int = 0) -> Tensor:
    """``argmax_k latents.codes_k + bias_k`` in blocks, the lowest index at equal scores.

    Args:
        latents: ``(N, D)``.
        codes: ``(K, D)`` in the same dtype.
        bias: ``(K,)``.
        buffer_elements: size of the block of scores; chosen by device if 0.

    Returns:
        ``(N,)`` int64.
    """
    if not buffer_elements:
        buffer_elements = CPU_BUFFER if latents.device.type == "cpu" else GPU_BUFFER
    code_block = min(CODE_BLOCK, len(codes))
    token_block = max(1, min(len(latents), buffer_elements // code_block))
    buffer = torch.empty(token_block * code_block, dtype=latents.dtype, device=latents.device)
    indices = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    for start in range(0, len(latents), token_block):
        block = latents[start : start + token_block]  # (n, D)
        best = torch.full((len(block),), -torch.inf, dtype=latents.dtype, device=latents.device)
        chosen = indices[start : start + token_block]
        for first in range(0, len(codes), code_block):
            part = codes[first : first + code_block]  # (k, D)
            scores = buffer[: len(block) * len(part)].view(len(block), len(part))
            torch.addmm(bias[first : first + code_block], block, part.T, out=scores)
            value, index = scores.max(1)
            better = value > best  # strict: an equal score of an earlier block stays
            torch.where(better, value, best, out=best)
            torch.where(better, index + first, chosen, out=chosen)
    return indices
