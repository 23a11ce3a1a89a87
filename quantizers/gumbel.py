"""Gumbel-softmax quantization (arXiv:1611.01144), as in the discrete VAEs of DALL-E (arXiv:2102.12092) and taming.

A linear layer gives every code a logit, training draws a code from their softmax, and the gradient is that of the
softmax of the noisy logits at a temperature that falls over the training (DALL-E's cosine from 1 to 1/16 in 150 000
steps). A loss ``kl`` keeps the probabilities close to uniform. Evaluation takes the largest logit without noise;
published code draws there too, so that the same image gives different tokens each time.

The draw, its gradient and the divergence work on some rows of logits at a time. The noise has to be the same in the
forward and the backward pass: it is a hash of two random numbers, the row and the code, and so computed again instead
of remembered. No N x K tensor exists; the price is one more product of latents and logit weights in the backward pass
and, as the divergence is computed by itself, one more in each direction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import count_codes, drop, drop_indices, token_rows
from .codebook import CodebookQuantizer
from .draws import draw_integers
from .entropy import codebook_entropy
from .estimators import straight_through
from .ibq import SoftlyQuantized
from .operators import operator
from .search import full_precision, search_dtype
from .softmax import finite_rows, likeliest_codes, logit_blocks

WORD = 0x7FFFFFFF  # numbers of the hash are 31 bits, so that shifting int32 to the right brings in no sign
MIX = ((16, 0x21F0AAAD), (15, 0x735A2D97))  # (shift, odd factor) of a round (low-bias constants of C. Wellons' search)
ROW_STEP, CODE_STEP = 0x2C1B3C6D, 0x1E3779B9  # odd: every row, and every code, starts at another number


class GumbelQuantizer(CodebookQuantizer):
    """Draws a code from the softmax of learned logits in training, takes the likeliest in evaluation.

    Args:
        codebook_size: K, the number of codes.
        dim: D, the size of a latent and of a code.
        temperature: of the softmax that carries the gradient, at the first step.
        final_temperature: the same after ``anneal_steps``.
        anneal_steps: optimizer steps of the cosine from one to the other; 0 keeps ``temperature``.
        straight_through: return the drawn code; else, in training, the mixture of all codes by the noisy softmax.
            Evaluation always returns the code.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, 1)``.

    Raises:
        ValueError: for sizes or temperatures that are not positive.
    """

    default_loss_weights = {"kl": 5e-4}

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        temperature: float = 1.0,
        final_temperature: float = 0.0625,
        anneal_steps: int = 150_000,
        straight_through: bool = True,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size and dim must be positive; got {codebook_size} and {dim}")
        if not (temperature > 0 and final_temperature > 0):
            raise ValueError(
                f"temperature and final_temperature must be positive (at 0 there is no gradient); "
                f"got {temperature} and {final_temperature}"
            )
        if anneal_steps < 0:
            raise ValueError(f"anneal_steps must be at least 0; got {anneal_steps}")
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.anneal_steps = anneal_steps
        self.straight_through = straight_through
        self.logits = nn.Linear(dim, codebook_size)
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._trained = False  # whether there was a training forward pass since the last optimizer step

    def assign(
        self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> SoftlyQuantized:
        latents = self.latents_of(z)  # (n, D)
        finite = finite_rows(latents)
        weight, bias = self._logit_weights(latents.dtype)
        codebook = self.codebook.to(latents.dtype)
        clean = latents.masked_fill(~finite.unsqueeze(1), 0)
        temperature = self.current_temperature().to(latents.dtype)
        hard = self.straight_through or not self.training
        if self.training:
            self._trained = self._trained or torch.is_grad_enabled()
            seed = draw_integers(WORD, (2,), z.device, generator)
            found = _gumbel_draw(clean.detach(), weight.detach(), bias.detach(), seed)  # (n,)
        else:
            seed = torch.zeros(0, dtype=torch.int64, device=z.device)  # no noise
            found = likeliest_codes(clean, weight, bias)
        codes = self.codes_of(found)
        codes = torch.where(finite.unsqueeze(1), codes, codes.detach())
        soft = _gumbel_codes(clean, weight, bias, codebook, found, seed, temperature, hard)
        soft = torch.where(finite.unsqueeze(1), soft, soft.detach()).to(codes.dtype)
        estimated = straight_through(soft, codes.detach()) if hard else soft
        keep = None if mask is None else mask.reshape(-1)
        sample_entropy, _ = codebook_entropy(latents, weight, bias, 1.0, keep, reduce=False)
        indices = drop_indices(found.view(*z.shape[:-1], 1), mask)
        statistics = count_codes(indices, self.codebook_sizes, finite) | {"temperature": temperature.detach()}
        kept = finite.any() if keep is None else (finite & keep).any()
        losses = {"kl": (math.log(self.codebook_sizes[0]) - sample_entropy) * kept}
        quantized, latents, estimated = (drop(rows.view(z.shape), mask) for rows in (codes, latents, estimated))
        return SoftlyQuantized(quantized, indices, losses, statistics, latents, estimated=estimated)

    def estimate(self, assigned: SoftlyQuantized) -> Tensor:
        return assigned.estimated

    def latents_of(self, z: Tensor) -> Tensor:
        return token_rows(z)

    def all_codes(self) -> Tensor:
        return self.codebook.to(search_dtype(self.codebook))

    def codes_of(self, flat: Tensor) -> Tensor:
        return F.embedding(flat, self.codebook).to(search_dtype(self.codebook))

    @torch.no_grad()
    def find(self, latents: Tensor) -> Tensor:
        """Indices ``(n,)`` of the codes with the largest logits of rows ``(n, D)``."""
        return likeliest_codes(latents, *self._logit_weights(latents.dtype))

    def current_temperature(self) -> Tensor:
        """Scalar float32: the temperature of this optimizer step."""
        if self.anneal_steps == 0:
            return torch.full((), self.temperature, device=self.step.device)
        progress = (self.step.to(torch.float32) / self.anneal_steps).clamp(max=1)
        remaining = (1 + torch.cos(math.pi * progress)) / 2
        return self.final_temperature + (self.temperature - self.final_temperature) * remaining

    @torch.no_grad()
    def commit_update(self) -> None:
        """Count an optimizer step, if there was a training forward pass."""
        if self._trained:
            self.step.add_(1)
        self._trained = False

    def _logit_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.logits.weight.to(dtype), self.logits.bias.to(dtype)


def gumbel_noise(seed: Tensor, rows: slice, codes: int, dtype: torch.dtype) -> Tensor:
    """Gumbel noise ``(r, codes)`` of some rows: the same numbers for the same seed, however the rows are divided.

    Args:
        seed: int64 ``(2,)`` in [0, 2^31).
        rows: start and stop of the rows.
        codes: K.
        dtype: of the result.
    """
    row = torch.arange(rows.start, rows.stop, device=seed.device, dtype=torch.int32).unsqueeze(1)  # (r, 1)
    code = torch.arange(codes, device=seed.device, dtype=torch.int32)  # (K,)
    first, second = seed.to(torch.int32).unbind()
    one = _mix(_mix(row * ROW_STEP + first))
    two = _mix(_mix(one + second))
    # Two numbers for each row: with one, a row could repeat another's noise, shifted by some codes.
    bits = _mix(_mix(_mix(code * CODE_STEP + one).bitwise_xor_(two)))
    # Exponential numbers from uniform ones that are finest at zero: the smallest become the noise that wins.
    uniform = bits.to(dtype).add_(0.5).mul_(2.0**-31).clamp_(max=1 - torch.finfo(dtype).eps)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(bits: Tensor) -> Tensor:
    """One round of a hash of int32 numbers, as a bijection of 31 bits; products of int32 wrap around."""
    bits = bits & WORD
    for shift, factor in MIX:
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(WORD)
    return bits.bitwise_xor_(bits >> 15)


def _noisy_logits(latents: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, block: slice, out: Tensor) -> Tensor:
    """``(r, K)`` logits of some rows, with their noise if there is a seed."""
    torch.addmm(bias, latents[block], weight.T, out=out)
    return out.add_(gumbel_noise(seed, block, len(weight), out.dtype)) if seed.numel() else out


@operator("gumbel_draw")
def _gumbel_draw(latents: Tensor, weight: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    with torch.no_grad(), full_precision(latents.device):
        for block, first, _ in logit_blocks(latents, len(weight)):
            indices[block] = _noisy_logits(latents, weight, bias, seed, block, first).argmax(1)
    return indices


@_gumbel_draw.register_fake
def _(latents: Tensor, weight: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


@operator("gumbel_codes")
def _gumbel_codes(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor,
    codebook: Tensor,
    indices: Tensor,
    seed: Tensor,
    temperature: Tensor,
    hard: bool,
) -> Tensor:
    if hard:
        return codebook[indices]
    mixtures = latents.new_empty(len(latents), codebook.shape[1])
    with torch.no_grad(), full_precision(latents.device):
        for block, first, second in logit_blocks(latents, len(weight)):
            logits = _noisy_logits(latents, weight, bias, seed, block, first).div_(temperature)
            torch.mm(torch.softmax(logits, 1, out=second), codebook, out=mixtures[block])
    return mixtures


@_gumbel_codes.register_fake
def _(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor,
    codebook: Tensor,
    indices: Tensor,
    seed: Tensor,
    temperature: Tensor,
    hard: bool,
) -> Tensor:
    return latents.new_empty(latents.shape[0], codebook.shape[1])


@operator("gumbel_codes_backward")
def _gumbel_codes_backward(
    grad: Tensor,
    latents: Tensor,
    weight: Tensor,
    bias: Tensor,
    codebook: Tensor,
    indices: Tensor,
    seed: Tensor,
    temperature: Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), full_precision(latents.device):
        to_latents = torch.empty_like(latents)
        to_weight, to_bias, to_codebook = torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(codebook)
        if hard:
            to_codebook.index_add_(0, indices, grad)
        for block, first, second in logit_blocks(latents, len(weight)):
            logits = _noisy_logits(latents, weight, bias, seed, block, first).div_(temperature)
            p = torch.softmax(logits, 1, out=second)  # (r, K)
            if not hard:
                to_codebook.addmm_(p.T, grad[block])
            to_logits = torch.mm(grad[block], codebook.T, out=first)  # (r, K), gradient of the probabilities
            to_logits.sub_(torch.linalg.vecdot(p, to_logits).unsqueeze(1)).mul_(p).div_(temperature)
            torch.mm(to_logits, weight, out=to_latents[block])
            to_weight.addmm_(to_logits.T, latents[block])
            to_bias.add_(to_logits.sum(0))
        return to_latents, to_weight, to_bias, to_codebook


@_gumbel_codes_backward.register_fake
def _(
    grad: Tensor,
    latents: Tensor,
    weight: Tensor,
    bias: Tensor,
    codebook: Tensor,
    indices: Tensor,
    seed: Tensor,
    temperature: Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (latents, weight, bias, codebook))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.hard = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _gumbel_codes_backward(grad.contiguous(), *ctx.saved_tensors, ctx.hard)
    return *found, None, None, None, None


_gumbel_codes.register_autograd(_gradients, setup_context=_keep_inputs)
