"""How a codebook is used, from counts of its codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 16  # levels, groups or branches that are reported one by one


def codebook_statistics(counts: Tensor, codebook_sizes: Sequence[int]) -> dict[str, Tensor]:
    """Usage and perplexity of one or more codebooks.

    Args:
        counts: ``(sum(codebook_sizes),)`` how often each code was used, the codebooks one after another.
        codebook_sizes: number of codes of each.

    Returns:
        ``usage``: the share of all codes used at least once; ``dead_codes``: how many were not; ``perplexity``: ``exp``
        of the entropy of the code distribution, averaged over the codebooks (between 1 and the codebook size). With
        several codebooks of up to :data:`LEVELS` also ``usage/0``, ``perplexity/0`` ..., one pair each. Scalar tensors.
    """
    if counts.shape != (sum(codebook_sizes),):
        raise ValueError(f"counts must have shape ({sum(codebook_sizes)},); got {tuple(counts.shape)}")
    perplexities = []
    for part in counts.double().split(list(codebook_sizes)):
        share = part / part.sum().clamp(min=1)
        perplexities.append(torch.exp(-torch.special.xlogy(share, share).sum()))
    used = counts > 0
    values = {
        "usage": used.double().mean(),
        "dead_codes": (~used).sum().double(),
        "perplexity": torch.stack(perplexities).mean(),
    }
    if 1 < len(codebook_sizes) <= LEVELS:
        for level, part in enumerate(used.split(list(codebook_sizes))):
            values |= {f"usage/{level}": part.double().mean(), f"perplexity/{level}": perplexities[level]}
    return values
