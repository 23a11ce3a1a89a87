"""What the length of a sequence buys, for tokenizers whose tokens may end anywhere (One-D-Piece, arXiv:2501.10064).

Every length is a variant of its own, decoded from the first tokens of sequences that are encoded once. The values that
images reach at each length then say how long a sequence every single image needs for a given quality (the question of
adaptive tokenizers: ALIT, arXiv:2411.02393; KARL, arXiv:2507.07995), and how often more tokens make an image worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rate_distortion import TARGETS
from .report.names import metric_name
from .variants import Codes, TokenizerVariant

SLACK: dict[str, tuple[float, ...]] = {  # below the quality of the full length, hard to see
    "psnr": (1.0,),
    "ssim": (0.02,),
    "lpips_alex": (0.02,),
    "lpips_vgg": (0.02,),
}


def length_variants(
    codes: Codes, lengths: Sequence[int] | None = None, image_size: tuple[int, int] | None = None
) -> list[TokenizerVariant]:
    """A variant for every number of tokens, ascending.

    Args:
        codes: a tokenizer of variable length.
        lengths: numbers of tokens; the powers of two below the full length, and the full length, if ``None``.
        image_size: ``(H, W)`` that will be evaluated; the tokenizer's own if ``None``.

    Raises:
        ValueError: for a tokenizer that was not trained on prefixes, no lengths, or lengths that it does not have.
    """
    tokenizer = codes.tokenizer
    total = sum(stream.length for stream in tokenizer.layout(image_size))
    if not tokenizer.variable_length or not total:
        raise ValueError(
            f"{type(tokenizer).__name__} has a fixed length: its decoder was never trained on the first tokens alone; "
            f"evaluate lengths of a tokenizer with variable_length, such as OneDPiece"
        )
    if lengths is None:
        lengths = [*(2**power for power in range((total - 1).bit_length())), total]
    if not lengths or min(lengths) < 1 or max(lengths) > total:
        raise ValueError(f"lengths must be numbers from 1 to {total}; got {list(lengths)}")
    return [TokenizerVariant(codes, length) for length in sorted(set(lengths))]


def adaptive_lengths(tables: Mapping[int, Tensor], target: float | Tensor, higher_is_better: bool) -> Tensor:
    """The shortest length at which every image is as good as it should be.

    Args:
        tables: length -> value of every image ``(N,)``, the images in one order.
        target: the value to reach, one for all or ``(N,)``.
        higher_is_better: direction of the values.

    Returns:
        int64 ``(N,)``: one of the lengths, 0 for an image that reaches the target at none. Values that are not finite
        reach nothing. An image that gets worse again at a greater length keeps the shortest.
    """
    lengths, values = _stack(tables)
    target = torch.as_tensor(target, dtype=torch.float64, device="cpu")
    reached = (values >= target if higher_is_better else values <= target) & values.isfinite()  # (L, N)
    first = reached.int().argmax(0)  # the first of several largest
    return torch.where(reached.any(0), lengths[first], 0)


def violations(tables: Mapping[int, Tensor], higher_is_better: bool, tolerance: float = 0.0) -> dict[str, Any]:
    """How often images get worse by more than ``tolerance`` when tokens are added.

    Returns:
        ``images``: the share of images that do so at one step or more; ``steps``: for every step ``from``, ``to`` (in
        tokens) and ``share`` of the images that do so there. A step from or to a value that is not finite is none.
    """
    lengths, values = _stack(tables)
    gains = values.diff(dim=0) if higher_is_better else -values.diff(dim=0)  # (L - 1, N)
    worse = (gains < -tolerance) & gains.isfinite()
    steps = [
        {"from": start, "to": end, "share": _share(row)}
        for start, end, row in zip(lengths[:-1].tolist(), lengths[1:].tolist(), worse, strict=True)
    ]
    return {"images": _share(worse.any(0)), "steps": steps}


def adaptive_section(
    tables: Mapping[str, Mapping[int, Tensor]],
    targets: Mapping[str, Sequence[float]] = TARGETS,
    slack: Mapping[str, Sequence[float]] = SLACK,
) -> dict[str, Any]:
    """What single images say about lengths, as JSON data.

    Args:
        tables: metric -> length -> value of every image ``(N,)``, all in one order.
        targets: metric -> values to reach.
        slack: metric -> how much worse than at the full length an image may be.

    Returns:
        By metric: ``violations`` (see :func:`violations`) and ``adaptive``, one entry per target: ``rule``, ``target``,
        ``histogram`` of the shortest lengths that reach it as ``[length, images]`` pairs, ``unreached`` images, and the
        ``mean_tokens`` and ``mean_value`` of a coder that gives every image its shortest length, and the full length to
        those that reach the target at none.

    Raises:
        ValueError: for a metric without a direction, or tables of different sizes.
    """
    section: dict[str, Any] = {}
    for metric, by_length in tables.items():
        higher = metric_name(metric).higher_is_better
        if higher is None:
            raise ValueError(f"metric {metric!r} has no direction: neither more nor less of it is better")
        full = by_length[max(by_length)].cpu().double()
        sign = -1 if higher else 1
        rules = [("value", target, target) for target in targets.get(metric, ())]
        rules += [("full length", part, full + sign * part) for part in slack.get(metric, ())]
        adaptive = [
            {"rule": rule, "target": float(number), **_histogram(by_length, goal, higher)}
            for rule, number, goal in rules
        ]
        section[metric] = {"violations": violations(by_length, higher), "adaptive": adaptive}
    return section


def _histogram(tables: Mapping[int, Tensor], target: float | Tensor, higher_is_better: bool) -> dict[str, Any]:
    lengths, values = _stack(tables)
    chosen = adaptive_lengths(tables, target, higher_is_better)  # (N,)
    used = torch.where(chosen > 0, chosen, lengths[-1])
    value = values.gather(0, torch.searchsorted(lengths, used)[None])[0]  # (N,)
    value = value[value.isfinite()]
    return {
        "histogram": [[length, int((chosen == length).sum())] for length in lengths.tolist()],
        "unreached": int((chosen == 0).sum()),
        "mean_tokens": float(used.double().mean()) if len(used) else None,
        "mean_value": float(value.mean()) if len(value) else None,
    }


def _stack(tables: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The lengths ascending, int64 ``(L,)``, and the values float64 ``(L, N)`` on the host.

    Raises:
        ValueError: for no table, or tables of different sizes.
    """
    lengths = sorted(tables)
    sizes = {tuple(tables[length].shape) for length in lengths}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        raise ValueError(
            f"tables need a value per image, of the same images at every length; got shapes {sorted(sizes)}"
        )
    return torch.tensor(lengths), torch.stack([tables[length].double().cpu() for length in lengths])


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0
