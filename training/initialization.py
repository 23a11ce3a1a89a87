"""Start a run from weights that exist: an earlier stage, a released tokenizer, or parts of several.

TiTok's second stage (arXiv:2406.07550) takes encoder, quantizer and ViT decoder from the first one, and the code table
and pixel decoder from the tokenizer whose codes the first stage learned to predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hub.load import load


@dataclass
class Initialization:
    """Where some parts get their first weights.

    Args:
        source: what ``vistok.load`` takes: an export, a run or its checkpoint, a released checkpoint.
        parts: own part or parameter -> the source's; the whole tokenizer if ``None``.
        filename: of the weights in a repository that holds several.
        ema: take the averaged weights of a training checkpoint.
    """

    source: str
    parts: dict[str, str] | None = None
    filename: str | None = None
    ema: bool = True


def initialize(model: nn.Module, plan: Sequence[Initialization]) -> None:
    """Copy weights into a model, in place.

    Every tensor of a part of a source must have a place of its shape, and every tensor of a part that is named must get
    a value from one of the sources.

    Raises:
        ValueError: for tensors without a counterpart, with their names.
        FileNotFoundError: if a source cannot be found.
    """
    own = model.state_dict()
    filled: dict[str, Tensor] = {}
    wanted: set[str] = set()
    for entry in plan:
        found = _load_state(entry)
        for target, origin in (entry.parts or {"": ""}).items():
            wanted |= _under(own, target)
            names = _under(found, origin)
            if not names:
                raise ValueError(f"initialize: {entry.source} has no part {origin!r}")
            for name in names:
                place = target + name[len(origin) :]
                if place not in own or own[place].shape != found[name].shape:
                    mine = f"of shape {tuple(own[place].shape)}" if place in own else "missing"
                    raise ValueError(
                        f"initialize: {name} of {entry.source} has shape {tuple(found[name].shape)}; its place "
                        f"{place or 'here'} is {mine} in this {type(model).__name__}"
                    )
                filled[place] = found[name]
    missing = sorted(wanted - set(filled))
    if missing:
        raise ValueError(
            f"initialize: no source has {missing[:5]}{' ...' if len(missing) > 5 else ''}, which the named parts hold"
        )
    with torch.no_grad():
        for name, value in filled.items():
            own[name].copy_(value)


def _load_state(entry: Initialization) -> dict[str, Tensor]:
    options = {} if entry.filename is None else {"filename": entry.filename}
    return load(entry.source, ema=entry.ema, **options).state_dict()


def _under(names: dict[str, Tensor], part: str) -> set[str]:
    return {name for name in names if not part or name == part or name.startswith(f"{part}.")}
