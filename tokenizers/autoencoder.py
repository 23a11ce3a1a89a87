"""Any encoder, any quantizer, any token regularizers, any decoder: the tokenizer that YAML can compose freely.

The published single-stream systems (TiTok, VQGAN ...) are subclasses that only choose the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..decoders.base import Decoder
from ..encoders.base import Encoder
from ..layers.sizes import image_hw
from ..quantizers.base import Quantizer
from ..regularizers.base import Regularizer
from .base import Stream, Tokenizer, TokenizerOutput, Tokens


class AutoencoderTokenizer(Tokenizer):
    """Encoder, quantizer, regularizers and decoder in a row; one stream of tokens named ``image``.

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
        stream = Stream("image", self.encoder.num_tokens(size), self.quantizer.codebook_sizes, self.encoder.grid(size))
        return (stream,)

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
        result = self.quantizer(z)
        quantized = result.quantized
        if self.training:
            for regularizer in self.regularizers:
                quantized = regularizer(quantized, result.indices)
        tokens = Tokens({"image": result.indices}, self.layout((images.shape[2], images.shape[3])))
        return TokenizerOutput(z, quantized, tokens, result.losses, result.statistics)

    def forward(self, images: Tensor) -> TokenizerOutput:
        output = self.bottleneck(images)
        output.decoded = self.decode_latents(output.quantized, output.tokens.layout[0].grid)
        return output

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        z = self.latents(images)
        return Tokens({"image": self.quantizer.encode(z)}, self.layout((images.shape[2], images.shape[3])))

    @torch.no_grad()
    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Tensor:
        """See :meth:`Tokenizer.decode`. A prefix of a 1D sequence (``tokens.truncate(n)``) is decoded as it is.

        Raises:
            ValueError: for tokens of another layout, or an index outside the codebook.
        """
        stream = tokens.layout[0]
        if len(tokens.layout) != 1 or stream.name != "image":
            names = [stream.name for stream in tokens.layout]
            raise ValueError(f"{type(self).__name__} decodes one stream named 'image'; got the streams {names}")
        if stream.codebook_sizes != self.quantizer.codebook_sizes:
            raise ValueError(
                f"these tokens were made with codebooks of {stream.codebook_sizes} codes; "
                f"this {type(self).__name__} has {self.quantizer.codebook_sizes}"
            )
        tokens.validate()
        images = self.decode_latents(self.quantizer.decode(tokens.indices["image"]), stream.grid)
        return images.clamp(0, 1) if clamp else images

    def commit_update(self) -> None:
        self.quantizer.commit_update()

    def after_load(self) -> None:
        for part in (self.encoder, self.decoder):
            if getattr(part, "channels_last", False):
                part.to(memory_format=torch.channels_last)


def _projection(in_dim: int, out_dim: int, projections: str) -> nn.Module:
    return nn.Linear(in_dim, out_dim) if projections == "always" or in_dim != out_dim else nn.Identity()
