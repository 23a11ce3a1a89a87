"""What a linear probe looks at: one vector per image from inside a frozen tokenizer, kept on disk.

GigaTok (arXiv:2504.08736) probes mean-pooled features to see how much a tokenizer knows of what is in the image. There
are several places to look, and published numbers rarely say which, so each has a name: :data:`KINDS`. One pass computes
all of them. Every image is seen once, as evaluation crops it, so a probe trains without augmentation; numbers of probes
that train on random crops are higher or lower by a little, and not the same measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ...data.loader import ImageLoader
from ...data.source import ImageSource, Sample
from ...decoders.adaptive_cnn import AdaptiveCNNDecoder
from ...decoders.cnn import CNNDecoder
from ...decoders.grid_vit import GridViTDecoder
from ...decoders.latent_vit import LatentViTTrunk
from ...decoders.maskgit import MaskGITDecoder
from ...decoders.q_former import QFormerDecoder
from ...hub.format import fingerprint
from ...losses.feature_cache import SampleCache
from ...tokenizers.base import Tokenizer
from ..metric import MetricUnavailable
from ..processes import Processes

Kind = Literal["encoder", "latents", "quantized", "decoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""``encoder``: what the encoder puts out. ``latents``: the same after the projection to the quantizer's dimension, if
there is one. ``quantized``: the codes, as the decoder gets them. ``decoder``: a layer inside the decoder."""

# The normalised output of the last transformer layer; of a convolutional decoder the middle, which has the lowest
# resolution and the most channels: the layers after it turn features into pixels.
_DECODER_LAYERS: dict[type[nn.Module], str] = {
    LatentViTTrunk: "decoder.norm_out",
    QFormerDecoder: "decoder.norm_out",
    GridViTDecoder: "decoder.vit",
    CNNDecoder: "decoder.middle",
    AdaptiveCNNDecoder: "decoder.middle",
    MaskGITDecoder: "decoder.middle",
}


@dataclass
class PooledFeatures:
    """Features of the images of one source, mean over tokens.

    Attributes:
        kind: where they come from, see :data:`KINDS`.
        layer: the module that put them out.
        rows: float32 ``(M, D)``, on disk, M the length of the source.
        index: int64 ``(N,)`` ascending, the rows that count: the images that were chosen and could be read.
        labels: int64 ``(N,)``, class of each.
    """

    kind: str
    layer: str
    rows: np.ndarray
    index: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]

    def read(self, positions: Tensor) -> Tensor:
        """Features ``(B, D)`` at positions ``(B,)``, each from 0 to N - 1."""
        return torch.from_numpy(self.rows[self.index[positions.numpy()]])


