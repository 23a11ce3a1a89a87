"""Proxy codes: the first stage of TiTok's two-stage recipe (arXiv:2406.07550).

A 1D tokenizer learns to predict, for every patch, the code that a frozen 2D tokenizer gives it. No pixels, no
perceptual and no adversarial loss: one classification, which a transformer learns from nothing. The published teacher
is MaskGIT's VQGAN (``maskgit-vqgan-imagenet-f16-256.bin`` of ``fun-research/TiTok``); any tokenizer with one plain
codebook on a grid will do.

The target of an image are the codes of the very same augmented image. The original computes them in float32 with a
one-hot product that nobody reads, about half of the FLOPs of a small student's step; here the encoder runs in bfloat16
and only the search for the codes in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hub.format import fingerprint
from ..hub.load import load
from ..layers.frozen import Frozen
from ..losses.feature_cache import SampleCache
from ..tokenizers.autoencoder import AutoencoderTokenizer
from ..tokenizers.base import Tokenizer
from .objectives import Objective, ObjectiveOutput
from .quantizer_losses import quantizer_loss
from .schedules import Ramp


class ProxyCodeObjective(Objective):
    """Cross entropy with the codes of a frozen teacher, and the quantizer's losses.

    The terms are ``cross_entropy`` (ln K when nothing is known; TiTok-S-128 ends near 3.0), ``accuracy`` (share of the
    patches whose most probable code is the teacher's) and the quantizer's. In eval there is a reconstruction too: the
    teacher decodes the mixture of its codes that the softmax of the logits weighs, as the second stage does.

    Args:
        teacher: what :func:`vistok.load` takes: a folder, a file, or a repository.
        teacher_filename: file in that folder or repository, where it holds several.
        precision: of the teacher's networks, ``bfloat16`` or ``float32``.
        quantizer_weights: weight of each loss that the quantizer returns, over its published defaults: a number (0
            turns the loss off), or a :class:`~vistok.training.schedules.Ramp` over the optimizer steps.
        cache: keeps the codes of the training images on disk (``int16`` holds those of every usual teacher). Only for
            training data that looks the same in every epoch: deterministic crops, no mirror images.

    Raises:
        FileNotFoundError: if there is no such teacher; names what was looked for.
        ValueError: for a teacher that cannot be loaded, or without one plain codebook on a grid.
    """

    def __init__(
        self,
        teacher: str,
        teacher_filename: str | None = None,
        precision: Literal["bfloat16", "float32"] = "bfloat16",
        quantizer_weights: dict[str, float | Ramp] | None = None,
        cache: SampleCache | None = None,
    ) -> None:
        super().__init__()
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be 'bfloat16' or 'float32'; got {precision!r}")
        self.precision = precision
        self.quantizer_weights = dict(quantizer_weights or {})
        self.teacher = Frozen(_load_teacher(teacher, teacher_filename))
        self.cache = cache

    @property
    def needs_fixed_images(self) -> bool:
        return self.cache is not None

    @property
    def num_codes(self) -> int:
        """K, the number of the teacher's codes."""
        return self.teacher.network.codebook_sizes[0]

    def attach(self, tokenizer: Tokenizer) -> None:
        """Check that the tokenizer predicts the teacher's codes.

        Raises:
            ValueError: for a decoder without logits, one with another grid than the teacher's, or a cache that holds
                the codes of another teacher.
        """
        decoder = getattr(tokenizer, "decoder", None)
        if not (isinstance(tokenizer, AutoencoderTokenizer) and hasattr(decoder, "logits")):
            raise ValueError(
                f"proxy codes need a decoder with logits (vistok.decoders.proxy_code.ProxyCodeDecoder); got "
                f"{type(tokenizer).__name__} with {type(decoder).__name__}"
            )
        (stream,) = self.teacher.network.layout(tokenizer.image_size)
        if tuple(decoder.patch_grid) != stream.grid:
            raise ValueError(
                f"the decoder predicts {_by(decoder.patch_grid)} codes; the teacher makes {_by(stream.grid)} of images "
                f"of {_by(tokenizer.image_size)} pixels (patch_size must be the teacher's stride, "
                f"{self.teacher.network.stride})"
            )
        if self.cache is not None:
            size, network = list(tokenizer.image_size), self.teacher.network
            self.cache.bind({"teacher": fingerprint(network), "image_size": size, "precision": self.precision})

    def forward(
        self, tokenizer: Tokenizer, images: Tensor, step: int, batch: Mapping[str, Any] | None = None
    ) -> ObjectiveOutput:
        codes = self._targets(tokenizer, images, batch)  # (B, P)
        output = tokenizer.bottleneck(images)
        logits = tokenizer.decoder.logits(tokenizer.from_quantizer(output.quantized), mask=output.mask)  # (B, P, K)
        if logits.shape != (*codes.shape, self.num_codes):
            raise ValueError(
                f"the decoder's logits (B, P, K) are {tuple(logits.shape)}; the teacher has {codes.shape[1]} codes per "
                f"image, out of num_codes={self.num_codes}"
            )
        entropy = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        terms = {
            "cross_entropy": entropy.detach(),
            "accuracy": (logits.detach().argmax(-1) == codes).float().mean(),
            **{name: value.detach() for name, value in output.losses.items()},
        }
        weights = tokenizer.default_loss_weights
        loss = entropy + quantizer_loss(output.losses, weights, self.quantizer_weights, step)
        reconstruction = None if tokenizer.training else self.reconstruct(logits, images)
        return ObjectiveOutput(loss, output, images, terms, reconstruction)

    def _targets(self, tokenizer: Tokenizer, images: Tensor, batch: Mapping[str, Any] | None) -> Tensor:
        """Codes ``(B, P)`` to predict. The cache knows training images; a validation set has the same indices again."""
        if self.cache is None or not tokenizer.training:
            return self.codes(images)
        if batch is None or "index" not in batch:
            raise ValueError(
                "a cache of codes needs the index of every sample in the batch; got a batch without 'index'"
            )

        def compute(missing: Tensor) -> Tensor:
            return self.codes(images[missing.to(images.device)])

        return self.cache.get_or_compute(batch["index"], compute, images.device).long()

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """The teacher's codes ``(B, P)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        with self._autocast(images):
            (indices,) = self.teacher.network.encode(images).indices.values()
        return indices.squeeze(-1)

    @torch.no_grad()
    def reconstruct(self, logits: Tensor, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` that the teacher makes of logits ``(B, P, K)``."""
        teacher = self.teacher.network
        every = torch.arange(self.num_codes, device=logits.device).view(1, -1, 1)
        (stream,) = teacher.layout((images.shape[2], images.shape[3]))
        with torch.autocast(logits.device.type, enabled=False):
            codebook = teacher.quantizer.decode(every)[0].float()  # (K, D)
            mixture = logits.float().softmax(-1) @ codebook  # (B, P, D)
        with self._autocast(images):
            return teacher.decode_latents(mixture, stream.grid).float()

    def _autocast(self, images: Tensor) -> AbstractContextManager:
        """The teacher's precision, whatever the autocast around the training step."""
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def _load_teacher(source: str, filename: str | None) -> AutoencoderTokenizer:
    """The tokenizer whose codes are predicted, in eval mode."""
    try:
        teacher = load(source, filename=filename)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"teacher={source!r} cannot be loaded: {error}") from error
    except ValueError as error:
        raise ValueError(f"teacher={source!r} cannot be loaded: {error}") from error
    layout = teacher.layout()
    plain = len(layout) == 1 and layout[0].num_subcodes == 1 and layout[0].grid is not None
    if not (isinstance(teacher, AutoencoderTokenizer) and plain):
        streams = [f"{stream.name}: {stream.codebook_sizes} codes, grid {stream.grid}" for stream in layout]
        raise ValueError(
            f"teacher={source!r} must be a tokenizer with one plain codebook on a grid (MaskGITVQGAN, VQGAN); it is a "
            f"{type(teacher).__name__} with the streams [{'; '.join(streams)}]"
        )
    return teacher


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
