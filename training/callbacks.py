"""Reconstruction grids: what the tokenizer does to the first validation images, as PNG and in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..data.images import save_png, to_uint8


class ReconstructionGrids(pl.Callback):
    """After every validation, writes ``<run>/images/step=00001000.png``: originals above their reconstructions.

    Args:
        num_images: images in a grid, taken from the first validation batches of the first rank.
    """

    def __init__(self, num_images: int = 8) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1; got {num_images}")
        self.num_images = num_images
        self.latest: Path | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pairs = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.num_images - len(self._pairs)
        if not trainer.is_global_zero or trainer.sanity_checking or missing <= 0 or outputs["reconstructions"] is None:
            return
        images, reconstructions = outputs["images"], outputs["reconstructions"]
        self._pairs += zip(images[:missing].cpu(), reconstructions[:missing].float().cpu(), strict=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._pairs:
            return
        grid = to_uint8(comparison_grid(self._pairs))
        self._pairs = []
        self.latest = Path(trainer.default_root_dir) / "images" / f"step={trainer.global_step:08d}.png"
        self.latest.parent.mkdir(parents=True, exist_ok=True)
        save_png(grid, self.latest)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image("val/reconstructions", grid, trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def comparison_grid(pairs: list[tuple[Tensor, Tensor]], gap: int = 2) -> Tensor:
    """Originals in the upper row, reconstructions below, on white: ``(3, 2 H + 3 gap, n (W + gap) + gap)``."""
    height, width = pairs[0][0].shape[1:]
    grid = torch.ones(3, 2 * height + 3 * gap, len(pairs) * (width + gap) + gap)
    for column, pair in enumerate(pairs):
        left = gap + column * (width + gap)
        for row, image in enumerate(pair):
            top = gap + row * (height + gap)
            grid[:, top : top + height, left : left + width] = image
    return grid