def extract_features(
    tokenizer: Tokenizer,
    source: ImageSource,
    transform: Callable[[Tensor], Tensor],
    folder: Path,
    kinds: Sequence[Kind] = ("encoder", "quantized"),
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda images: None,
    *,
    plan: Mapping[str, Any] | None = None,
    chosen: Sequence[int] | np.ndarray | None = None,
    decoder_layer: str | None = None,
    autocast: torch.dtype | None = None,
    processes: Processes | None = None,
) -> dict[str, PooledFeatures]:
    """Features of every image, computed or, where an earlier call has left them in the folder, read.

    A run that was killed goes on with the images that are missing, and so does one with more of ``chosen`` or
    ``kinds``. Images that cannot be read are left out (the loader logs them).

    Args:
        tokenizer: in eval, on the device.
        source: labelled images.
        transform: uint8 ``(3, H, W)`` of a file to uint8 ``(3, h, w)``.
        folder: where features are kept, of this source alone; ``N x D x 4`` bytes per kind.
        kinds: see :data:`KINDS`.
        batch_size: images at a time.
        num_workers: processes that read images.
        device: of the tokenizer.
        advance: called with numbers of images done, those of an earlier call first.
        plan: what the features depend on besides the tokenizer (dataset, crop), as JSON data.
        chosen: numbers of the images to take; all if ``None``.
        decoder_layer: path of a module in the tokenizer for the kind ``decoder``; by the class of the decoder if
            ``None``: the normed output of the last transformer layer, or the middle of a convolutional decoder.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to run the tokenizer in mixed precision.
        processes: those of one machine that share the work; this one alone if ``None``.

    Returns:
        By kind.

    Raises:
        MetricUnavailable: if an image has no label, or the tokenizer has no such features.
        ValueError: for an unknown kind or layer, no images, or a folder that holds features of something else.
    """
    processes = processes or Processes()
    source.prepare()
    layers = _layers(tokenizer, kinds, decoder_layer)
    made_by = {"tokenizer": fingerprint(tokenizer), "autocast": str(autocast), **(plan or {})}
    caches = {kind: _Table(str(folder / kind), len(source)) for kind in layers}
    for kind, cache in caches.items():
        cache.bind({**made_by, "kind": kind, "layer": layers[kind]})
    labels = _Table(str(folder / "labels"), len(source), "int64")
    labels.bind(dict(plan or {}))

    tables = (*caches.values(), labels)
    numbers = np.arange(len(source)) if chosen is None else np.unique(np.asarray(chosen, dtype=np.int64))
    missing = numbers[~_present(tables, numbers)]
    processes.barrier()  # nobody writes before everybody has looked
    if processes.rank == 0:
        advance(len(numbers) - len(missing))
    mine = missing[processes.rank :: processes.world_size]
    if len(mine):
        loader = ImageLoader(
            _Chosen(source, mine),
            transform,
            batch_size,
            training=False,
            seed=0,
            num_workers=min(num_workers, (len(mine) - 1) // batch_size),
            pin_memory=torch.device(device).type == "cuda",
        )
        with closing(loader), listening(tokenizer, layers) as features:
            for batch in loader:
                _keep(batch, torch.from_numpy(mine)[batch["index"]], features, caches, labels, device, autocast)
                advance(len(batch["index"]) + len(batch["skipped"]))
    processes.barrier()

    index = numbers[_present(tables, numbers)]
    if not len(index):
        raise ValueError(f"none of the {len(numbers)} images for the probe could be read")
    classes = torch.from_numpy(labels.table[index, 0])
    return {kind: PooledFeatures(kind, layers[kind], caches[kind].table, index, classes) for kind in caches}


@contextmanager
def listening(tokenizer: Tokenizer, layers: Mapping[str, str]) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
    """Yield a function from images ``(B, 3, H, W)`` in [0, 1] to pooled features ``(B, D)`` of every kind.

    Args:
        tokenizer: it listens to its layers inside the block only.
        layers: kind -> layer.
    """
    heard: dict[str, Tensor] = {}
    hooks = []
    for kind in ("encoder", "decoder"):
        if kind in layers:
            layer = tokenizer.get_submodule(layers[kind])
            hooks.append(
                layer.register_forward_hook(lambda module, inputs, output, kind=kind: heard.update({kind: output}))
            )
    # Without the decoder, a tokenizer that can stop before it does.
    run = tokenizer if "decoder" in layers else getattr(tokenizer, "bottleneck", tokenizer)

    @torch.no_grad()
    def features(images: Tensor) -> dict[str, Tensor]:
        output = run(images)
        heard.update(latents=output.latents, quantized=output.quantized)
        result = {kind: _pooled(heard[kind], layers[kind]) for kind in layers}
        heard.clear()
        return result

    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(hidden: Any, layer: str) -> Tensor:
    """Mean over tokens, or over the positions of a map, in float32: ``(B, D)``."""
    if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4):
        kind = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"layer {layer!r} must put out (B, L, D) or (B, D, h, w); got {kind}")
    return hidden.float().mean(1 if hidden.ndim == 3 else (2, 3))


