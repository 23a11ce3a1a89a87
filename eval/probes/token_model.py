"""Autoregressive probe: how many bits a small language model of the tokens needs per image.

What a generator has to learn are the tokens, and how predictable they are is what a reconstruction does not show: the
fixed rate counts ``log2 K`` bits for each, a model what is left once it has seen the ones before. A transformer of
fixed size trains on most of the images for a fixed number of steps and is judged by held-out ones. Its bits bound the
entropy of the tokens from above and compare tokenizers under one budget. They are no gFID: nothing is sampled.

The model starts as the unigram distribution, exactly, and the weights that predict a validation split best are the ones
that are judged, so with too few images it ends there instead of above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ...layers.transformer import Attention, Block, init_transformer, token_std
from ...tokenizers.base import Stream
from ..metric import MetricUnavailable
from .schedule import warmup_cosine
from .token_slots import Slots

FEWEST_IMAGES = 40
TEST_SHARE, MOST_TEST = 10, 2048  # one image in ten is held out to judge by, and no more than 2048
VALIDATION_SHARE, MOST_VALIDATION = 20, 128
CHECKS = 10  # looks at the validation split
_LOGITS = 1 << 26  # computed at a time: 256 MB in float32
_BLOCK = 4096  # images counted at a time


def token_model_probe(
    tokens: Tensor | np.ndarray,
    layout: Sequence[Stream],
    pixels: int,
    *,
    labels: Tensor | None = None,
    steps: int = 300,
    batch_tokens: int = 2048,
    width: int = 128,
    layers: int = 3,
    heads: int = 4,
    lr: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Train a language model on most of the images and measure its bits on others.

    Args:
        tokens: ``(N, L)`` ids of :meth:`~vistok.tokenizers.base.Tokens.flatten`, of any integer type, -1 where a token
            was dropped; in memory, or mapped from a file.
        layout: of the tokens.
        pixels: of an image, ``H * W``.
        labels: int64 ``(N,)``, classes to condition on, -1 where unknown; unconditional if ``None``.
        steps: optimizer steps.
        batch_tokens: tokens in a batch; whole images, at least one.
        width: of the transformer.
        layers: of the transformer.
        heads: of the transformer.
        lr: peak learning rate of AdamW, after a warm-up of a tenth of the steps and before a cosine.
        seed: of the split, the weights and the order of images.
        device: where to train.
        advance: called with numbers of steps done.

    Returns:
        ``bits_per_token`` (a token is all its sub-codes), ``bits_per_image`` with its standard error over images, and
        ``bits_per_pixel_ar``, of the tokens that were kept; the same of the ``unigram`` distribution, of digits where a
        codebook is split, and at the ``fixed`` rate; the settings. JSON data.

    Raises:
        MetricUnavailable: for too few images.
        ValueError: for tokens that are not of this layout, or numbers out of range.
    """
    _check(tokens, layout, labels, pixels=pixels, steps=steps, batch_tokens=batch_tokens, width=width, layers=layers)
    slots = Slots(layout)
    data = TokenData(tokens, slots, labels, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    test, validation, train = _split(len(tokens), generator)
    counts, _ = _count(data, train)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators too
        model = TokenModel(slots, width, layers, heads, data.num_classes)
    model.start_as(counts)
    model.to(device)
    batches = _batches(train, max(1, batch_tokens // slots.length), generator)
    curve = _fit(model, data, batches, validation, lr, steps, advance)
    test_counts, kept = _count(data, test)
    unigram = -float((test_counts * slots.log_unigram(counts)).sum()) / math.log(2)
    bits, fixed, num_tokens = _bits(model, data, test), float(kept @ slots.bits), float(kept @ slots.share)
    return {
        **_rates(float(bits.sum()), num_tokens, len(test), pixels, suffix="_ar"),
        "bits_per_image_error": float(bits.std()) / math.sqrt(len(test)),
        **_rates(unigram, num_tokens, len(test), pixels, prefix="unigram_"),
        **_rates(fixed, num_tokens, len(test), pixels, prefix="fixed_"),
        "num_train": len(train),
        "num_validation": len(validation),
        "num_test": len(test),
        "class_conditional": data.num_classes > 0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "best_step": min(curve, key=lambda point: point["bits_per_image"])["step"],
        "images_per_step": max(1, batch_tokens // slots.length),
        "sequence_length": slots.length,
        "width": width,
        "layers": layers,
        "heads": heads,
        "lr": lr,
        "seed": seed,
        "validation_curve": curve,
    }


class TokenData:
    """Sequences and classes by image number, brought to a device in batches.

    Args:
        tokens: ``(N, L)``, see :func:`token_model_probe`.
        slots: of their layout.
        labels: int64 ``(N,)`` or ``None``.
        device: where batches go.

    Attributes:
        num_classes: C; unknown classes have number C.
    """

    def __init__(self, tokens: Tensor | np.ndarray, slots: Slots, labels: Tensor | None, device: torch.device) -> None:
        self.slots = slots
        self.device = device
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self._tokens = tokens.cpu().numpy() if isinstance(tokens, Tensor) else tokens
        self._labels = torch.full((len(tokens),), -1) if labels is None else labels

    def sequences(self, images: Tensor) -> Tensor:
        """int64 ``(B, P)`` on the host, -1 at dropped positions, of images ``(B,)``."""
        return self.slots.read(torch.from_numpy(self._tokens[images.numpy()].astype(np.int64)))

    def batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences ``(B, P)`` and classes ``(B,)`` on the device."""
        classes = self._labels[images]
        classes = torch.where(classes < 0, self.num_classes, classes)
        return self.sequences(images).to(self.device), classes.to(self.device)


class CausalAttention(Attention):
    """Self-attention in which a position sees itself and the ones before."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, D)``; takes no mask."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, N, D)


class TokenModel(nn.Module):
    """Decoder-only transformer whose logits at a position cover the ids that can stand there.

    Args:
        slots: the positions.
        width: D.
        layers: number of blocks.
        heads: of attention.
        num_classes: C; one class more stands for an unknown one.
    """

    def __init__(self, slots: Slots, width: int, layers: int, heads: int, num_classes: int = 0) -> None:
        super().__init__()
        self.slots = slots
        scale = token_std(width)
        self.start = nn.Parameter(scale * torch.randn(num_classes + 1, width))
        self.embedding = nn.Parameter(scale * torch.randn(slots.vocab_size + 1, width))  # the last: a dropped token
        self.position = nn.Parameter(scale * torch.randn(slots.length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        for block in self.blocks:
            block.attention = CausalAttention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.zeros(slots.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(slots.vocab_size))
        init_transformer(self, width)
        self.register_buffer("places", torch.cat([positions for _, _, positions in slots.groups]), persistent=False)

    def start_as(self, counts: Tensor) -> None:
        """Predict the unigram distribution of counts ``(V,)``, as long as the head is zero."""
        self.bias.data.copy_(self.slots.log_unigram(counts))

    def forward(self, ids: Tensor, classes: Tensor) -> Tensor:
        """What every id costs given the ones before, in nats: ``(B, P)``, zero where it was dropped.

        Args:
            ids: int64 ``(B, P)``, -1 where dropped.
            classes: int64 ``(B,)``.
        """
        before = self.embedding[ids[:, :-1]]  # -1 is the last row, which stands for a dropped token
        x = torch.cat([self.start[classes, None], before], 1) + self.position  # (B, P, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        costs = torch.zeros(ids.shape, device=ids.device)
        lengths = [len(positions) for _, _, positions in self.slots.groups]
        for (first, size, _), positions in zip(self.slots.groups, self.places.split(lengths), strict=True):
            logits = F.linear(x[:, positions], self.head[first : first + size], self.bias[first : first + size])
            wanted = ids[:, positions]
            wanted = torch.where(wanted < 0, -1, wanted - first)
            costs[:, positions] = F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="none"
            ).view_as(wanted)
        return costs


def _fit(
    model: TokenModel,
    data: TokenData,
    batches: Iterator[Tensor],
    validation: Tensor,
    lr: float,
    steps: int,
    advance: Callable[[int], None],
) -> list[dict[str, float]]:
    """Train; leaves the weights that were best on the validation images, and returns bits per image by step."""
    decayed = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    others = [parameter for parameter in model.parameters() if parameter not in decayed]
    groups = [{"params": list(decayed), "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, steps // 10))
    curve: list[dict[str, float]] = []
    best = {}
    for step in range(steps + 1):
        if step == steps or step % max(1, steps // CHECKS) == 0:
            bits = float(_bits(model, data, validation).mean())
            if bits < min((point["bits_per_image"] for point in curve), default=math.inf):
                best = {name: value.clone() for name, value in model.state_dict().items()}
            curve.append({"step": step, "bits_per_image": bits})
        if step == steps:
            break
        images = next(batches)
        kept = int((data.sequences(images) >= 0).sum())
        for part in images.split(_images_at_a_time(data.slots)):
            (model(*data.batch(part)).sum() / max(1, kept)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        advance(1)
    model.load_state_dict(best)
    return curve


@torch.no_grad()
def _bits(model: TokenModel, data: TokenData, images: Tensor) -> Tensor:
    """Bits of every image, float64 ``(n,)`` on the host."""
    costs = [model(*data.batch(part)).sum(1) for part in images.split(_images_at_a_time(data.slots))]
    return torch.cat(costs).cpu().double() / math.log(2)


def _images_at_a_time(slots: Slots) -> int:
    return max(1, min(64, _LOGITS // sum(ids * len(positions) for _, ids, positions in slots.groups)))


def _count(data: TokenData, images: Tensor) -> tuple[Tensor, Tensor]:
    """How often every id stands in the sequences, ``(V,)``, and how many images keep each position, ``(P,)``."""
    counts = torch.zeros(data.slots.vocab_size, dtype=torch.int64)
    kept = torch.zeros(data.slots.length, dtype=torch.int64)
    for block in images.sort().values.split(_BLOCK):
        ids = data.sequences(block)
        counts += ids[ids >= 0].bincount(minlength=len(counts))
        kept += (ids >= 0).sum(0)
    return counts, kept.double()


def _rates(
    bits: float, num_tokens: float, num_images: int, pixels: int, prefix: str = "", suffix: str = ""
) -> dict[str, float]:
    return {
        f"{prefix}bits_per_token": bits / num_tokens if num_tokens else math.nan,
        f"{prefix}bits_per_image": bits / num_images,
        f"{prefix}bits_per_pixel{suffix}": bits / num_images / pixels,
    }


def _split(num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images that judge, that choose the weights, and that train."""
    order = torch.randperm(num_images, generator=generator)
    test = min(MOST_TEST, num_images // TEST_SHARE)
    validation = min(MOST_VALIDATION, num_images // VALIDATION_SHARE)
    return order[:test], order[test : test + validation], order[test + validation :]


def _batches(images: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches in a new order every epoch, without end; what makes no whole batch sits the epoch out."""
    size = min(size, len(images))
    while True:
        order = images[torch.randperm(len(images), generator=generator)]
        yield from order[: len(order) // size * size].split(size)


def _check(
    tokens: Tensor | np.ndarray, layout: Sequence[Stream], labels: Tensor | None, steps: int, **counts: int
) -> None:
    if not layout:
        raise MetricUnavailable("latents are continuous here: there are no tokens to model")
    length = sum(stream.length * stream.num_subcodes for stream in layout)
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise ValueError(f"tokens must have shape (N, {length}) for this layout; got {tuple(tokens.shape)}")
    if labels is not None and tuple(labels.shape) != (len(tokens),):
        raise ValueError(f"labels must have shape ({len(tokens)},); got {tuple(labels.shape)}")
    if steps < CHECKS:
        raise ValueError(f"steps must be at least {CHECKS}; got {steps}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if len(tokens) < FEWEST_IMAGES:
        raise MetricUnavailable(f"a model of the tokens needs at least {FEWEST_IMAGES} images; got {len(tokens)}")
