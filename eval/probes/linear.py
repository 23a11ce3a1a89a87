"""Linear probe: how well one linear layer on frozen features tells classes apart.

The recipe is GigaTok's (arXiv:2504.08736): batch norm without weights, a linear layer, LARS (arXiv:1708.03888) without
weight decay at a base learning rate of 0.1 per 256 images, 90 epochs, the first 10 of them warm-up, then a cosine. Two
things differ. Features are cached, so there is no augmentation. And LARS ties every step to the size of the weights:
how far they get is proportional to ``epochs x images``, which suits ImageNet and leaves a layer that trains on a few
thousand images where it began. So several layers train side by side, with trust coefficients from the published one
upwards, and a tenth of the training images, which none of them sees, chooses among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..metric import MetricUnavailable
from .features import PooledFeatures
from .schedule import warmup_cosine

TRUST = 0.001  # the published trust coefficient
HELD_OUT = 10  # one training image in so many chooses the trust coefficient
_BLOCK = 4096  # features judged at a time


def linear_probe(
    train: PooledFeatures,
    val: PooledFeatures,
    *,
    epochs: int = 90,
    warmup_epochs: int | None = None,
    batch_size: int = 256,
    base_lr: float = 0.1,
    trust_coefficients: Sequence[float] = (TRUST, 10 * TRUST, 100 * TRUST, 1000 * TRUST),
    seed: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Train on one set of images and judge on another.

    Args:
        train: features of the training images.
        val: the same features of other images.
        epochs: passes over the training images.
        warmup_epochs: epochs of linear warm-up; a ninth of all, 10 of 90, if ``None``.
        batch_size: images per step; all, if there are fewer.
        base_lr: learning rate per 256 images of a batch.
        trust_coefficients: of LARS. With one, all training images train.
        seed: of the first weights, the order and the images held out.
        device: where to train.
        advance: called with numbers of steps done; see :func:`num_steps` for their total.

    Returns:
        ``top1`` and ``top5`` (with more than five classes), shares of the ``val`` images; ``majority``, what always
        naming the commonest training class gets; the settings, and a row per trust coefficient. JSON data.

    Raises:
        MetricUnavailable: if labels are unknown, there is one class, or too few images.
        ValueError: for features of another place or size, or numbers out of range.
    """
    warmup_epochs = round(epochs / 9) if warmup_epochs is None else warmup_epochs
    _check(train, val, epochs, warmup_epochs, batch_size, base_lr, trust_coefficients)
    generator = torch.Generator().manual_seed(seed)
    classes, targets = train.labels.unique(return_inverse=True)  # (C,), (N,)
    fitted, chooser = _split(len(train), len(trust_coefficients), generator)
    batch_size = min(batch_size, len(fitted))
    steps = num_steps(len(train), epochs, batch_size, len(trust_coefficients))
    probe = Probe(train.dim, len(classes), len(trust_coefficients), generator).to(device)
    lr, warmup_steps = base_lr * batch_size / 256, round(warmup_epochs / epochs * steps)
    rates = [lr * warmup_cosine(step, steps, warmup_steps) for step in range(steps)]
    batches = itertools.islice(_batches(fitted, batch_size, generator), steps)
    _fit(probe, train, targets, batches, rates, trust_coefficients, advance)

    probe.eval()
    kept = _accuracy(probe, train, targets, chooser, device)  # (T, 2)
    scores = _accuracy(probe, val, class_numbers(val.labels, classes), torch.arange(len(val)), device)  # (T, 2)
    best = max(range(len(kept)), key=lambda head: kept[head].tolist())  # the first one among equals
    commonest = classes[targets.bincount().argmax()]
    trials = [
        {"trust": float(trust), "held_out_top1": float(kept[head, 0]), "top1": float(scores[head, 0])}
        for head, trust in enumerate(trust_coefficients)
    ]
    return {
        "feature": train.kind,
        "layer": train.layer,
        "dim": train.dim,
        "top1": float(scores[best, 0]),
        **({"top5": float(scores[best, 1])} if len(classes) > 5 else {}),
        "majority": float((val.labels == commonest).double().mean()),
        "num_classes": len(classes),
        "num_train": len(train),
        "num_val": len(val),
        "epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "steps": steps,
        "batch_size": batch_size,
        "base_lr": base_lr,
        "trust": float(trust_coefficients[best]),
        "trials": trials if len(chooser) else [],
        "augmentation": "none",
        "seed": seed,
    }


