"""Image codecs as a yardstick: what JPEG, WebP and AVIF make of the same originals, at what size.

The sizes are those of whole files, headers included, because that is what an image costs to store. At 256 x 256 headers
are a large part of the cheapest files (about 280 bytes of AVIF or JPEG, 40 of WebP), and no codec reaches the 50 to 500
bytes of a tokenizer; applied to a downscaled image, which is scaled up again after decoding, they do.

Encoders come with Pillow, and get what costs nothing but time: JPEG its own Huffman tables, WebP method 6, AVIF the
default speed 6. All three subsample the colours (4:2:0).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from .metric import MetricUnavailable, Originals, Pairs
from .variants import Variant

_MAX_THREADS = 16
_OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"subsampling": "4:2:0", "optimize": True},
    "webp": {"method": 6},  # lossy WebP knows no other subsampling than 4:2:0
    "avif": {"subsampling": "4:2:0", "speed": 6, "max_threads": 1},  # one image per thread, same bytes everywhere
}
QUALITIES: dict[str, tuple[int, ...]] = {  # from the lowest that the encoder knows to hardly visible loss
    "jpeg": (1, 5, 10, 25, 50, 75, 90),
    "webp": (0, 10, 25, 50, 75, 90),
    "avif": (0, 10, 20, 40, 60, 80),
}


class CodecVariant(Variant):
    """What a codec makes of the originals; the bits are those of its files.

    Args:
        codec: ``jpeg``, ``webp`` or ``avif``.
        quality: as the encoder counts it, up to 100; JPEG from 1, the others from 0.
        scale: encode the image at this share of its height and width (Lanczos), and scale up what comes back (bicubic).

    Raises:
        ValueError: for an unknown codec, or a quality or scale out of range.
        MetricUnavailable: if the installed Pillow was built without the codec.
    """

    kind = "codec"

    def __init__(self, codec: str, quality: int, scale: float = 1.0) -> None:
        if codec not in _OPTIONS:
            raise ValueError(f"codec must be one of {', '.join(_OPTIONS)}; got {codec!r}")
        lowest = QUALITIES[codec][0]
        if not lowest <= quality <= 100:
            raise ValueError(f"quality of {codec} must lie between {lowest} and 100; got {quality}")
        if not 0 < scale <= 1:
            raise ValueError(f"scale must lie above 0 and not above 1; got {scale}")
        self.codec = codec
        self.quality = quality
        self.scale = float(scale)
        self.name = f"{codec}/q={quality}" if scale == 1 else f"{codec}/q={quality}/scale={scale:g}"
        self.settings = {
            "codec": codec,
            "quality": quality,
            "scale": self.scale,
            "overhead_bytes": self._overhead(),
        }

    def reconstruct(self, originals: Originals) -> Pairs:
        sources = originals.once(("codec sources", self.scale), lambda: _sources(originals, self.scale))
        height, width = originals.images.shape[2:]
        decoded = list(_pool().map(lambda source: self._round_trip(source, (width, height)), sources))
        pixels = torch.from_numpy(np.stack([image for image, _ in decoded])).permute(0, 3, 1, 2)  # (B, 3, H, W)
        bits = torch.tensor([8 * size for _, size in decoded], dtype=torch.float64)
        return Pairs(originals, pixels.contiguous().to(originals.images.device), bits=bits)

    def encode(self, image: np.ndarray) -> bytes:
        """The file of an image uint8 ``(H, W, 3)``, at the size that it has."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, self.codec.upper(), quality=self.quality, **_OPTIONS[self.codec])
        return file.getvalue()

    def _round_trip(self, image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        """The decoded image uint8 ``(H, W, 3)`` at ``(W, H)``, and the bytes of its file."""
        data = self.encode(image)
        with Image.open(io.BytesIO(data), formats=(self.codec.upper(),)) as file:
            decoded = file.convert("RGB")
        if decoded.size != size:
            decoded = decoded.resize(size, Image.Resampling.BICUBIC)
        return np.array(decoded), len(data)

    def _overhead(self) -> int:
        """Bytes of a file that says next to nothing: a flat grey image of 16 x 16 pixels."""
        try:
            return self._round_trip(np.full((16, 16, 3), 128, np.uint8), (16, 16))[1]
        except (KeyError, OSError) as error:  # a format without a writer, a writer without its library
            raise MetricUnavailable(
                f"the installed Pillow ({PIL.__version__}) knows no {self.codec.upper()}: pip install -U pillow (11.3 "
                f"and newer bring JPEG, WebP and AVIF)"
            ) from error


def codec_variants(
    names: Sequence[str],
    qualities: Mapping[str, Sequence[int]] | None = None,
    scales: Sequence[float] = (1.0,),
) -> tuple[list[CodecVariant], dict[str, str]]:
    """Every quality of every codec at every scale.

    Args:
        names: of codecs: ``jpeg``, ``webp``, ``avif``.
        qualities: by codec; :data:`QUALITIES` for those that are not in it.
        scales: see :class:`CodecVariant`.

    Returns:
        The variants, and for codecs that this Pillow lacks the reason, by name.

    Raises:
        ValueError: for an unknown codec, or a quality or scale out of range.
    """
    qualities = QUALITIES | dict(qualities or {})
    unknown = sorted({*names, *qualities} - QUALITIES.keys())
    if unknown:
        raise ValueError(f"codec must be one of {', '.join(QUALITIES)}; got {unknown[0]!r}")
    variants: list[CodecVariant] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(names):
        grid = [(scale, quality) for scale in dict.fromkeys(scales) for quality in dict.fromkeys(qualities[name])]
        try:
            variants += [CodecVariant(name, quality, scale) for scale, quality in grid]
        except MetricUnavailable as error:
            skipped[name] = str(error)
    return variants, skipped


def _sources(originals: Originals, scale: float) -> list[np.ndarray]:
    """The originals as codecs take them, uint8 ``(h, w, 3)`` each, downscaled; once for all codecs and qualities."""
    images = originals.once(
        ("codec sources", 1.0), lambda: list(originals.images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    )
    if scale == 1:
        return images
    height, width = images[0].shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return list(_pool().map(lambda image: _downscale(image, size), images))


def _downscale(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads for all codecs of this process: encoders let go of Python's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ThreadPoolExecutor(max(1, min(cores, _MAX_THREADS)), thread_name_prefix="codec")
