"""pFID ("Robust Latent Matters", arXiv:2503.08354): the FID of reconstructions from perturbed tokens.

A generator makes mistakes, mostly small ones, and pFID asks how a decoder bears them: it is the mean FID over 15 pairs
of alpha, the share of tokens replaced, and delta, the number of nearest codes to replace them by. How they are replaced
says :mod:`.perturbation`. The original script was not published; the paper's numbers are for 50 000 images of
ImageNet, and only comparable between codebooks of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..metric import Originals, Pairs
from ..results import VariantResult
from ..variants import Codes, Variant, token_bits
from .perturbation import TokenPerturbation

ALPHAS = (0.9, 0.8, 0.7, 0.6, 0.5)
PUBLISHED_IMAGES = 50_000


def perturbed_variants(
    codes: Codes,
    grid: Literal["paper", "mid"] = "paper",
    neighbours: Literal["code", "latent"] = "code",
    count: Literal["exact", "bernoulli"] = "exact",
    seed: int = 0,
) -> list[PerturbedVariant]:
    """The cells of a pFID grid.

    Args:
        codes: the tokenizer.
        grid: ``paper``, 15 cells (fewer if small codebooks make deltas coincide), or ``mid``, the one in their middle.
        neighbours: nearest to the ``code``, or to the ``latent`` before quantization, which needs one index per token.
        count: replace ``exact`` numbers of tokens, or each with probability alpha (``bernoulli``).
        seed: of the draws.

    Raises:
        ValueError: for an unknown option.
        MetricUnavailable: for a tokenizer whose codes have no neighbours.
    """
    if grid not in ("paper", "mid"):
        raise ValueError(f"grid must be 'paper' or 'mid'; got {grid!r}")
    perturbation = TokenPerturbation(codes, neighbours, count, seed)
    alphas, strengths = (ALPHAS, (0, 1, 2)) if grid == "paper" else (ALPHAS[2:3], (1,))
    alike: dict[tuple[int, ...], list[int]] = {}
    for strength in strengths:
        alike.setdefault(perturbation.deltas[strength], []).append(strength)
    return [
        PerturbedVariant(perturbation, alpha, same[0], grid, len(same)) for alpha in alphas for same in alike.values()
    ]


class PerturbedVariant(Variant):
    """Reconstructions from perturbed tokens: one cell of a pFID grid.

    Args:
        perturbation: shared by the cells of a grid.
        alpha: share of the tokens to replace, 0 to 1.
        strength: 0, 1 or 2, which of the perturbation's deltas.
        grid: of which this is a cell.
        weight: how many cells of the grid this one stands for.

    Raises:
        ValueError: for an alpha or a strength out of range.
    """

    kind = "perturbed"

    def __init__(
        self, perturbation: TokenPerturbation, alpha: float, strength: int = 1, grid: str = "paper", weight: int = 1
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
        if strength not in (0, 1, 2):
            raise ValueError(f"strength must be 0, 1 or 2; got {strength}")
        self.perturbation, self.alpha, self.strength = perturbation, alpha, strength
        deltas = list(perturbation.deltas[strength])
        self.name = f"pfid/alpha={alpha},delta={'+'.join(str(delta) for delta in dict.fromkeys(deltas))}"
        self.settings = {
            "alpha": alpha,
            "delta": deltas[0] if len(deltas) == 1 else deltas,
            "grid": grid,
            "weight": weight,
            "neighbours": perturbation.neighbours,
            "count": perturbation.count,
            "seed": perturbation.seed,
            "published_deltas": perturbation.published,
        }

    def reconstruct(self, originals: Originals) -> Pairs:
        tokens = self.perturbation.tokens(originals, self.alpha, self.strength)
        return Pairs(originals, self.perturbation.codes.decode(tokens), tokens, token_bits(tokens))


def pfid_section(variants: Sequence[VariantResult], num_images: int) -> dict[str, Any]:
    """What a pFID grid found, as JSON data; empty without perturbed variants.

    Args:
        variants: of an evaluation, the plain reconstruction among them.
        num_images: that were evaluated.

    Returns:
        ``label``: ``pFID`` for the paper's grid on 50 000 images, else ``pFID-like`` and in what it differs;
        ``value``: the mean rFID of the cells, ``None`` if there was none; ``plain``: metrics of the plain
        reconstruction; ``means``: of every metric over the cells; ``changes``: means minus plain values; ``cells``:
        their ``alpha``, ``delta``, ``weight`` and ``metrics``; and the settings of the grid.
    """
    cells = [variant for variant in variants if variant.kind == "perturbed"]
    if not cells:
        return {}
    settings = cells[0].settings
    plain = next((dict(variant.metrics) for variant in variants if variant.kind == "reconstruction"), {})
    weights = [cell.settings["weight"] for cell in cells]
    means = {
        name: sum(weight * cell.metrics[name] for weight, cell in zip(weights, cells, strict=True)) / sum(weights)
        for name in cells[0].metrics
        if all(name in cell.metrics for cell in cells)
    }
    differences = _differences(settings, sum(weights), num_images)
    return {
        "label": f"pFID-like ({', '.join(differences)})" if differences else "pFID",
        "value": means.get("rfid"),
        "plain": plain,
        "means": means,
        "changes": {name: mean - plain[name] for name, mean in means.items() if name in plain},
        "num_images": num_images,
        **{name: settings[name] for name in ("grid", "neighbours", "count", "seed")},
        "cells": [
            {**{name: cell.settings[name] for name in ("alpha", "delta", "weight")}, "metrics": dict(cell.metrics)}
            for cell in cells
        ],
    }


def _differences(settings: dict[str, Any], num_cells: int, num_images: int) -> list[str]:
    """In what a grid differs from the paper's."""
    differences = [] if num_images == PUBLISHED_IMAGES else [f"N={num_images}"]
    if settings["grid"] != "paper":
        differences.append(f"grid={settings['grid']}")
    elif num_cells != 3 * len(ALPHAS):
        differences.append(f"{num_cells} of {3 * len(ALPHAS)} cells")
    if settings["neighbours"] != "code":
        differences.append(f"neighbours={settings['neighbours']}")
    if settings["count"] != "exact":
        differences.append(f"count={settings['count']}")
    if not settings["published_deltas"]:
        differences.append("deltas not published for these codebooks")
    return differences
