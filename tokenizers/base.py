"""The tokenizer contract: images in, :class:`Tokens` out, and back.

Images are ``(B, 3, H, W)`` float in [0, 1] at every public door. Tokens are int64 ``(B, N, G)`` per stream: N tokens of
G sub-codes each. A tokenizer may write several streams of different lengths (a holistic one and a patch grid, the
scales of a pyramid), tokens may carry several sub-codes (groups, residual depth), and positions may be dropped; a bare
``(B, N)`` tensor can say none of these, :class:`Tokens` says all of them and still flattens into one sequence of ids
for a language model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers.configurable import Configurable


@dataclass(frozen=True)
class Stream:
    """One rectangular block of indices.

    Attributes:
        name: what the stream holds: ``"image"``, ``"semantic"``, ``"scale_3"`` ...
        length: N, the number of tokens.
        codebook_sizes: number of codes of each sub-code; its length is G.
        grid: ``(h, w)`` if the tokens lie on a grid in raster order, else ``None``.
    """

    name: str
    length: int
    codebook_sizes: tuple[int, ...]
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(int(size) for size in self.codebook_sizes))
        if self.length < 1:
            raise ValueError(f"stream {self.name!r}: length must be at least 1; got {self.length}")
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"stream {self.name!r}: codebook_sizes needs one positive size per sub-code; got {self.codebook_sizes}"
            )
        if self.grid is not None:
            object.__setattr__(self, "grid", (int(self.grid[0]), int(self.grid[1])))
            if self.grid[0] * self.grid[1] != self.length:
                raise ValueError(f"stream {self.name!r}: grid {self.grid} does not hold {self.length} tokens")

    @property
    def num_subcodes(self) -> int:
        """G, the number of indices per token."""
        return len(self.codebook_sizes)

    @property
    def bits(self) -> float:
        """Bits of one token at a fixed rate."""
        return float(sum(math.log2(size) for size in self.codebook_sizes))


@dataclass
class Tokens:
    """What ``encode`` returns, files store and ``decode`` takes.

    Attributes:
        indices: stream name -> int64 ``(B, N, G)``; ``-1`` at dropped positions.
        layout: the streams, in order.
        mask: stream name -> bool ``(B, N)``, ``True`` = keep; ``None`` = everything is kept.

    Raises:
        TypeError: for indices that are not int64 or masks that are not bool.
        ValueError: for streams or shapes that do not match the layout.
    """

    indices: dict[str, Tensor]
    layout: tuple[Stream, ...]
    mask: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.layout = tuple(self.layout)
        names = [stream.name for stream in self.layout]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"layout needs at least one stream, each with a name of its own; got {names}")
        if set(self.indices) != set(names):
            raise ValueError(f"indices hold the streams {sorted(self.indices)}; the layout names {names}")
        if self.mask is not None and set(self.mask) != set(names):
            raise ValueError(f"mask holds the streams {sorted(self.mask)}; the layout names {names}")
        batch = self.indices[names[0]].shape[0] if self.indices[names[0]].ndim else 0
        for stream in self.layout:
            ids = self.indices[stream.name]
            if ids.dtype != torch.int64:
                raise TypeError(f"indices of stream {stream.name!r} must be int64; got {ids.dtype}")
            expected = (batch, stream.length, stream.num_subcodes)
            if tuple(ids.shape) != expected:
                raise ValueError(
                    f"indices of stream {stream.name!r} must have shape (B, N, G) = {expected}; got {tuple(ids.shape)}"
                )
            if self.mask is None:
                continue
            keep = self.mask[stream.name]
            if keep.dtype != torch.bool:
                raise TypeError(f"mask of stream {stream.name!r} must be bool (True = keep); got {keep.dtype}")
            if tuple(keep.shape) != expected[:2]:
                raise ValueError(
                    f"mask of stream {stream.name!r} must have shape (B, N) = {expected[:2]}; got {tuple(keep.shape)}"
                )
        if self.mask is not None:
            self.indices = {
                name: ids.masked_fill(~self.mask[name].unsqueeze(-1), -1) for name, ids in self.indices.items()
            }

    def __len__(self) -> int:
        """B, the number of images."""
        return self.indices[self.layout[0].name].shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        """The tokens of some images of the batch: a slice, a bool or an index tensor."""
        mask = None if self.mask is None else {name: keep[rows] for name, keep in self.mask.items()}
        return Tokens({name: ids[rows] for name, ids in self.indices.items()}, self.layout, mask)

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Join batches of one layout.

        Raises:
            ValueError: for no parts, or parts of different layouts.
        """
        if not parts:
            raise ValueError("Tokens.cat needs at least one part; got none")
        layout = parts[0].layout
        for part in parts:
            if part.layout != layout:
                raise ValueError(f"tokens of different layouts cannot be joined: {layout} and {part.layout}")
        names = [stream.name for stream in layout]
        mask = None
        if any(part.mask is not None for part in parts):
            masks = [part.mask or {name: (part.indices[name] >= 0).any(-1) for name in names} for part in parts]
            mask = {name: torch.cat([m[name] for m in masks]) for name in names}
        return cls({name: torch.cat([part.indices[name] for part in parts]) for name in names}, layout, mask)

    def to(self, device: torch.device | str) -> Tokens:
        """Move to a device."""
        mask = None if self.mask is None else {name: keep.to(device) for name, keep in self.mask.items()}
        return Tokens({name: ids.to(device) for name, ids in self.indices.items()}, self.layout, mask)

    def validate(self, codebook_sizes: dict[str, tuple[int, ...]] | None = None) -> Tokens:
        """Check every index against its codebook; returns the tokens themselves.

        Args:
            codebook_sizes: sizes by stream name; those of the layout if ``None``.

        Raises:
            ValueError: naming the first index that is neither -1 nor a code, and the codebook size.
        """
        for stream in self.layout:
            sizes = stream.codebook_sizes if codebook_sizes is None else codebook_sizes[stream.name]
            ids = self.indices[stream.name]
            bad = (ids < -1) | (ids >= torch.tensor(sizes, device=ids.device))
            if bad.any():
                image, position, subcode = bad.nonzero()[0].tolist()
                value = int(ids[image, position, subcode])
                raise ValueError(
                    f"stream {stream.name!r}: index {value} of image {image}, token {position}, sub-code {subcode} is "
                    f"out of range; the codebook has {sizes[subcode]} codes (0 to {sizes[subcode] - 1}, -1 = dropped)"
                )
        return self

    @property
    def vocab_size(self) -> int:
        """Number of distinct ids that :meth:`flatten` can write: every sub-code of every stream has its own range."""
        return sum(sum(stream.codebook_sizes) for stream in self.layout)

    def flatten(self) -> Tensor:
        """All tokens as one sequence of ids in one vocabulary, ``(B, L)`` int64, for a language model.

        Streams follow one another in layout order, the sub-codes of a token stand side by side, and every sub-code of
        every stream has a range of its own in the vocabulary (a plain VQ keeps its indices as they are). Dropped
        positions stay ``-1``.
        """
        parts, offset = [], 0
        for stream in self.layout:
            ids = self.indices[stream.name]
            offsets = _offsets(stream, offset, ids.device)  # (G,)
            parts.append(torch.where(ids < 0, ids, ids + offsets).flatten(1))  # (B, N * G)
            offset += sum(stream.codebook_sizes)
        return torch.cat(parts, 1)  # (B, L)

    @classmethod
    def unflatten(cls, ids: Tensor, layout: Sequence[Stream]) -> Tokens:
        """The inverse of :meth:`flatten`.

        Raises:
            TypeError: for ids that are not int64.
            ValueError: if ``ids`` is not ``(B, L)`` for this layout, or an id lies outside its sub-code's range.
        """
        length = sum(stream.length * stream.num_subcodes for stream in layout)
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64; got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[1] != length:
            raise ValueError(f"ids must have shape (B, {length}) for this layout; got {tuple(ids.shape)}")
        indices, start, offset = {}, 0, 0
        for stream in layout:
            width = stream.length * stream.num_subcodes
            part = ids[:, start : start + width].reshape(len(ids), stream.length, stream.num_subcodes)
            offsets = _offsets(stream, offset, ids.device)
            shifted = torch.where(part < 0, part, part - offsets)
            bad = (part >= 0) & (shifted < 0)
            if bad.any():
                image, position, subcode = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"id {int(part[image, position, subcode])} of image {image} stands at a place of stream "
                    f"{stream.name!r}, whose sub-code {subcode} has ids from {int(offsets[subcode])}"
                )
            indices[stream.name] = shifted
            start += width
            offset += sum(stream.codebook_sizes)
        mask = None
        if (ids < 0).any():
            mask = {name: (part >= 0).any(-1) for name, part in indices.items()}
        return cls(indices, tuple(layout), mask).validate()

    def truncate(self, num_tokens: int) -> Tokens:
        """The first ``num_tokens`` tokens, streams taken in layout order; a stream left empty goes.

        Raises:
            ValueError: if ``num_tokens`` is not between 1 and the number of tokens.
        """
        total = sum(stream.length for stream in self.layout)
        if not 1 <= num_tokens <= total:
            raise ValueError(f"num_tokens must lie between 1 and {total}; got {num_tokens}")
        layout, indices, left = [], {}, num_tokens
        for stream in self.layout:
            keep = min(stream.length, left)
            if keep == 0:
                break
            layout.append(stream if keep == stream.length else replace(stream, length=keep, grid=None))
            indices[stream.name] = self.indices[stream.name][:, :keep]
            left -= keep
        mask = None
        if self.mask is not None:
            mask = {stream.name: self.mask[stream.name][:, : stream.length] for stream in layout}
        return Tokens(indices, tuple(layout), mask)

    @property
    def bits(self) -> float:
        """Bits per image at a fixed rate; with a mask, the batch mean over the kept tokens."""
        if self.mask is None:
            return float(sum(stream.length * stream.bits for stream in self.layout))
        kept = {name: float(keep.sum()) / max(len(self), 1) for name, keep in self.mask.items()}
        return float(sum(kept[stream.name] * stream.bits for stream in self.layout))


