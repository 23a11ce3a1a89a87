"""Nearest-code search as one Triton kernel.

A program keeps a block of tokens and streams the codes past it: scores by ``tl.dot``, and for every column of the tile
the best score so far with its index. The columns are compared once, at the end. Nothing of size N x K is written. Where
there are few tokens, the codes are divided among several programs.

Scores are float32 to the last bit (``input_precision="ieee"``): tensor-core products of reduced precision choose other
codes. Every score is summed in the same order whatever the sizes of the blocks, so the result does not depend on them.

:mod:`.search` imports this module when the search runs on a GPU; without Triton it imports, but cannot search.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PROGRAMS = 1024  # enough to fill a GPU; with fewer blocks of tokens the codes are split
MIN_SPLIT = 4096  # codes; a smaller share is not worth a program


if triton is not None:

    @triton.jit
    def _scores_kernel(
        latents,
        codes,
        bias,
        values,
        indices,
        num_tokens,
        num_codes,
        codes_per_split,
        dim: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        start = tl.program_id(1) * codes_per_split
        stop = tl.minimum(start + codes_per_split, num_codes)
        channels = tl.arange(0, BLOCK_D)
        kept = (tokens < num_tokens)[:, None]
        token_rows = latents + tokens[:, None] * dim
        if dim <= BLOCK_D:  # the tokens stay in registers
            own = tl.load(token_rows + channels[None, :], mask=kept & (channels < dim)[None, :], other=0.0)
        best = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
        chosen = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
        for first in range(start, stop, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            valid = columns < stop
            code_rows = codes + columns[None, :] * dim
            scores = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for channel in range(0, dim, BLOCK_D):
                part = channel + channels
                if dim > BLOCK_D:
                    own = tl.load(token_rows + part[None, :], mask=kept & (part < dim)[None, :], other=0.0)
                block = tl.load(code_rows + part[:, None], mask=valid[None, :] & (part < dim)[:, None], other=0.0)
                scores = tl.dot(own, block, scores, input_precision="ieee")
            scores += tl.load(bias + columns, mask=valid, other=float("-inf"))[None, :]
            better = scores > best  # strict: the first of equal scores stays; NaN never wins
            best = tl.where(better, scores, best)
            chosen = tl.where(better, columns[None, :], chosen)
        value = tl.max(best, 1)
        index = tl.min(tl.where(best == value[:, None], chosen, num_codes - 1), 1)
        place = tl.program_id(1).to(tl.int64) * num_tokens + tokens
        tl.store(values + place, value, mask=tokens < num_tokens)
        tl.store(indices + place, index, mask=tokens < num_tokens)


def best_scores(latents: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """``argmax_k latents.codes_k + bias_k``, the lowest index at equal scores.

    Args:
        latents: ``(N, D)`` float32.
        codes: ``(K, D)`` float32.
        bias: ``(K,)`` float32.

    Returns:
        ``(N,)`` int64.

    Raises:
        ImportError: without Triton.
        TypeError: for another dtype.
    """
    if triton is None:
        raise ImportError('search.BACKEND is "triton", but Triton is not installed: pip install triton, or use "auto"')
    if latents.dtype != torch.float32 or codes.dtype != torch.float32:
        raise TypeError(f"the Triton search takes float32; got {latents.dtype} and {codes.dtype}")
    (num_tokens, dim), num_codes = latents.shape, len(codes)
    if not num_tokens:
        return torch.zeros(0, dtype=torch.int64, device=latents.device)
    sizes = block_sizes(dim)
    token_blocks = triton.cdiv(num_tokens, sizes["BLOCK_N"])
    splits = max(1, min(PROGRAMS // token_blocks, num_codes // MIN_SPLIT))
    codes_per_split = triton.cdiv(triton.cdiv(num_codes, splits), sizes["BLOCK_K"]) * sizes["BLOCK_K"]
    splits = triton.cdiv(num_codes, codes_per_split)
    values = latents.new_empty(splits, num_tokens)
    indices = torch.empty(splits, num_tokens, dtype=torch.int32, device=latents.device)
    with torch.cuda.device_of(latents):
        _scores_kernel[(token_blocks, splits)](
            latents.contiguous(),
            codes.contiguous(),
            bias.contiguous(),
            values,
            indices,
            num_tokens,
            num_codes,
            codes_per_split,
            dim,
            **sizes,
        )
    # The first of equal maxima: splits are in the order of the codes.
    return indices.gather(0, values.argmax(0, keepdim=True))[0].to(torch.int64)


def block_sizes(dim: int) -> dict[str, int]:
    """Tile of a program, as large as its registers hold; above 64 channels the tokens are read again, 32 at a time."""
    block_d = max(16, triton.next_power_of_2(dim)) if dim <= 64 else 32
    return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": block_d, "num_warps": 4 if dim <= 32 else 8, "num_stages": 2}
