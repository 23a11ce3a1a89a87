"""Nearest-code search in blocks.

``argmin_k |z - e_k|^2`` equals ``argmax_k z.e_k - |e_k|^2 / 2``; the search runs over blocks of tokens and codes with
one small buffer and a running maximum, so memory never grows with N x K. It computes in float32 (float64 for float64
latents) whatever the autocast or the TF32 setting: in bfloat16 several per cent of the indices come out wrong.

The lowest index wins a tie. Matrix products give no such promise: they may round two equal codes differently, by where
these stand in the block. So the torch version looks up the lowest index that holds the code it found.

On a GPU with Triton, float32 latents of up to :data:`TRITON_DIM` channels go to one fused kernel
(:mod:`.search_triton`); :data:`BACKEND` forces either version.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .operators import operator

BACKEND = "auto"  # or "torch", "triton": use that one wherever the search runs
CODE_BLOCK = 8192
CODE_CHUNK = 64  # codes whose maximum is taken first; only the best chunk of a token is looked at again
CPU_BUFFER = 1 << 19  # elements for each thread: 2 MB of float32 stay in a core's cache
GPU_BUFFER = 1 << 26
TRITON_DIM = 256  # a wider latent makes the search a plain matrix product


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
@operator("nearest_codes")
def _nearest_codes(z: Tensor, codebook: Tensor, buffer_elements: int) -> Tensor:
    dtype = search_dtype(z)
    with torch.no_grad(), full_precision(z.device):
        centre = _centre(codebook, dtype)
        latents = z.to(dtype) - centre  # (N, D)

        def part(first: int, last: int) -> tuple[Tensor, Tensor]:
            codes = codebook[first:last].to(dtype) - centre  # (k, D)
            return codes, codes.square().sum(1).mul_(-0.5)

        if _use_triton(latents, len(codebook)):
            return _triton_search(latents, *part(0, len(codebook)))
        found = _search(latents, len(codebook), part, buffer_elements)
        return _lowest_equal(found, _row_keys(codebook), codebook)


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
    if _use_triton(latents, len(codes)):
        return _triton_search(latents, codes, bias)
    found = _search(latents, len(codes), lambda first, last: (codes[first:last], bias[first:last]), buffer_elements)
    # Codes with different biases are different: a second round of mixing keeps their keys apart.
    keys = _mixed(_row_keys(codes)) + _row_keys(bias.unsqueeze(1))
    return _lowest_equal(found, keys, codes, bias)


def _centre(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """``(D,)`` roughly the mean of the codes: distances do not change when both sides move by it.

    Centred, a common offset cannot eat the precision. The mean is rounded to an eighth of the power of two below the
    spread of the codes, so that codes and latents on a grid stay on it and a tie between them stays a tie.
    """
    mean = codebook.mean(0, dtype=dtype)  # (D,)
    lowest, highest = codebook.aminmax(dim=0)
    spread = torch.maximum(highest.to(dtype) - mean, mean - lowest.to(dtype)).max()
    step = spread / spread.frexp().mantissa / 16
    return torch.where(step > 0, (mean / step).round() * step, mean)


def _search(
    latents: Tensor, num_codes: int, part: Callable[[int, int], tuple[Tensor, Tensor]], buffer_elements: int
) -> Tensor:
    """``(N,)`` best indices over codes and biases that ``part(first, last)`` makes when they are needed."""
    if not buffer_elements:
        on_cpu = latents.device.type == "cpu"
        buffer_elements = CPU_BUFFER * torch.get_num_threads() if on_cpu else GPU_BUFFER
    # The bias rides along as one more channel: adding it would be a second pass over the scores.
    latents = torch.cat([latents, latents.new_ones(len(latents), 1)], 1)  # (N, D + 1)
    blocks = -(-num_codes // CODE_BLOCK)
    chunk = min(CODE_CHUNK, num_codes)
    height = -(-num_codes // (blocks * chunk)) * chunk  # blocks of about the same size, in whole chunks
    token_block = max(1, min(len(latents), buffer_elements // height))
    scores = latents.new_empty(height * token_block)
    block = latents.new_empty(height, latents.shape[1])
    best = latents.new_full((len(latents),), -torch.inf)
    indices = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    for first in range(0, num_codes, height):
        codes, bias = part(first, min(first + height, num_codes))
        block[: len(codes), :-1], block[: len(codes), -1] = codes, bias
        filled = -(-len(codes) // chunk) * chunk
        block[len(codes) : filled, :-1], block[len(codes) : filled, -1] = 0, -torch.inf  # they never win
        for start in range(0, len(latents), token_block):
            tokens = slice(start, start + token_block)
            value, index = _best_of_block(block[:filled], latents[tokens], chunk, scores)
            better = value > best[tokens]  # strict: an equal score of an earlier block stays; NaN never wins
            torch.where(better, value, best[tokens], out=best[tokens])
            torch.where(better, index + first, indices[tokens], out=indices[tokens])
    return indices


def _best_of_block(codes: Tensor, latents: Tensor, chunk: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Highest score and its index, each ``(n,)``: first the best chunk of codes, then the best code in it.

    Maxima without their place, over rows of tokens, are what a processor does fast.
    """
    count = len(latents)
    scores = scores[: len(codes) * count].view(len(codes), count)  # (k, n)
    torch.mm(codes, latents.T, out=scores)
    scores = scores.view(-1, chunk, count)  # (c, chunk, n)
    value, place = scores.amax(1).max(0)  # (n,)
    candidates = scores[place, :, torch.arange(count, device=scores.device)]  # (n, chunk)
    return value, candidates.argmax(1).add_(place, alpha=chunk)


