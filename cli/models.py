"""``vistok models``: the published tokenizers that are known by name."""

from __future__ import annotations

import json
from dataclasses import asdict

from ..hub.catalog import CATALOG, PublishedModel
from .errors import CommandError

_COLUMNS = ("name", "tokens", "codebook", "params", "px", "rFID", "licence", "source")
_NUMBERS = ("tokens", "params", "px", "rFID")


# The option is called --json, so the parameter is.
def models(*, family: str = "", json: bool = False) -> int:
    """List the published tokenizers that every command and vistok.load take by name, or by their repository.

    rFID is what the authors report, on the 50 000 validation images of ImageNet at 256x256. Weights are downloaded
    when they are first used.

    Args:
        family: Only models whose name begins with this, such as titok or llamagen.
        json: Print JSON, with paper, file name and config.

    Returns:
        0.

    Raises:
        CommandError: for a family that there is not.
    """
    chosen = [model for model in CATALOG if model.name.startswith(family.lower())]
    if not chosen:
        raise CommandError(f"--family: no published model begins with {family!r}; vistok models lists all of them")
    print(_to_json(chosen) if json else _to_text(chosen))
    return 0


def _to_json(models: list[PublishedModel]) -> str:
    return json.dumps([{**asdict(model), "continuous": model.continuous} for model in models], indent=2)


def _to_text(models: list[PublishedModel]) -> str:
    """A table of one line per model."""
    rows = [_COLUMNS, *map(_row, models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if name in _NUMBERS else text.ljust(width)
            for name, text, width in zip(_COLUMNS, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(model: PublishedModel) -> tuple[str, ...]:
    tokens = str(model.tokens) if model.grid is None else f"{model.grid[0]}x{model.grid[1]}"
    return (
        model.name,
        f"1-{tokens}" if model.variable_length else tokens,
        f"{model.latent_dim} floats" if model.codebook is None else f"{model.codebook[0]}x{model.codebook[1]}",
        f"{model.parameters / 1e6:.0f}M",
        str(model.image_size),
        "?" if model.rfid is None else f"{model.rfid:.2f}",
        model.licence,
        model.source.split("/")[2] if model.is_address else model.source,
    )
