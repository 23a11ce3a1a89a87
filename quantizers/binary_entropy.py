"""The entropy regulariser of binary codes (MAGVIT-v2, arXiv:2310.05737), exact without listing the codes.

A softmax over all 2^D codes with logits ``2 z.c / temperature`` makes the bits independent: bit d is one with
probability ``sigmoid(4 z_d scale / temperature)``. So

- the entropy of one token is the sum of D binary entropies;
- the mean probability of every code is ``P_a^T P_b / n``, where ``P_a`` and ``P_b`` hold the probabilities of the two
  halves of the bits, ``2^(D/2)`` numbers per token each: one matrix product instead of an ``n x 2^D`` softmax.

Both are exact. Public code lists the ``n x 2^D`` softmax, or a random part of it. Blocks of tokens are recomputed in
the backward pass, so memory is ``block * 2^(D/2) + 2^D``.

Beyond 24 bits the ``2^D`` mean probabilities themselves no longer fit. Groups of bits then have an entropy each; their
sum bounds the joint entropy from above (BSQ, arXiv:2406.07548).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import mean_over_ranks
from .operators import operator
from .search import full_precision

MAX_JOINT_BITS = 24  # 2^24 mean probabilities take 64 MB
CPU_BUFFER = 1 << 18  # numbers in one block of half-code probabilities
GPU_BUFFER = 1 << 26


def binary_entropies(
    logits: Tensor,
    keep: Tensor | None = None,
    *,
    group: int | None = None,
    eps: float = 0.0,
    reduce: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean entropy of the tokens' codes, and entropy of the mean over tokens, in nats.

    Args:
        logits: ``(n, D)`` float32 or float64, log-odds of every bit: ``log p(1) - log p(0)``.
        keep: bool ``(n,)``, tokens that count; all if ``None``.
        group: bits whose joint distribution the batch entropy is taken of; all D if ``None``. With groups it is the sum
            of their entropies.
        eps: added to the mean probabilities inside the logarithm (published code: 1e-5 or 1e-8).
        reduce: average over the tokens of all ranks. Values become global; the gradient is this rank's share, such that
            data-parallel averaging yields the gradient of the whole batch.

    Returns:
        Scalars: sample entropy and batch entropy, 0 if no token counts.

    Raises:
        ValueError: if ``group`` does not divide D or is larger than 24.
    """
    group = check_entropy_group(logits.shape[1], group)
    if keep is not None:
        logits = logits.masked_fill(~keep.unsqueeze(1), 0)
    counted = torch.ones_like(logits[:, 0]) if keep is None else keep.to(logits.dtype)  # (n,)
    count = counted.sum()
    share = counted / count.clamp(min=1)
    sample = (bit_entropy(logits).sum(1) * share).sum()
    mean = _mean_patterns(logits, share, group)  # (D / group, 2^group)
    if reduce:
        both = mean_over_ranks(torch.cat([sample.view(1), mean.flatten()]), count)
        sample, mean = both[0], both[1:]
    # A probability that underflows must not meet log(0): its gradient would be infinite, times a zero.
    inside = mean + eps if eps > 0 else mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return sample, -(mean * inside.log()).sum()


def bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of bits with the given log-odds, elementwise."""
    magnitude = logits.abs()  # the entropy is even: in this form no term cancels another
    return F.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)


def check_entropy_group(bits: int, group: int | None) -> int:
    """The size of a group of bits, for ``None`` all of them.

    Raises:
        ValueError: if it does not divide ``bits`` or is larger than 24.
    """
    size = bits if group is None else group
    if size < 1 or bits % size:
        raise ValueError(f"entropy_group must divide the number of bits, {bits}; got {group}")
    if size > MAX_JOINT_BITS:
        raise ValueError(
            f"the joint batch entropy of {size} bits needs 2^{size} probabilities, more than 2^{MAX_JOINT_BITS}: set "
            f"entropy_group to a divisor of {bits} of at most {MAX_JOINT_BITS} bits (BSQ uses 9)"
        )
    return size


# Operators of their own, so that torch.compile sees one call and no loop over blocks.
@operator("mean_bit_patterns")
def _mean_patterns(logits: Tensor, share: Tensor, group: int) -> Tensor:
    """``(n, D)``, ``(n,)`` -> ``(D / group, 2^group)``: weighted sum over tokens of the probability of every pattern.

    The first channel of a group is the least significant bit of its patterns.
    """
    groups, upper, lower = _split(logits.shape[1], group)
    total = logits.new_zeros(groups, 1 << upper, 1 << lower)
    with torch.no_grad(), full_precision(logits.device):
        for rows in _blocks(logits, group):
            block = _grouped(logits[rows], group)  # (G, group, m)
            low, high = block[:, :lower], block[:, lower:]
            total.baddbmm_(_patterns(high, share[rows]), _patterns(low, None).transpose(1, 2))
    return total.view(groups, 1 << group)


@_mean_patterns.register_fake
def _(logits: Tensor, share: Tensor, group: int) -> Tensor:
    return logits.new_empty(logits.shape[1] // group, 1 << group)


@operator("mean_bit_patterns_backward")
def _mean_patterns_backward(grad: Tensor, logits: Tensor, share: Tensor, group: int) -> Tensor:
    groups, upper, lower = _split(logits.shape[1], group)
    grad = grad.reshape(groups, 1 << upper, 1 << lower)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with torch.no_grad(), full_precision(logits.device):
        for rows in _blocks(logits, group):
            block = _grouped(logits[rows], group)  # (G, group, m)
            low, high = block[:, :lower], block[:, lower:]
            of_low, of_high = _patterns(low, None), _patterns(high, share[rows])
            grad_high = torch.bmm(grad, of_low)  # (G, 2^upper, m)
            grad_low = torch.bmm(grad.transpose(1, 2), of_high)  # (G, 2^lower, m)
            both = torch.cat([_to_logits(low, of_low, grad_low), _to_logits(high, of_high, grad_high)], 1)
            result[rows] = both.view(groups * group, -1).T
    return result


@_mean_patterns_backward.register_fake
def _(grad: Tensor, logits: Tensor, share: Tensor, group: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    logits, share, ctx.group = inputs
    ctx.save_for_backward(logits, share)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _mean_patterns_backward(grad, *ctx.saved_tensors, ctx.group), None, None


_mean_patterns.register_autograd(_backward, setup_context=_setup_context)


def _split(bits: int, group: int) -> tuple[int, int, int]:
    """Number of groups, and of the upper and the lower bits of one group."""
    return bits // group, group // 2, group - group // 2


def _blocks(logits: Tensor, group: int) -> list[slice]:
    tokens, bits = logits.shape
    buffer = CPU_BUFFER if logits.device.type == "cpu" else GPU_BUFFER
    rows = max(1, min(tokens, max(256, buffer // ((bits // group) << (group - group // 2)))))
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _grouped(logits: Tensor, group: int) -> Tensor:
    """``(m, D)`` -> contiguous ``(D / group, group, m)``: products over tokens then run along memory."""
    return logits.T.contiguous().view(-1, group, len(logits))


def _patterns(logits: Tensor, share: Tensor | None) -> Tensor:
    """``(G, h, m)`` -> ``(G, 2^h, m)``: probability of every pattern of h independent bits, times ``share``."""
    groups, bits, tokens = logits.shape
    on, off = torch.sigmoid(logits), torch.sigmoid(-logits)
    table = logits.new_empty(groups, 1 << bits, tokens)
    table[:, 0] = 1 if share is None else share
    for bit in range(bits):
        size = 1 << bit
        torch.mul(table[:, :size], on[:, bit : bit + 1], out=table[:, size : 2 * size])
        table[:, :size] *= off[:, bit : bit + 1]
    return table


def _to_logits(logits: Tensor, table: Tensor, grad: Tensor) -> Tensor:
    """Gradient ``(G, h, m)`` of what :func:`_patterns` made, folded bit by bit; overwrites ``table`` and ``grad``.

    The probabilities of the other bits come back as the sum over the two values of one bit, so nothing cancels where
    a bit is almost certain.
    """
    on, off = torch.sigmoid(logits), torch.sigmoid(-logits)
    result = torch.empty_like(logits)
    for bit in reversed(range(logits.shape[1])):
        size = 1 << bit
        zero, one = table[:, :size], table[:, size : 2 * size]
        grad_zero, grad_one = grad[:, :size], grad[:, size : 2 * size]
        zero += one
        grad_one -= grad_zero
        result[:, bit] = torch.mul(zero, grad_one, out=one).sum(1)
        grad_zero.addcmul_(grad_one, on[:, bit : bit + 1].expand_as(grad_one))
    return result.mul_(on).mul_(off)
