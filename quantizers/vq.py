"""Vector quantization (VQ-VAE, arXiv:1711.00937) with the codebooks and remedies that published tokenizers use.

Each latent becomes its nearest code. The codebook learns from a codebook loss, the encoder from a commitment loss and,
through the gradient estimator, from everything behind the quantizer. With ``l2_normalize`` latents and codes live on
the unit sphere, as in ViT-VQGAN (arXiv:2110.04627) and LlamaGen (arXiv:2406.06525); together with a low dimension that
keeps far more codes alive. The codebook is stored un-normalised, as the published checkpoints are.

Both losses are means over all elements (tokens and dimensions) of the kept positions. Where published code weights the
codebook loss by beta instead of the commitment loss (taming-transformers' default), that is a choice of loss weights.

A small encoder that starts from nothing tends to use a handful of codes. Against that there are

- ``codebook_update="ema"``: codes are averages of their latents (appendix A.1 of VQ-VAE) instead of parameters;
- ``kmeans_steps``: the codebook starts as the k-means centroids of the latents of the first optimizer steps. Public
  code takes the first batch, which holds too few distinct latents for a large codebook;
- ``restart_after`` and ``restart_below``: a dead code moves onto a latent of the present step (random restart, as in
  Jukebox, arXiv:2005.00341). It is dead after so many steps without use, or below that share of uniform usage: a share,
  because published thresholds in tokens depend on the batch, and declare every code of a large codebook dead. Its
  averages move with it, so the next step does not take it back;
- ``anchors``: codes are pulled to the latent nearest to them, the more the less they are used (CVQ, arXiv:2307.15139);
- ``entropy_temperature``: entropy regularisation of the soft assignment (LFQ, arXiv:2310.05737);
- ``estimator="rotation"`` (arXiv:2410.06424), or ``"softmax"``, the gradient of IBQ (arXiv:2412.02692) for distances.

Public implementations change the codebook inside the forward pass, so it changes twice when a step runs the model
twice. Here a forward pass only gathers, and :meth:`VectorQuantizer.commit_update` applies, once per optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantized, count_codes, drop, drop_indices, mean_over_kept, token_rows
from .codebook import CodebookQuantizer
from .codebook_state import (
    add_to_sample,
    anchor_of_all_ranks,
    assign_replacements,
    codes_from_averages,
    nearer,
    pull_strength,
    restart_candidates,
    sample_of_all_ranks,
    update_average_,
)
from .distributed import sum_over_ranks
from .entropy import codebook_entropy
from .estimators import rotation, straight_through
from .kmeans import kmeans, sums_by_code
from .search import nearest_codes, search_dtype
from .softmax import finite_rows, softmax_codes

ESTIMATORS = ("straight_through", "rotation", "softmax", "none")
CODEBOOK_UPDATES = ("gradient", "ema")
KMEANS_TOKENS = 8192  # latents that a rank keeps of each step for k-means


class VectorQuantizer(CodebookQuantizer):
    """Nearest-code quantizer.

    Losses are ``commitment``, ``codebook`` (gradient codebook only) and ``entropy`` (with ``entropy_temperature``); the
    published weights are 0.25, 1 and 0.005 (GigaTok, arXiv:2504.08736). A codebook changes only in training mode with
    gradients enabled; a gradient codebook with ``requires_grad_(False)`` never does.

    Args:
        codebook_size: K, the number of codes.
        dim: D, the size of a code.
        l2_normalize: compare, return and train unit vectors.
        restart_after: optimizer steps after which an unused code moves to a latent; never if ``None``.
        codebook_update: ``"gradient"`` (the codebook is a parameter) or ``"ema"`` (a float32 buffer).
        ema_decay: decay of the moving averages of an EMA codebook, and of the usage that ``restart_below`` and
            ``anchors`` look at.
        ema_eps: smoothing of the usage of an EMA codebook, relative to uniform usage.
        kmeans_steps: optimizer steps whose latents make the codebook by k-means; 0 = no k-means. Until then averages,
            restart and anchors wait. A run that is interrupted there goes on with the latents of the steps that remain.
        kmeans_iterations: Lloyd iterations.
        restart_below: a code moves to a latent when its averaged usage falls below this share of 1 / K; between 0 and
            1, never if ``None``.
        anchors: pull unused codes to the latents nearest to them.
        estimator: gradient of the output: ``"straight_through"``, ``"rotation"``, ``"softmax"`` (also reaches the
            codebook) or ``"none"``.
        softmax_temperature: of the softmax of squared distances of ``estimator="softmax"``.
        entropy_temperature: of the softmax of squared distances of the entropy loss; no such loss if ``None``.
        batch_entropy_weight: weight of the batch entropy against the sample entropy in that loss.
        entropy_eps: added inside the logarithm of the batch entropy; 0 is exact, published code has 1e-5.

    Shape:
        latents ``(B, *S, D)``, indices ``(B, *S, 1)``. Computes in float32 (float64 latents: float64) and returns codes
        in that dtype, also under autocast.

    Raises:
        ValueError: for a setting out of range, or settings that exclude each other.
    """

    default_loss_weights = {"commitment": 0.25, "codebook": 1.0}

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        l2_normalize: bool = False,
        restart_after: int | None = None,
        *,
        codebook_update: str = "gradient",
        ema_decay: float = 0.99,
        ema_eps: float = 1e-5,
        kmeans_steps: int = 0,
        kmeans_iterations: int = 10,
        restart_below: float | None = None,
        anchors: bool = False,
        estimator: str = "straight_through",
        softmax_temperature: float = 1.0,
        entropy_temperature: float | None = None,
        batch_entropy_weight: float = 1.0,
        entropy_eps: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(codebook_size, dim, kmeans_steps, kmeans_iterations, restart_after)
        _check_choices(codebook_update, estimator, ema_decay, ema_eps)
        _check_temperatures(softmax_temperature, entropy_temperature, entropy_eps)
        _check_remedies(codebook_update, restart_after, restart_below, anchors)
        self.dim = dim
        self.codebook_sizes = (codebook_size,)
        self.l2_normalize, self.estimator, self.softmax_temperature = l2_normalize, estimator, softmax_temperature
        self.ema, self.ema_decay, self.ema_eps = codebook_update == "ema", ema_decay, ema_eps
        self.restart_after, self.restart_below, self.anchors = restart_after, restart_below, anchors
        self.entropy_temperature, self.entropy_eps = entropy_temperature, entropy_eps
        self.batch_entropy_weight = batch_entropy_weight
        self.kmeans_iterations = kmeans_iterations
        self.kmeans_sample = min(codebook_size, kmeans_steps * KMEANS_TOKENS)
        self.default_loss_weights = {
            "commitment": 0.25,
            **({} if self.ema else {"codebook": 1.0}),
            **({} if entropy_temperature is None else {"entropy": 0.005}),
        }
        self._make_codebook(codebook_size, kmeans_steps)
        # Gathered by the forward passes of one optimizer step:
        self._counts: Tensor | None = None  # (K,) int64, tokens of each code
        self._sums: Tensor | None = None  # (K, D), sum of the latents of each code
        self._sample: tuple[Tensor, Tensor] | None = None  # keys and (m, D) random latents
        self._nearest: tuple[Tensor, Tensor] | None = None  # distances and (K, D) latents nearest to the codes
        # Gathered over the first optimizer steps:
        self._reservoir: list[tuple[Tensor, Tensor]] | None = None  # samples

    def _make_codebook(self, size: int, kmeans_steps: int) -> None:
        """Make the codebook and the buffers that the settings need."""
        codebook = torch.empty(size, self.dim).uniform_(-1 / size, 1 / size)
        # Unit vectors at the length that is used: an optimizer step would turn a far shorter vector around.
        codebook = F.normalize(codebook, dim=1) if self.l2_normalize else codebook
        averaged = []
        if self.ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", codebook / size)  # averaged, as a fraction of the tokens
            averaged += ["codebook", "sums"]
        else:
            self.codebook = nn.Parameter(codebook)
        if self.ema or self.anchors or self.restart_below is not None:
            # Averaged fraction of the tokens. CVQ starts from nothing, so that unused codes move at once.
            self.register_buffer("usage", torch.full((size,), 0.0 if self.anchors else 1 / size))
            averaged += ["usage"]
        if self.restart_after is not None:
            self.register_buffer("idle_steps", torch.zeros(size, dtype=torch.int64))
        if kmeans_steps:
            self.register_buffer("kmeans_steps_left", torch.tensor(kmeans_steps))
        self.float32_buffers = tuple(averaged)
        self._set_steps_left(kmeans_steps)

    def _set_steps_left(self, steps: int) -> None:
        # Copies of a buffer: reading that would wait for the device, and a compiled forward pass would be compiled
        # again for each number of steps.
        self._steps_left, self._collecting = steps, steps > 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.kmeans_sample and f"{prefix}kmeans_steps_left" in state_dict:
            self._set_steps_left(int(state_dict[f"{prefix}kmeans_steps_left"]))

    def assign(self, z: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None) -> Quantized:
        latents = self.latents_of(z)  # (n, D)
        keep = None if mask is None else mask.reshape(-1)
        found = self.find(latents)  # (n,)
        codes = self.codes_of(found)  # (n, D)
        finite = finite_rows(token_rows(z))  # before normalisation, where a length that overflows still shows
        learn = finite if keep is None else finite & keep  # (n,), tokens that the codebook learns from
        losses, statistics = self._losses(latents, codes, keep, learn)
        indices = drop_indices(found.view(*z.shape[:-1], 1), mask)
        statistics |= count_codes(indices, self.codebook_sizes, finite)
        if self._learns():
            self._gather(latents.detach(), token_rows(z.detach()), found, learn, generator)
        quantized = drop(codes.detach().view(z.shape), mask)
        return Quantized(quantized, indices, losses, statistics, drop(latents.view(z.shape), mask))

    def estimate(self, assigned: Quantized) -> Tensor:
        """``assigned.quantized`` with the gradient of the chosen estimator."""
        if self.estimator == "none":
            return assigned.quantized
        if self.estimator == "rotation":
            return rotation(assigned.latents, assigned.quantized)
        if self.estimator == "softmax":
            latents = token_rows(assigned.latents)
            indices = assigned.indices.reshape(-1).clamp(min=0)
            soft = softmax_codes(*self._negative_distances(latents), indices, self.softmax_temperature)
            return straight_through(soft.view(assigned.latents.shape), assigned.quantized)
        return straight_through(assigned.latents, assigned.quantized)

    def latents_of(self, z: Tensor) -> Tensor:
        return F.normalize(token_rows(z), dim=1) if self.l2_normalize else token_rows(z)

    def all_codes(self) -> Tensor:
        return self._used(self.codebook)

    def codes_of(self, flat: Tensor) -> Tensor:
        return self._used(F.embedding(flat, self.codebook))

    def _used(self, stored: Tensor) -> Tensor:
        """Stored codes as they are compared with latents."""
        stored = stored.to(search_dtype(stored))
        return F.normalize(stored, dim=1) if self.l2_normalize else stored

    def _negative_distances(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, table and bias whose logits ``rows @ table.T + bias`` are ``-|z - e|^2``, up to the constant |z|^2."""
        codes = self.all_codes().to(latents.dtype)
        return 2 * latents, codes, -codes.square().sum(1)

    def _losses(
        self, latents: Tensor, codes: Tensor, keep: Tensor | None, learn: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses = {"commitment": mean_over_kept((latents - codes.detach()).square(), keep)}
        if not self.ema:
            targets = latents.detach().masked_fill(~learn.unsqueeze(1), 0)
            losses["codebook"] = mean_over_kept((targets - codes).square(), learn)
        if self.entropy_temperature is None:
            return losses, {}
        sample, batch = codebook_entropy(
            *self._negative_distances(latents),
            self.entropy_temperature,
            keep,
            reduce=self.training,
            eps=self.entropy_eps,
        )
        losses["entropy"] = sample - self.batch_entropy_weight * batch
        return losses, {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}

    # ---- what changes without a gradient

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled() and (self.ema or self.codebook.requires_grad)

    @property
    def _restarts(self) -> bool:
        return self.restart_after is not None or self.restart_below is not None

    @property
    def _restart_candidates(self) -> int:
        return restart_candidates(self.codebook_sizes[0])

    @torch.no_grad()
    def _gather(
        self, latents: Tensor, raw: Tensor, found: Tensor, learn: Tensor, generator: torch.Generator | None
    ) -> None:
        """Note what the codebook learns from these latents ``(n, D)``; ``raw`` are the same before normalisation."""
        if self._collecting:
            self._sample = add_to_sample(self._sample, latents, learn, KMEANS_TOKENS, generator)
            return
        if not (self.ema or self.anchors or self._restarts):
            return
        size = self.codebook_sizes[0]
        counts = torch.zeros(size, dtype=torch.int64, device=found.device)
        counts.scatter_add_(0, found, learn.to(torch.int64))
        self._counts = counts if self._counts is None else self._counts + counts
        if self.ema:
            sums = sums_by_code(latents.masked_fill(~learn.unsqueeze(1), 0), found, size)
            self._sums = sums if self._sums is None else self._sums + sums
        if self._restarts:
            self._sample = add_to_sample(self._sample, latents, learn, self._restart_candidates, generator)
        if self.anchors:
            self._nearest = nearer(self._nearest, self._find_anchors(latents, raw, learn))

    def _find_anchors(self, latents: Tensor, raw: Tensor, learn: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances ``(K,)`` to the nearest latent of each code, and that latent ``(K, D)`` as it came."""
        # A latent that does not count is replaced by one that does, so it cannot be the nearest.
        stand_in = latents.index_select(0, learn.to(torch.int64).argmax().view(1))
        usable = torch.where(learn.unsqueeze(1), latents, stand_in)
        codes = self.all_codes().to(latents.dtype)
        nearest = nearest_codes(codes, usable)  # (K,)
        nearest = torch.where(learn[nearest], nearest, learn.to(torch.int64).argmax())
        distances = (codes - usable[nearest]).square().sum(1)
        return distances.masked_fill(~learn.any(), torch.inf), raw.masked_fill(~learn.unsqueeze(1), 0)[nearest]

    @torch.no_grad()
    def commit_update(self) -> None:
        counts, sums, sample, anchors = self._counts, self._sums, self._sample, self._nearest
        self._counts = self._sums = self._sample = self._nearest = None
        if self._collecting and sample is not None:
            self._collect(sample)
        if counts is None:
            return
        # Everything below stays on the device: no code path depends on what the tensors hold.
        counts = sum_over_ranks(counts)
        tokens = counts.sum()
        if hasattr(self, "usage"):
            update_average_(self.usage, counts, tokens, self.ema_decay)
        if sums is not None:
            self._average(sum_over_ranks(sums), tokens)
        if anchors is not None:
            self._pull(*anchor_of_all_ranks(*anchors))
        if sample is not None:
            self._restart(counts, tokens, *sample_of_all_ranks(sample, self._restart_candidates))

    def _average(self, sums: Tensor, tokens: Tensor) -> None:
        """Moving averages of the latents, and the codes that follow from them."""
        update_average_(self.sums, sums, tokens, self.ema_decay)
        codes = codes_from_averages(self.usage, self.sums, self.ema_eps)
        codes = F.normalize(codes, dim=1) if self.l2_normalize else codes
        torch.where(tokens > 0, codes, self.codebook, out=self.codebook)

    def _pull(self, distances: Tensor, anchors: Tensor) -> None:
        """Pull each code to its anchor, the more the less it is used."""
        strength = pull_strength(self.usage, self.ema_decay).masked_fill(distances.isinf(), 0).unsqueeze(1)
        moved = self.codebook + strength * (anchors.to(strength.dtype) - self.codebook)
        self.codebook.copy_(moved)

    def _restart(self, counts: Tensor, tokens: Tensor, keys: Tensor, rows: Tensor) -> None:
        """Move dead codes onto latents."""
        size = self.codebook_sizes[0]
        if self.restart_after is None:
            dead = self.usage < self.restart_below / size
        else:
            self.idle_steps.copy_(torch.where(counts > 0, 0, self.idle_steps + (tokens > 0)))
            dead = self.idle_steps >= self.restart_after
        moves, latents = assign_replacements(dead, keys, rows)
        self._write_codes(moves, latents)

    def _write_codes(self, where: Tensor, codes: Tensor) -> None:
        """Write the codes ``(K, D)`` where bool ``(K,)`` says so, with the state of a code in uniform use."""
        size = self.codebook_sizes[0]
        self.codebook.copy_(torch.where(where.unsqueeze(1), codes.to(self.codebook.dtype), self.codebook))
        if self.ema:
            self.sums.copy_(torch.where(where.unsqueeze(1), self.codebook / size, self.sums))
        if hasattr(self, "usage"):
            self.usage.copy_(torch.where(where, 1 / size, self.usage))
        if self.restart_after is not None:
            self.idle_steps.copy_(torch.where(where, 0, self.idle_steps))

    def _collect(self, sample: tuple[Tensor, Tensor]) -> None:
        """Keep a step's sample for k-means; after the last one, make the codebook."""
        self._reservoir = [*(self._reservoir or []), sample]
        self.kmeans_steps_left.sub_(1)
        self._set_steps_left(self._steps_left - 1)
        if self._collecting:
            return
        keys, rows = (torch.cat(part) for part in zip(*self._reservoir, strict=True))
        self._reservoir = None
        largest = keys.topk(min(self.kmeans_sample, len(keys)))
        everyone, start = sample_of_all_ranks((largest.values, rows[largest.indices]), self.kmeans_sample)
        # A random latent of all ranks for each code; without enough of them the other codes stay as they are.
        chosen, start = assign_replacements(torch.ones_like(self.codebook[:, 0], dtype=torch.bool), everyone, start)
        start = torch.where(chosen.unsqueeze(1), start, self.all_codes().to(start.dtype))
        codes = kmeans(rows, start, self.kmeans_iterations, valid=keys >= 0, normalize=self.l2_normalize)
        self._write_codes(torch.ones_like(chosen), codes)


def _check_sizes(
    codebook_size: int, dim: int, kmeans_steps: int, kmeans_iterations: int, restart_after: int | None
) -> None:
    if codebook_size < 1 or dim < 1:
        raise ValueError(f"codebook_size and dim must be positive; got {codebook_size} and {dim}")
    if kmeans_steps < 0:
        raise ValueError(f"kmeans_steps must be at least 1, or 0 for no k-means; got {kmeans_steps}")
    if kmeans_iterations < 1:
        raise ValueError(f"kmeans_iterations must be at least 1; got {kmeans_iterations}")
    if restart_after is not None and restart_after < 1:
        raise ValueError(f"restart_after must be at least 1, or None; got {restart_after}")


def _check_choices(codebook_update: str, estimator: str, ema_decay: float, ema_eps: float) -> None:
    if codebook_update not in CODEBOOK_UPDATES:
        raise ValueError(f"codebook_update must be one of {CODEBOOK_UPDATES}; got {codebook_update!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}; got {estimator!r}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1): with 1 nothing would ever be averaged; got {ema_decay}")
    if ema_eps <= 0:
        raise ValueError(f"ema_eps must be positive: it keeps unused codes from dividing by zero; got {ema_eps}")


def _check_temperatures(softmax_temperature: float, entropy_temperature: float | None, entropy_eps: float) -> None:
    if softmax_temperature <= 0:
        raise ValueError(f"softmax_temperature must be positive; got {softmax_temperature}")
    if entropy_temperature is not None and entropy_temperature <= 0:
        raise ValueError(
            f"entropy_temperature must be positive, or None for no entropy loss; got {entropy_temperature}"
        )
    if entropy_eps < 0:
        raise ValueError(f"entropy_eps must not be negative; got {entropy_eps}")


def _check_remedies(
    codebook_update: str, restart_after: int | None, restart_below: float | None, anchors: bool
) -> None:
    if restart_below is not None and not 0 < restart_below < 1:
        raise ValueError(
            f"restart_below must lie between 0 and 1 (a share of uniform usage, at which a moved code starts), or be "
            f"None; got {restart_below}"
        )
    if restart_after is not None and restart_below is not None:
        raise ValueError(
            f"restart_after ({restart_after}) and restart_below ({restart_below}) are two definitions of a dead code; "
            f"give one of them"
        )
    if anchors and codebook_update == "ema":
        raise ValueError("anchors=True needs codebook_update='gradient': averages would take the pulled codes back")
    if anchors and (restart_after is not None or restart_below is not None):
        raise ValueError("anchors=True already moves unused codes; restart_after and restart_below must be None")
