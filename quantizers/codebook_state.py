"""How a codebook changes without a gradient: moving averages, restart of dead codes, anchors, samples of latents.

Usage is always a *fraction* of the tokens, never a count: the published thresholds on counts ("dead below 2 tokens")
depend on batch size and number of codes, and declare every code dead when there are more codes than tokens. Sums of
latents are kept as fractions alike, so a step counts the same whatever its number of tokens, micro-batches or ranks.

Everything here is a function of tensors that stays on their device and takes the same course whatever they hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather_rows, rank, sum_over_ranks
from .draws import draw_uniform

# ---- moving averages


def update_average_(average: Tensor, total: Tensor, tokens: Tensor, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * total / tokens``, in place; unchanged if there were no tokens.

    Args:
        average: ``(K, ...)``.
        total: ``(K, ...)`` sums over the tokens. A floating-point one of the same dtype is used up as scratch: a copy
            of a large codebook's sums would be the largest tensor of a training step.
        tokens: scalar, their number.
        decay: of the average.
    """
    new = (tokens > 0).to(average.dtype) * (1 - decay)
    share = new / tokens.clamp(min=1).to(average.dtype)
    average.mul_(1 - new)
    average.add_(total.mul_(share) if total.dtype == average.dtype else total.to(average.dtype) * share)


def codes_from_averages(usage: Tensor, sums: Tensor, epsilon: float) -> Tensor:
    """Codes ``s / p~`` of an averaged codebook, with ``p~ = (p + eps / K) / (sum(p) + eps) * sum(p)``.

    This is the published smoothing of counts (arXiv:1711.00937, appendix A.1) with its epsilon, which is a number of
    tokens there, as a fraction of the usage 1 / K of a code in uniform use.

    Args:
        usage: p ``(K,)``, averaged fraction of the tokens.
        sums: s ``(K, D)``, averaged sum of a code's latents divided by the number of tokens.
        epsilon: smoothing.
    """
    total = usage.sum()
    smoothed = (usage + epsilon / len(usage)) / (total + epsilon) * total
    return sums / smoothed.unsqueeze(1)


# ---- samples of latents, uniform over micro-batches and ranks


def add_to_sample(
    sample: tuple[Tensor, Tensor] | None,
    rows: Tensor,
    valid: Tensor,
    size: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep at most ``size`` rows, each of those seen so far with the same probability.

    Every row draws a key in [0, 1) and the largest keys stay, so samples merge by their keys.

    Args:
        sample: what was kept so far, if anything.
        rows: ``(n, D)`` further rows.
        valid: bool ``(n,)``, rows that may be kept.
        size: largest size of the sample.
        generator: source of the keys.

    Returns:
        Keys ``(m,)``, largest first, ``-1`` for a row that is none; rows ``(m, D)``, zero there.
    """
    keys = draw_uniform((len(rows),), rows.device, generator).masked_fill(~valid, -1)
    rows = rows.masked_fill(~valid.unsqueeze(1), 0)
    if sample is not None:
        keys, rows = torch.cat([sample[0], keys]), torch.cat([sample[1], rows])
    keys, order = keys.topk(min(size, len(keys)))
    return keys, rows[order]


def sample_of_all_ranks(sample: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The samples of all ranks in one, the same everywhere: keys ``(m,)`` and rows ``(m, D)``, largest keys first.

    Args:
        sample: this rank's, at most ``size`` rows are sent.
        size: rows that every rank sends, padded if it has fewer.
    """
    keys, rows = sample[0][:size], sample[1][:size]
    padding = size - len(keys)
    keys = gather_rows(F.pad(keys, (0, padding), value=-1.0))
    rows = gather_rows(F.pad(rows, (0, 0, 0, padding)))
    order = keys.argsort(descending=True, stable=True)
    return keys[order], rows[order]


# ---- restart of dead codes


def restart_candidates(codebook_size: int) -> int:
    """Latents of a rank and step that dead codes may move to: more for more than 2^14 codes."""
    return max(256, codebook_size // 64)


def assign_replacements(dead: Tensor, keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give every dead code a row of its own, as long as there are any; the others have to wait.

    Codes that share a vector would leave all but the first of them dead again.

    Args:
        dead: bool ``(K,)``.
        keys: ``(m,)`` keys of a sample, largest first.
        rows: ``(m, D)`` its rows.

    Returns:
        Bool ``(K,)``, which codes move, and ``(K, D)``, where to.
    """
    turn = dead.cumsum(0) - 1  # of the dead codes: 0, 1, 2 ...
    moves = dead & (turn < (keys >= 0).sum())
    return moves, rows[turn.clamp(min=0, max=len(rows) - 1)]


# ---- anchors: the latent nearest to every code


def nearer(first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per code the nearer of two anchors: distances ``(K,)`` and rows ``(K, D)``; the first one of a tie."""
    if first is None:
        return second
    better = second[0] < first[0]
    return torch.where(better, second[0], first[0]), torch.where(better.unsqueeze(1), second[1], first[1])


def anchor_of_all_ranks(distances: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Per code the nearest of the anchors of all ranks: distances ``(K,)`` and rows ``(K, D)``; the lowest rank's."""
    everyone = gather_rows(distances.unsqueeze(0))  # (ranks, K)
    nearest, owner = everyone.min(0)
    return nearest, sum_over_ranks(rows.masked_fill((owner != rank()).unsqueeze(1), 0))


def pull_strength(usage: Tensor, decay: float) -> Tensor:
    """``exp(-10 K p / (1 - decay) - 1e-3)`` of each code: 1 for an unused one, 0 for one in use (arXiv:2307.15139)."""
    return torch.exp(-usage * (len(usage) * 10 / (1 - decay)) - 1e-3)