def _lowest_equal(found: Tensor, keys: Tensor, *tables: Tensor) -> Tensor:
    """The lowest index whose rows in all tables equal those of each index found, ``(N,)``.

    Args:
        found: ``(N,)`` int64.
        keys: ``(K,)`` int64, equal for equal rows; rows that differ are told apart even where their keys are equal.
        tables: ``(K, ...)``.
    """
    ordered, order = keys.sort(stable=True)
    lowest = order[torch.searchsorted(ordered, keys[found])]  # the leftmost of equal keys
    for table in tables:
        same = table[lowest] == table[found]
        lowest = torch.where(same if same.ndim == 1 else same.all(1), lowest, found)
    return lowest


def _row_keys(rows: Tensor) -> Tensor:
    """``(K,)`` int64, a hash of the numbers in each row of ``(K, D)``, in exact arithmetic (integers wrap around)."""
    multipliers = _mixed(torch.arange(1, rows.shape[1] + 1, device=rows.device)) | 1  # (D,)
    keys = []
    for block in rows.split(CODE_BLOCK):
        block = block.to(search_dtype(block)).contiguous() + 0.0  # -0 becomes 0
        bits = block.view(torch.int64 if block.dtype == torch.float64 else torch.int32)
        keys.append((bits.to(torch.int64) * multipliers).sum(1))
    return torch.cat(keys)


def _mixed(values: Tensor) -> Tensor:
    """Scrambled int64 (two rounds of multiply and shift, as in splitmix64)."""
    values = values * -0x61C8864680B583EB
    values = (values ^ (values >> 30)) * -0x40A7B892E31B1A47
    return values ^ (values >> 27)


def _triton_search(latents: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    from . import search_triton

    return search_triton.best_scores(latents, codes, bias)


def _use_triton(latents: Tensor, num_codes: int) -> bool:
    if BACKEND != "auto":
        return BACKEND == "triton"
    tokens, dim = latents.shape
    fits = dim <= TRITON_DIM and dim * max(tokens, num_codes) < 2**31  # it counts in 32 bits
    return fits and latents.is_cuda and latents.dtype == torch.float32 and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
