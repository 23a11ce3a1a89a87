"""Reconstructions at the original size: by a tokenizer, letterboxed, or out of a folder that somebody filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .annotations import AnnotatedImage, read_pixels
from .letterbox import letterbox, restore, through_jpeg

Save = Literal["memory", "jpeg75-if-jpg"]


class Rebuild(Protocol):
    """Gives the reconstructions of some images, uint8 of the sizes of the originals."""

    def __call__(self, images: list[AnnotatedImage], originals: list[np.ndarray]) -> list[np.ndarray]: ...


class TokenizerRebuild:
    """Letterbox, reconstruct, restore.

    Args:
        reconstruct: uint8 ``(B, 3, S, S)`` to uint8 of the same shape.
        size: S.
        device: that ``reconstruct`` gets its images on.
        save: ``jpeg75-if-jpg`` sends images called ``.jpg`` through the file that the benchmark's scripts write.

    Raises:
        ValueError: for another ``save``.
    """

    def __init__(
        self,
        reconstruct: Callable[[Tensor], Tensor],
        size: int,
        device: str | torch.device = "cpu",
        save: Save = "memory",
    ) -> None:
        if save not in ("memory", "jpeg75-if-jpg"):
            raise ValueError(f"save must be 'memory' or 'jpeg75-if-jpg'; got {save!r}")
        self.reconstruct = reconstruct
        self.size = size
        self.device = device
        self.save: Save = save

    def __call__(self, images: list[AnnotatedImage], originals: list[np.ndarray]) -> list[np.ndarray]:
        canvases, places = zip(*(letterbox(original, self.size) for original in originals), strict=True)
        batch = torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2).contiguous().to(self.device)  # (B, 3, S, S)
        result = self.reconstruct(batch)
        if result.dtype != torch.uint8 or result.shape != batch.shape:
            raise ValueError(
                f"reconstruct must give uint8 {tuple(batch.shape)}; got {result.dtype} {tuple(result.shape)}"
            )
        rebuilt = result.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        restored = [restore(canvas, place) for canvas, place in zip(rebuilt, places, strict=True)]
        return [as_saved(image, info.name, self.save) for image, info in zip(restored, images, strict=True)]


class FolderRebuild:
    """Files with the names of the images, written by anybody.

    Args:
        folder: of the files.
        images: that must be there.

    Raises:
        FileNotFoundError: naming the first images that are missing.
    """

    def __init__(self, folder: str | Path, images: list[AnnotatedImage]) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder of reconstructions at {self.folder}")
        missing = [image.name for image in images if not (self.folder / image.name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks reconstructions of {len(missing)} of {len(images)} images: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; they have the names of the originals"
            )

    def __call__(self, images: list[AnnotatedImage], originals: list[np.ndarray]) -> list[np.ndarray]:
        rebuilt = []
        for image, original in zip(images, originals, strict=True):
            pixels = read_pixels(self.folder / image.name)
            if pixels.shape != original.shape:
                raise ValueError(
                    f"{self.folder / image.name} has {pixels.shape[1]} x {pixels.shape[0]} pixels, its original "
                    f"{original.shape[1]} x {original.shape[0]}; restore the size of the original before saving"
                )
            rebuilt.append(pixels)
        return rebuilt


def as_saved(image: np.ndarray, name: str, save: Save) -> np.ndarray:
    """An image as it is after it was saved under its name."""
    return through_jpeg(image, name) if save == "jpeg75-if-jpg" else image
