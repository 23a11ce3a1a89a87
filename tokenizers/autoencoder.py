"""Any encoder, any quantizer, any token regularizers, any decoder: the tokenizer that YAML can compose freely.

The published single-stream systems (TiTok, VQGAN ...) are subclasses that only choose the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..decoders.base import Decoder
from ..encoders.base import Encoder
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from ..regularizers.tail_drop import TailTokenDrop
from .base import Stream, TokenizerOutput, Tokens
from .encoder_decoder import EncoderDecoderTokenizer, weight_dtype


class AutoencoderTokenizer(EncoderDecoderTokenizer):
    """Encoder, quantizer, regularizers and decoder in a row.

    The tokens are one stream named ``image``, or one per block where the quantizer arranges its indices in blocks
    (``scale_0``, ``scale_1`` ... of multi-scale residual quantization). A quantizer sees the tokens of an encoder with
    a grid as ``(B, h, w, D)``, all others as ``(B, N, D)``.

    Args:
        encoder: image to latents.
        quantizer: latents to codes.
        decoder: quantized latents to image.
        regularizers: act on the quantized latents in training, in this order.
        image_size: native side or ``(H, W)`` for encoders that take any size; an encoder of fixed size brings its own.
        pixel_range: encoder and decoder work in this range; [0, 1] images are mapped to it and back.
        projections: linear layers around the quantizer: ``auto`` where dimensions differ, ``always`` (VQGAN).

    Raises:
        ValueError: for an image size that the encoder does not take, or an unknown ``projections``.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        regularizers: Sequence[Regularizer] = (),
        image_size: int | tuple[int, int] | None = None,
        pixel_range: tuple[float, float] = (0.0, 1.0),
        projections: str = "auto",
    ) -> None:
        if projections not in ("auto", "always"):
            raise ValueError(f"projections must be 'auto' or 'always'; got {projections!r}")
        super().__init__(encoder, image_size, pixel_range)
        self.to_quantizer = _projection(encoder.out_dim, quantizer.dim, projections)
        self.quantizer = quantizer
        self.regularizers = nn.ModuleList(regularizers)
        self.from_quantizer = _projection(quantizer.dim, decoder.in_dim, projections)
        self.decoder = decoder

    @property
    def default_loss_weights(self) -> Mapping[str, float]:
        return self.quantizer.default_loss_weights

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.quantizer.codebook_sizes

    @property
    def variable_length(self) -> bool:
        return any(isinstance(part, TailTokenDrop) for part in self.regularizers)

    def layout(self, image_size: tuple[int, int] | None = None) -> tuple[Stream, ...]:
        size = self.image_size if image_size is None else image_size
        streams = []
        for block in self.quantizer.index_blocks(self._token_axes(size)):
            grid = (block.shape[0], block.shape[1]) if len(block.shape) == 2 else None
            sizes = self.quantizer.codebook_sizes[slice(*block.columns)]
            streams.append(Stream(block.name or "image", block.length, sizes, grid))
        return tuple(streams)

    def _token_axes(self, size: tuple[int, int]) -> tuple[int, ...]:
        return self.encoder.grid(size) or (self.encoder.num_tokens(size),)

    def _to_tokens(self, indices: Tensor, size: tuple[int, int]) -> Tokens:
        """Indices ``(B, *S, G)`` of a quantizer -> the streams of the layout."""
        flat, start, streams = indices.flatten(1, -2), 0, {}
        for block in self.quantizer.index_blocks(self._token_axes(size)):
            part = flat[:, start : start + block.length, slice(*block.columns)]
            streams[block.name or "image"] = part.contiguous()
            start += block.length
        return Tokens(streams, self.layout(size))

    def _to_indices(self, tokens: Tokens) -> Tensor:
        """Streams -> indices ``(B, *S, G)`` as the quantizer decodes them.

        A prefix of a 1D stream, or the first streams of several, is enough: the rest counts as dropped.

        Raises:
            ValueError: for streams or codebooks that are not this tokenizer's.
        """
        native = self.layout()
        names = [stream.name for stream in tokens.layout]
        if names != [stream.name for stream in native][: len(names)]:
            raise ValueError(
                f"{type(self).__name__} decodes {_streams(stream.name for stream in native)}; got {_streams(names)}"
            )
        for stream, own in zip(tokens.layout, native, strict=False):
            if stream.codebook_sizes != own.codebook_sizes:
                raise ValueError(
                    f"these tokens were made with codebooks of {stream.codebook_sizes} codes; "
                    f"this {type(self).__name__} has {own.codebook_sizes}"
                )
        tokens.validate()
        if len(native) == 1:
            (stream,) = tokens.layout
            indices = tokens.indices[stream.name]
            return indices if stream.grid is None else indices.unflatten(1, stream.grid)
        batch, device = len(tokens.indices[names[0]]), tokens.indices[names[0]].device
        length = sum(stream.length for stream in native)
        indices = torch.full((batch, length, self.quantizer.num_subcodes), -1, dtype=torch.int64, device=device)
        start = 0
        blocks = self.quantizer.index_blocks(self._token_axes(self.image_size))
        for block, stream in zip(blocks, tokens.layout, strict=False):
            if stream.length != block.length:
                raise ValueError(f"stream {stream.name!r} must hold {block.length} tokens; got {stream.length}")
            indices[:, start : start + block.length, slice(*block.columns)] = tokens.indices[stream.name]
            start += block.length
        return indices

    def latents(self, images: Tensor) -> Tensor:
        """Latents ``(B, N, D)`` of images ``(B, 3, H, W)`` in [0, 1], before the quantizer."""
        return self.to_quantizer(self.run_encoder(images))

    def decode_latents(
        self,
        quantized: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Images ``(B, 3, H, W)``, nominally in [0, 1] and not clamped, of quantized latents ``(B, N, D)``.

        See :meth:`~vistok.tokenizers.encoder_decoder.EncoderDecoderTokenizer.run_decoder` for the other arguments.
        """
        quantized = quantized.to(weight_dtype(self.from_quantizer, quantized.dtype))
        return self.run_decoder(self.from_quantizer(quantized), grid, mask=mask, context=context)

    def bottleneck(self, images: Tensor) -> TokenizerOutput:
        """:meth:`forward` without the decoder."""
        z = self.latents(images)  # (B, N, D)
        size = (images.shape[2], images.shape[3])
        result = self.quantizer(z.unflatten(1, self._token_axes(size)))
        quantized, mask = result.quantized.flatten(1, -2), None  # (B, N, D)
        if self.training:
            indices = result.indices.flatten(1, -2)  # (B, N, G)
            for regularizer in self.regularizers:
                quantized, mask = regularizer(quantized, indices[:, : quantized.shape[1]], mask)
        tokens = self._to_tokens(result.indices, size)
        return TokenizerOutput(z, quantized, tokens, result.losses, result.statistics, mask=mask)

    def forward(self, images: Tensor, *, context: Tensor | None = None) -> TokenizerOutput:
        output = self.bottleneck(images)
        grid = self.encoder.grid((images.shape[2], images.shape[3]))
        output.decoded = self.decode_latents(output.quantized, grid, mask=output.mask, context=context)
        return output

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        z = self.latents(images)
        size = (images.shape[2], images.shape[3])
        z = z.unflatten(1, self._token_axes(size))
        return self._to_tokens(self.quantizer.encode(z), size)

    @torch.no_grad()
    def decode(self, tokens: Tokens, *, clamp: bool = True, context: Tensor | None = None) -> Tensor:
        """See :meth:`Tokenizer.decode`.

        A prefix of a 1D sequence (``tokens.truncate(n)``) is decoded as it is. Dropped tokens (``tokens.mask``, or
        ``-1``) are left out, sample by sample, where the decoder takes masks.

        Raises:
            ValueError: for tokens of another layout, an index outside the codebook, or dropped tokens and a decoder
                that cannot leave tokens out.
        """
        quantized = self.quantizer.decode(self._to_indices(tokens))  # (B, *S, D)
        grid = tuple(quantized.shape[1:-1]) if quantized.ndim == 4 else None
        mask = self._kept(tokens)
        images = self.decode_latents(quantized.flatten(1, -2), grid, mask=mask, context=context)
        return images.clamp(0, 1) if clamp else images

    def _kept(self, tokens: Tokens) -> Tensor | None:
        """Which tokens the decoder shall see, ``(B, N)``; ``None`` if no token is dropped."""
        dropped = {name: (ids < 0).all(-1) for name, ids in tokens.indices.items()}
        if not any(where.any() for where in dropped.values()):
            return None
        if len(self.layout()) > 1:
            raise ValueError(f"tokens of several streams ({', '.join(dropped)}) cannot be left out one by one")
        return ~next(iter(dropped.values()))

    def commit_update(self) -> None:
        self.quantizer.commit_update()


def _streams(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    return f"one stream named {names[0]}" if len(names) == 1 else f"the streams {', '.join(names)}"


def _projection(in_dim: int, out_dim: int, projections: str) -> nn.Module:
    return nn.Linear(in_dim, out_dim) if projections == "always" or in_dim != out_dim else nn.Identity()
