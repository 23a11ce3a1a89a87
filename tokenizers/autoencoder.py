"""Any encoder, any quantizer, any token regularizers, any decoder: the tokenizer that YAML can compose freely.

The published single-stream systems (TiTok, VQGAN ...) are subclasses that only choose the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..decoders.base import Decoder
from ..encoders.base import Encoder
from ..layers.sizes import image_hw
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .base import Stream, Tokenizer, TokenizerOutput, Tokens


class AutoencoderTokenizer(Tokenizer):
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
        super().__init__()
        if projections not in ("auto", "always"):
            raise ValueError(f"projections must be 'auto' or 'always'; got {projections!r}")
        if image_size is None and encoder.image_size is None:
            raise ValueError("image_size is needed: this encoder takes images of any size")
        own_size = encoder.image_size if image_size is None else image_hw(image_size, encoder.stride)
        if encoder.image_size is not None and own_size != encoder.image_size:
            raise ValueError(f"image_size {own_size} differs from the encoder's {encoder.image_size}")
        self._image_size = own_size
        self.pixel_range = (float(pixel_range[0]), float(pixel_range[1]))
        self.encoder = encoder
        self.to_quantizer = _projection(encoder.out_dim, quantizer.dim, projections)
        self.quantizer = quantizer
        self.regularizers = nn.ModuleList(regularizers)
        self.from_quantizer = _projection(quantizer.dim, decoder.in_dim, projections)
        self.decoder = decoder

    @property
    def image_size(self) -> tuple[int, int]:
        return self._image_size

    @property
    def stride(self) -> int:
        return self.encoder.stride

    @property
    def any_image_size(self) -> bool:
        return self.encoder.image_size is None

    @property
    def default_loss_weights(self) -> Mapping[str, float]:
        return self.quantizer.default_loss_weights

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.quantizer.codebook_sizes

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
        self.check_images(images)
        low, high = self.pixel_range
        return self.to_quantizer(self.encoder(images * (high - low) + low))

    def decode_latents(self, quantized: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images ``(B, 3, H, W)``, nominally in [0, 1] and not clamped, of quantized latents ``(B, N, D)``."""
        low, high = self.pixel_range
        return (self.decoder(self.from_quantizer(quantized), grid) - low) / (high - low)

    def bottleneck(self, images: Tensor) -> TokenizerOutput:
        """:meth:`forward` without the decoder."""
        z = self.latents(images)  # (B, N, D)
        size = (images.shape[2], images.shape[3])
        result = self.quantizer(z.unflatten(1, self._token_axes(size)))
        quantized = result.quantized.flatten(1, -2)  # (B, N, D)
        if self.training:
            for regularizer in self.regularizers:
                quantized = regularizer(quantized, result.indices.flatten(1, -2))
        tokens = self._to_tokens(result.indices, size)
        return TokenizerOutput(z, quantized, tokens, result.losses, result.statistics)

    def forward(self, images: Tensor) -> TokenizerOutput:
        output = self.bottleneck(images)
        grid = self.encoder.grid((images.shape[2], images.shape[3]))
        output.decoded = self.decode_latents(output.quantized, grid)
        return output

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        z = self.latents(images)
        size = (images.shape[2], images.shape[3])
        z = z.unflatten(1, self._token_axes(size))
        return self._to_tokens(self.quantizer.encode(z), size)

    @torch.no_grad()
    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Tensor:
        """See :meth:`Tokenizer.decode`. A prefix of a 1D sequence (``tokens.truncate(n)``) is decoded as it is.

        Raises:
            ValueError: for tokens of another layout, or an index outside the codebook.
        """
        quantized = self.quantizer.decode(self._to_indices(tokens))  # (B, *S, D)
        grid = tuple(quantized.shape[1:-1]) if quantized.ndim == 4 else None
        images = self.decode_latents(quantized.flatten(1, -2), grid)
        return images.clamp(0, 1) if clamp else images

    def commit_update(self) -> None:
        self.quantizer.commit_update()

    def after_load(self) -> None:
        for part in (self.encoder, self.decoder):
            if getattr(part, "channels_last", False):
                part.to(memory_format=torch.channels_last)


def _streams(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    return f"one stream named {names[0]}" if len(names) == 1 else f"the streams {', '.join(names)}"


def _projection(in_dim: int, out_dim: int, projections: str) -> nn.Module:
    return nn.Linear(in_dim, out_dim) if projections == "always" or in_dim != out_dim else nn.Identity()