def _offsets(stream: Stream, start: int, device: torch.device) -> Tensor:
    """First id of every sub-code of a stream whose own range begins at ``start``, ``(G,)``."""
    sizes = torch.tensor((start, *stream.codebook_sizes[:-1]), device=device)
    return sizes.cumsum(0)


@dataclass
class TokenizerOutput:
    """What ``Tokenizer.forward`` returns to a training objective.

    Attributes:
        latents: ``(B, N, D)`` encoder latents before the quantizer.
        quantized: ``(B, N', D)`` latents as the decoder gets them, after quantizer and regularizers; ``N' < N`` if a
            regularizer cut the sequence.
        tokens: the indices, of the full sequence; ``None`` for a tokenizer without codes.
        losses: unweighted scalar losses of quantizer and regularizers.
        statistics: detached tensors, ``counts`` among them (see :class:`~vistok.quantizers.base.Quantized`).
        decoded: what the decoder returns: for a pixel decoder images ``(B, 3, H, W)``, nominally in [0, 1] and not
            clamped; ``None`` where the objective runs the decoder itself (flows have no reconstruction in training).
        mask: ``(B, N')`` bool, ``True`` = the decoder sees the token; ``None`` if it sees all of ``quantized``.
    """

    latents: Tensor
    quantized: Tensor
    tokens: Tokens | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    decoded: Tensor | None = None
    mask: Tensor | None = None


