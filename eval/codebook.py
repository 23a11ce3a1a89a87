"""How a codebook is used, from counts of its codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def codebook_statistics(counts: Tensor, codebook_sizes: Sequence[int]) -> dict[str, Tensor]:
    """Usage and perplexity of one or more codebooks.

    Args:
        counts: ``(sum(codebook_sizes),)`` how often each code was used, the codebooks one after another.
        codebook_sizes: number of codes of each.

    Returns:
        ``usage``: the share of all codes used at least once; ``perplexity``: ``exp`` of the entropy of the code
        distribution, averaged over the codebooks (between 1 and the codebook size). Both are scalar tensors.
    """
    if counts.shape != (sum(codebook_sizes),):
        raise ValueError(f"counts must have shape ({sum(codebook_sizes)},); got {tuple(counts.shape)}")
    perplexities = []
    for part in counts.double().split(list(codebook_sizes)):
        share = part / part.sum().clamp(min=1)
        perplexities.append(torch.exp(-torch.special.xlogy(share, share).sum()))
    return {"usage": (counts > 0).double().mean(), "perplexity": torch.stack(perplexities).mean()}
