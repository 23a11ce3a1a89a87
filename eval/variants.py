"""Ways to a reconstruction: all tokens, a prefix of them, perturbed tokens, a codec, a file that somebody made.

One pass over the data evaluates any number of them: an image is read and encoded once, and every variant makes its own
reconstruction from the same originals and the same tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..data.images import to_uint8
from ..tokenizers.base import Tokenizer, Tokens
from .metric import Originals, Pairs

T = TypeVar("T")
Rounding = Literal["nearest", "half_up", "truncate"]


class Variant(ABC):
    """One way to make a reconstruction of every image.

    Attributes:
        name: unique among the variants of an evaluation: ``"reconstruction"``, ``"length=32"``, ``"jpeg/q=50"``.
        kind: ``"reconstruction"``, ``"length"``, ``"perturbed"``, ``"codec"`` or ``"originals"``.
        settings: what tells it from others of its kind, as JSON data.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = {}

    @abstractmethod
    def reconstruct(self, originals: Originals) -> Pairs:
        """The pairs of a batch; runs without gradient."""


class OriginalsVariant(Variant):
    """The originals themselves: for metrics that gather statistics of the reference."""

    name = kind = "originals"

    def reconstruct(self, originals: Originals) -> Pairs:
        return Pairs(originals, originals.images)


class GivenVariant(Variant):
    """Reconstructions that came with the images, made by anybody."""

    name = kind = "reconstruction"

    def reconstruct(self, originals: Originals) -> Pairs:
        if originals.targets is None:
            raise ValueError("these images came without reconstructions")
        return Pairs(originals, originals.targets)


class Codes:
    """A tokenizer as an evaluation uses it: uint8 images in, uint8 images out, encoded once per batch.

    Args:
        tokenizer: in eval, on the device of the images.
        rounding: how floats become uint8: to the ``nearest`` level, ``half_up`` (ADM's ``127.5 x + 128`` cut off), or
            ``truncate``.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to run the tokenizer in mixed precision.

    Raises:
        ValueError: for another rounding.
    """

    def __init__(
        self, tokenizer: Tokenizer, rounding: Rounding = "nearest", autocast: torch.dtype | None = None
    ) -> None:
        if rounding not in ("nearest", "half_up", "truncate"):
            raise ValueError(f"rounding must be 'nearest', 'half_up' or 'truncate'; got {rounding!r}")
        self.tokenizer = tokenizer
        self.rounding = rounding
        self.autocast = autocast

    def tokens(self, originals: Originals) -> Tokens:
        """The tokens of a batch."""
        return originals.once(("tokens", id(self)), lambda: self.run(self.tokenizer.encode, originals.images))

    def decode(self, tokens: Tokens) -> Tensor:
        """uint8 ``(B, 3, H, W)``."""
        with torch.no_grad(), self._autocast(next(iter(tokens.indices.values()))):
            return quantize_pixels(self.tokenizer.decode(tokens), self.rounding)

    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 ``(B, 3, H, W)`` to what the tokenizer makes of them, through the tokens if it has any."""
        if self.tokenizer.layout():
            return self.decode(self.run(self.tokenizer.encode, images))
        return quantize_pixels(self.run(lambda pixels: self.tokenizer(pixels).decoded, images), self.rounding)

    def run(self, function: Callable[[Tensor], T], images: Tensor) -> T:
        """What a function makes of uint8 images as the tokenizer takes them, in its precision, without gradient."""
        with torch.no_grad(), self._autocast(images):
            return function(images.float() / 255)

    def _autocast(self, tensor: Tensor) -> torch.autocast:
        return torch.autocast(tensor.device.type, self.autocast, enabled=self.autocast is not None)


class TokenizerVariant(Variant):
    """What a tokenizer makes of all its tokens, or of the first ``num_tokens``.

    Args:
        codes: the tokenizer.
        num_tokens: length of the prefix to decode; all if ``None``.
    """

    def __init__(self, codes: Codes, num_tokens: int | None = None) -> None:
        self.codes = codes
        self.num_tokens = num_tokens
        self.name = self.kind = "reconstruction"
        if num_tokens is not None:
            self.name, self.kind, self.settings = f"length={num_tokens}", "length", {"num_tokens": num_tokens}

    def reconstruct(self, originals: Originals) -> Pairs:
        if not self.codes.tokenizer.layout():  # continuous latents: nothing to count
            return Pairs(originals, self.codes.reconstruct(originals.images))
        tokens = self.codes.tokens(originals)
        if self.num_tokens is not None:
            tokens = tokens.truncate(self.num_tokens)
        return Pairs(originals, self.codes.decode(tokens), tokens, token_bits(tokens))


def quantize_pixels(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Float images in [0, 1], clamped, as uint8 on their device; see :class:`Codes`."""
    if rounding == "nearest":
        return to_uint8(images)
    levels = images.detach().float().clamp(0, 1) * 255
    return (levels + 0.5 if rounding == "half_up" else levels).to(torch.uint8)


def token_bits(tokens: Tokens) -> Tensor:
    """Bits of every image at a fixed rate, over the tokens that are kept: float64 ``(B,)`` on the host."""
    bits = torch.zeros(len(tokens), dtype=torch.float64)
    for stream in tokens.layout:
        kept = (tokens.indices[stream.name] >= 0).any(-1).sum(1).cpu()  # (B,)
        bits += kept.double() * stream.bits
    return bits