class Tokenizer(Configurable):
    """Base class of all tokenizers: images to tokens and back."""

    @property
    def default_loss_weights(self) -> Mapping[str, float]:
        """Published weight of every loss in ``forward(...).losses``."""
        return {}

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """The codebooks that ``forward(...).statistics["counts"]`` counts, one after another."""

    @property
    def variable_length(self) -> bool:
        """Whether :meth:`decode` is trained on prefixes of the sequence (``tokens.truncate(n)``)."""
        return False

    @property
    def takes_context(self) -> bool:
        """Whether :meth:`forward` and :meth:`decode` need conditioning features (text)."""
        return False

    def commit_update(self) -> None:
        """Called once after every optimizer step; see :meth:`~vistok.quantizers.base.Quantizer.commit_update`."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tokens:
        """Tokens of images ``(B, 3, H, W)`` float in [0, 1]: deterministic, without gradient."""

    @abstractmethod
    def decode(self, tokens: Tokens, *, clamp: bool = True, context: Tensor | None = None) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1] of tokens; ``clamp=False`` returns the decoder's output as it is.

        ``decode(encode(x), clamp=False)`` equals ``forward(x).decoded`` in eval, bit for bit.

        Args:
            tokens: of this tokenizer.
            clamp: bring the pixels into [0, 1].
            context: ``(B, T, C)`` conditioning features, for tokenizers with :attr:`takes_context`.
        """

    @abstractmethod
    def forward(self, images: Tensor, *, context: Tensor | None = None) -> TokenizerOutput:
        """Everything a training objective needs of one batch; ``context`` as in :meth:`decode`."""

    @abstractmethod
    def layout(self, image_size: tuple[int, int] | None = None) -> tuple[Stream, ...]:
        """The streams that :meth:`encode` writes for images of ``(H, W)``; the native size if ``None``."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Native ``(H, W)``: the size that images are brought to before :meth:`encode` unless a user says otherwise."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Height and width of an image must be divisible by this many pixels."""

    @property
    @abstractmethod
    def any_image_size(self) -> bool:
        """Whether :meth:`encode` takes every size divisible by :attr:`stride`, or only :attr:`image_size`."""

    def check_images(self, images: Tensor) -> None:
        """Raise unless ``images`` is floating ``(B, 3, H, W)`` of a size that this tokenizer takes.

        Raises:
            TypeError: for integer images (uint8 pixels must be divided by 255 first).
            ValueError: for a wrong shape or size.
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be float in [0, 1]; got {images.dtype} (uint8 pixels: images.float() / 255)")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W); got {tuple(images.shape)}")
        size = (images.shape[2], images.shape[3])
        if not self.any_image_size and size != self.image_size:
            raise ValueError(
                f"this {type(self).__name__} takes images of {self.image_size[0]}x{self.image_size[1]} pixels; "
                f"got {size[0]}x{size[1]}"
            )
        if size[0] % self.stride or size[1] % self.stride:
            raise ValueError(f"image height and width must be divisible by {self.stride}; got {size[0]}x{size[1]}")

    def save_pretrained(
        self, path: str | Path, *, metadata: dict[str, Any] | None = None, crop: str = "center"
    ) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a model card; see :func:`vistok.hub.save.save`."""
        from ..hub.save import save

        return save(self, path, metadata=metadata, crop=crop)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload tokenizer",
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Upload to a model repository of the Hugging Face Hub; see :func:`vistok.hub.save.push`."""
        from ..hub.save import push

        return push(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            metadata=metadata,
        )
