"""Codes whose gradient is that of a soft assignment: index backpropagation (IBQ, arXiv:2412.02692).

Forward the code that was chosen, backward ``onehot - sg(p) + p`` times the codebook with ``p`` the softmax over all
codes. Unlike straight-through, every code gets a gradient from every token, so large codebooks stay in use, and the
latents get theirs through ``p`` alone.

Written out, that takes several N x K tensors. The gradient has a closed form, so nothing but the inputs is kept: the
backward pass computes the probabilities again, some rows at a time. The value is the code itself, where the original's
sum of three terms rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .operators import operator
from .search import best_scores, full_precision

# Logits held at a time. Blocks are whole rows, never parts of one: the sum of a softmax is there at once, and no
# product is computed twice.
CPU_BLOCK = 1 << 20  # small enough for a cache,
CPU_ROWS = 16  # but a codebook is not read for fewer rows than this
CPU_LIMIT = 1 << 23  # as long as the block stays below this
GPU_BLOCK = 1 << 25


def softmax_codes(
    latents: Tensor, codebook: Tensor, bias: Tensor | None, indices: Tensor, temperature: float = 1.0
) -> Tensor:
    """``codebook[indices]``, with the gradient of ``softmax((latents @ codebook.T + bias) / temperature) @ codebook``.

    The codebook also gets the gradient of the lookup, so its gradient is that of ``onehot - sg(p) + p`` times the
    codebook. Memory grows with N D + K D; a block of logits is at least one row of K.

    Args:
        latents: ``(n, D)``, float32 or float64. A row whose squared length is not finite gets no gradient and gives
            none.
        codebook: ``(K, D)`` in the same dtype.
        bias: ``(K,)`` added to the inner products, or ``None``: ``-|e|^2`` and latents times two make them distances.
        indices: ``(n,)`` int64, the chosen codes.
        temperature: positive.

    Returns:
        ``(n, D)``, bit-equal to ``codebook[indices]``.
    """
    finite = finite_rows(latents).unsqueeze(1)  # (n, 1)
    bias = latents.new_zeros(len(codebook)) if bias is None else bias
    codes = _softmax_codes(latents.masked_fill(~finite, 0), codebook, bias, indices, float(temperature))
    return torch.where(finite, codes, codes.detach())


def likeliest_codes(latents: Tensor, codebook: Tensor, bias: Tensor | None = None) -> Tensor:
    """``argmax_k latents.e_k + bias_k`` as int64 ``(n,)``, the lowest index at equal logits, without gradient.

    Args:
        latents: ``(n, D)``, float32 or float64. A row that is not finite gets some valid index.
        codebook: ``(K, D)`` in the same dtype.
        bias: ``(K,)`` or ``None``.
    """
    bias = latents.new_zeros(len(codebook)) if bias is None else bias
    return _likeliest_codes(latents.detach(), codebook.detach(), bias.detach())


def finite_rows(latents: Tensor) -> Tensor:
    """``(n,)`` bool: rows of ``(n, D)`` whose squared length is finite, so that no product with a code overflows."""
    return latents.detach().square().sum(1).isfinite()


def logit_blocks(latents: Tensor, codes: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the rows of ``(n, D)`` with two blocks of memory ``(r, codes)`` to work in, the same ones every time.

    Always whole rows of logits, so that a softmax needs one pass.
    """
    if latents.device.type == "cpu":
        size = max(CPU_BLOCK // codes, min(CPU_ROWS, CPU_LIMIT // codes), 1)
    else:
        size = max(GPU_BLOCK // codes, 1)
    first, second = latents.new_empty(2, min(size, len(latents)), codes)
    for start in range(0, len(latents), size):
        rows = min(size, len(latents) - start)
        yield slice(start, start + rows), first[:rows], second[:rows]


@operator("likeliest_codes")
def _likeliest_codes(latents: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad(), full_precision(latents.device):
        return best_scores(latents, codebook, bias)


@_likeliest_codes.register_fake
def _(latents: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


@operator("softmax_codes")
def _softmax_codes(latents: Tensor, codebook: Tensor, bias: Tensor, indices: Tensor, temperature: float) -> Tensor:
    return codebook[indices]


@_softmax_codes.register_fake
def _(latents: Tensor, codebook: Tensor, bias: Tensor, indices: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(latents)


@operator("softmax_codes_backward")
def _softmax_codes_backward(
    grad: Tensor, latents: Tensor, codebook: Tensor, bias: Tensor, indices: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad(), full_precision(latents.device):
        scaled, bias = latents / temperature, bias / temperature
        to_latents = torch.empty_like(latents)
        to_codebook = torch.zeros_like(codebook).index_add_(0, indices, grad)
        to_bias = torch.zeros_like(bias)
        for block, first, second in logit_blocks(latents, len(codebook)):
            x, g = scaled[block], grad[block]  # (r, D)
            p = torch.softmax(torch.addmm(bias, x, codebook.T, out=first), 1, out=second)  # (r, K)
            # Gradient of the probabilities, s = g E^T; that of the logits is p (s - sum_k p_k s_k).
            to_logits = torch.mm(g, codebook.T, out=first)  # (r, K)
            to_logits.sub_(torch.linalg.vecdot(p, to_logits).unsqueeze(1)).mul_(p)
            torch.mm(to_logits, codebook, out=to_latents[block])
            to_codebook.addmm_(to_logits.T, x)
            to_bias.add_(to_logits.sum(0))
        return to_latents.div_(temperature), to_codebook, to_bias.div_(temperature)


@_softmax_codes_backward.register_fake
def _(
    grad: Tensor, latents: Tensor, codebook: Tensor, bias: Tensor, indices: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(latents), torch.empty_like(codebook), torch.empty_like(bias)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    found = _softmax_codes_backward(grad.contiguous(), *ctx.saved_tensors, ctx.temperature)
    return *found, None, None


_softmax_codes.register_autograd(_gradients, setup_context=_keep_inputs)