def kinds_of(tokenizer: Tokenizer) -> list[Kind]:
    """The kinds of features that a tokenizer has without naming a layer, without ``latents``."""
    found: list[Kind] = []
    for kind in ("encoder", "quantized", "decoder"):
        try:
            _layers(tokenizer, [kind], None)
        except (MetricUnavailable, ValueError):
            continue
        found.append(kind)
    return found


def _layers(tokenizer: Tokenizer, kinds: Sequence[str], decoder_layer: str | None) -> dict[str, str]:
    """The module behind every kind of features."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}")
    modules = dict(tokenizer.named_modules())
    name = type(tokenizer).__name__
    layers = {"encoder": "encoder", "latents": "input of the bottleneck", "quantized": "output of the bottleneck"}
    if "encoder" in kinds and "encoder" not in modules:
        raise MetricUnavailable(f"{name} has no module called encoder; take latents or quantized")
    decodes = "decoder" in kinds or not hasattr(tokenizer, "bottleneck")
    if decodes and tokenizer.takes_context:
        raise MetricUnavailable(f"the decoder of {name} reads text; take the features encoder, latents or quantized")
    if "decoder" in kinds:
        decoder = modules.get("decoder")
        if not getattr(decoder, "makes_images", True):
            raise MetricUnavailable(f"the decoder of this {name} makes no images; take encoder, latents or quantized")
        found = [path for kind, path in _DECODER_LAYERS.items() if isinstance(decoder, kind)]
        if decoder_layer is None and not found:
            raise ValueError(f"decoder_layer is needed for a decoder of class {type(decoder).__name__}: name a module")
        layers["decoder"] = decoder_layer or found[0]
        if layers["decoder"] not in modules:
            raise ValueError(f"decoder_layer {layers['decoder']!r} is no module of this {name}")
    return {kind: layers[kind] for kind in KINDS if kind in kinds}


def _keep(
    batch: Mapping[str, Any],
    numbers: Tensor,
    features: Callable[[Tensor], dict[str, Tensor]],
    caches: Mapping[str, _Table],
    labels: _Table,
    device: torch.device | str,
    autocast: torch.dtype | None,
) -> None:
    """Compute the features of a batch and write them; labels last."""
    if (batch["label"] < 0).any():
        first = batch["key"][int((batch["label"] < 0).nonzero()[0])]
        raise MetricUnavailable(f"a linear probe needs labels, and {first} has none; use a folder per class, or shards")
    images = batch["image"].to(device, non_blocking=True).float() / 255
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        pooled = features(images)
    for kind, rows in pooled.items():
        rows = rows.cpu()
        caches[kind].get_or_compute(numbers, lambda missing, rows=rows: rows[missing])
    labels.get_or_compute(numbers, lambda missing: batch["label"][missing, None])


class _Table(SampleCache):
    """A cache of which one may ask what it holds."""

    def __init__(self, folder: str, num_samples: int, dtype: Literal["float32", "int64"] = "float32") -> None:
        super().__init__(folder, num_samples, dtype)

    @property
    def table(self) -> np.ndarray:
        """All rows ``(M, D)``; those that are not there are zero."""
        self._open()
        return np.empty((self.num_samples, 1), self.dtype) if self._rows is None else self._rows

    def present(self, numbers: np.ndarray) -> np.ndarray:
        """bool ``(n,)``, which of these rows are there."""
        self._open()
        return np.zeros(len(numbers), dtype=bool) if self._present is None else self._present[numbers] != 0


def _present(tables: Sequence[_Table], numbers: np.ndarray) -> np.ndarray:
    """Which images are in all tables, bool ``(n,)``."""
    return np.logical_and.reduce([table.present(numbers) for table in tables])


class _Chosen(ImageSource):
    """Some images of a source."""

    def __init__(self, source: ImageSource, numbers: np.ndarray) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Sample:
        return self.source.read(int(self.numbers[index]))
