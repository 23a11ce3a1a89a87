"""Entropy regularisation of soft assignments (LFQ, arXiv:2310.05737), for any codebook.

With ``p_n`` the softmax over the codes for token ``n``, the loss is the mean entropy of ``p_n`` (tokens should be
certain of their code) minus the entropy of the mean of ``p_n`` (all codes should be in use). The mean probabilities are
taken over all tokens of all ranks: the entropy of a mean over N certain tokens is at most log N, so per rank it would
saturate at the local batch size.

Values and gradients are exact, in blocks of rows: no N x K tensor lives through the step. IBQ, FQGAN and
GigaTok add 1e-5 inside the logarithm of the mean probabilities, UniTok nothing; here that is ``eps``. It biases the
value once K is large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .distributed import mean_over_ranks
from .operators import operator
from .search import full_precision
from .softmax import finite_rows, logit_blocks


def codebook_entropy(
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    temperature: float,
    keep: Tensor | None = None,
    *,
    reduce: bool,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean entropy and entropy of the mean of ``softmax((latents @ codebook.T + bias) / temperature)``, in nats.

    Args:
        latents: ``(n, D)``, float32 or float64.
        codebook: ``(K, D)`` in the same dtype.
        bias: ``(K,)`` added to the inner products, or ``None``: ``-|e|^2`` and latents times two make them distances.
        temperature: positive.
        keep: bool ``(n,)``, rows to count; all if ``None``.
        reduce: average over the tokens of all ranks; pass ``self.training``. Without gradients it never happens.
        eps: added to the mean probabilities inside the logarithm; 0 is exact, much published code has 1e-5.

    Returns:
        Sample entropy and batch entropy, scalars with gradients to ``latents``, ``codebook`` and ``bias``; zero if no
        row is kept. A kept row whose squared length is not finite makes the sample entropy NaN, but gets no gradient,
        gives none, and does not count for the mean probabilities.
    """
    finite = finite_rows(latents)
    counted = finite if keep is None else finite & keep
    number = counted.sum().to(latents.dtype)
    bias = latents.new_zeros(len(codebook)) if bias is None else bias
    sample, mean = _mean_entropy(
        latents.masked_fill(~counted.unsqueeze(1), 0),
        codebook,
        bias,
        counted.to(latents.dtype) / number.clamp(min=1),
        float(temperature),
    )
    broken = ~finite if keep is None else ~finite & keep
    sample = sample + sample.new_zeros(()).masked_fill(broken.any(), torch.nan)  # the gradient of the others stays
    if reduce and torch.is_grad_enabled():
        both = mean_over_ranks(torch.cat([sample.unsqueeze(0), mean]), number)
        sample, mean = both[0], both[1:]
    return sample, entropy(mean, eps)


def entropy(probabilities: Tensor, eps: float = 0.0) -> Tensor:
    """``-sum(p log(p + eps))`` in nats, with a finite gradient also where a probability is zero."""
    smallest = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * (probabilities + eps).clamp(min=smallest).log()).sum()


@operator("mean_entropy")
def _mean_entropy(
    latents: Tensor, codebook: Tensor, bias: Tensor, weight: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), full_precision(latents.device):
        latents, bias = latents / temperature, bias / temperature
        sample, mean = latents.new_zeros(()), torch.zeros_like(bias)
        for block, first, second in logit_blocks(latents, len(codebook)):
            log_p = torch.log_softmax(torch.addmm(bias, latents[block], codebook.T, out=first), 1, out=second)  # (r, K)
            p = torch.exp(log_p, out=first)
            sample.sub_(torch.linalg.vecdot(p, log_p) @ weight[block])
            mean.add_(weight[block] @ p)
        return sample, mean


@_mean_entropy.register_fake
def _(latents: Tensor, codebook: Tensor, bias: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return latents.new_empty(()), torch.empty_like(bias)


@operator("mean_entropy_backward")
def _mean_entropy_backward(
    to_sample: Tensor,
    to_mean: Tensor,
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor,
    weight: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad(), full_precision(latents.device):
        scaled, bias = latents / temperature, bias / temperature
        to_latents, to_codebook, to_bias = torch.empty_like(latents), torch.zeros_like(codebook), torch.zeros_like(bias)
        for block, first, second in logit_blocks(latents, len(codebook)):
            x, w = scaled[block], weight[block].unsqueeze(1)  # (r, D), (r, 1)
            log_p = torch.log_softmax(torch.addmm(bias, x, codebook.T, out=first), 1, out=second)  # (r, K)
            p = torch.exp(log_p, out=first)
            # d/d logit_k = w p_k (s_k - sum_j p_j s_j) with s the gradient of the probabilities.
            to_p = log_p.mul_(-to_sample).add_(to_mean)
            to_p.sub_(torch.linalg.vecdot(p, to_p).unsqueeze(1)).mul_(p)
            to_latents[block] = (to_p @ codebook).mul_(w)
            to_codebook.addmm_(to_p.T, x * w)
            to_bias.add_(weight[block] @ to_p)
        return to_latents.div_(temperature), to_codebook, to_bias.div_(temperature)


@_mean_entropy_backward.register_fake
def _(
    to_sample: Tensor,
    to_mean: Tensor,
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor,
    weight: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(latents), torch.empty_like(codebook), torch.empty_like(bias)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, to_sample: Tensor, to_mean: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    found = _mean_entropy_backward(to_sample, to_mean, *ctx.saved_tensors, ctx.temperature)
    return *found, None, None


_mean_entropy.register_autograd(_gradients, setup_context=_keep_inputs)