def num_steps(num_train: int, epochs: int = 90, batch_size: int = 256, num_coefficients: int = 4) -> int:
    """Optimizer steps of a probe: only whole batches train."""
    fitted = num_train - (num_train // HELD_OUT if num_coefficients > 1 else 0)
    return epochs * (fitted // min(batch_size, fitted))


class Probe(nn.Module):
    """Batch norm without weights, and some linear layers that train side by side.

    Args:
        dim: D of the features.
        num_classes: C.
        num_heads: T, the number of linear layers; all start alike.
        generator: source of the first weights.
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, dim, num_classes) for _ in range(num_heads))
        weight = nn.init.trunc_normal_(torch.empty(num_classes, dim), std=0.01, generator=generator)
        for head in self.heads:
            head.weight.data.copy_(weight)
            nn.init.zeros_(head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(T, B, C)`` of features ``(B, D)``."""
        normed = self.norm(features)
        return torch.stack([head(normed) for head in self.heads])


def lars(heads: Sequence[nn.Linear], lr: float, trust_coefficients: Sequence[float] = (TRUST,)) -> Optimizer:
    """LARS with momentum 0.9 and no weight decay, with a trust coefficient per linear layer.

    A step of the weights goes along ``trust * |w| / |g| * g``; biases take plain steps, as is usual for vectors.
    """
    from timm.optim.lars import Lars

    groups = []
    for head, trust in zip(heads, trust_coefficients, strict=True):
        # timm adapts parameters without weight decay only where it is told to.
        groups.append({"params": [head.weight], "trust_coeff": trust, "always_adapt": True})
        groups.append({"params": [head.bias], "always_adapt": False})
    return Lars(groups, lr=lr, momentum=0.9)


def _fit(
    probe: Probe,
    train: PooledFeatures,
    targets: Tensor,
    batches: Iterable[Tensor],
    rates: Sequence[float],
    trust_coefficients: Sequence[float],
    advance: Callable[[int], None],
) -> None:
    device = probe.norm.running_mean.device
    optimizer = lars(probe.heads, max(rates), trust_coefficients)
    for rate, positions in zip(rates, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = probe(train.read(positions).to(device))  # (T, B, C)
        wanted = targets[positions].to(device).expand(len(logits), -1)
        # The heads share nothing but the batch norm, which has no weights: the sum is as many losses apart.
        (F.cross_entropy(logits.flatten(0, 1), wanted.flatten()) * len(logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(1)


def class_numbers(labels: Tensor, classes: Tensor) -> Tensor:
    """Place ``(N,)`` of every label among ascending ``classes``, -1 for those that are not there."""
    place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[place] == labels, place, -1)


def _split(length: int, num_coefficients: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions that train and positions that choose; none chooses where there is nothing to choose from."""
    order = torch.randperm(length, generator=generator)
    held_out = length // HELD_OUT if num_coefficients > 1 else 0
    return order[held_out:], order[:held_out]


def _batches(positions: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Whole batches, epoch after epoch, without end."""
    while True:
        order = positions[torch.randperm(len(positions), generator=generator)]
        yield from order[: len(order) // size * size].split(size)


@torch.no_grad()
def _accuracy(
    probe: Probe, features: PooledFeatures, targets: Tensor, positions: Tensor, device: torch.device | str
) -> Tensor:
    """Top-1 and top-5 accuracy of every head, float64 ``(T, 2)``."""
    right = torch.zeros(len(probe.heads), 2, dtype=torch.int64, device=device)
    for block in positions.split(_BLOCK):
        logits = probe(features.read(block).to(device))  # (T, B, C)
        hits = logits.topk(min(5, logits.shape[2]), -1).indices == targets[block].to(device)[:, None]  # (T, B, 5)
        right += torch.stack([hits[..., 0].sum(1), hits.any(-1).sum(1)], 1)
    return right.cpu().double() / max(1, len(positions))


def _check(
    train: PooledFeatures,
    val: PooledFeatures,
    epochs: int,
    warmup_epochs: int,
    batch_size: int,
    base_lr: float,
    trust_coefficients: Sequence[float],
) -> None:
    if (train.kind, train.layer, train.dim) != (val.kind, val.layer, val.dim):
        raise ValueError(
            f"train and val must be the same features; got {train.kind} of {train.layer} ({train.dim}) and {val.kind} "
            f"of {val.layer} ({val.dim})"
        )
    if epochs < 1 or batch_size < 2 or not 0 <= warmup_epochs <= epochs:
        raise ValueError(
            f"needs epochs >= 1, batch_size >= 2 and warmup_epochs from 0 to epochs; got {epochs}, {batch_size} and "
            f"{warmup_epochs}"
        )
    if base_lr <= 0 or not trust_coefficients or min(trust_coefficients) <= 0:
        raise ValueError(
            f"base_lr and trust_coefficients must be positive; got {base_lr} and {tuple(trust_coefficients)}"
        )
    for name, features in (("training", train), ("validation", val)):
        if (features.labels < 0).any():
            raise MetricUnavailable(f"a linear probe needs the class of every image; {name} images have no labels")
    if len(train) < 2 * HELD_OUT or not len(val):
        raise MetricUnavailable(f"a linear probe needs {2 * HELD_OUT} training images and one to judge by")
    if len(train.labels.unique()) < 2:
        raise MetricUnavailable("a linear probe needs two classes; all training images are of one")
