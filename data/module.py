"""The data of a training run as a ``LightningDataModule``: sources, crops, batch sizes and workers, from YAML.

Everything that is not Lightning lives in the other files of this room; the commands that encode and decode images
use those and never import Lightning, which takes seconds.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from .loader import ImageLoader
from .source import ImageSource
from .transforms import EvalTransform, TrainTransform, as_size


class ImageData(LightningDataModule):
    """Loaders for training, validation and test.

    Each loader takes its own share of the samples, so the trainer needs ``use_distributed_sampler=False``.

    Args:
        train: images to train on.
        val: images to validate on; no validation if ``None``.
        test: images to test on; those of ``val`` if ``None``.
        image_size: ``(h, w)``, or one number for squares; ``None`` takes the tokenizer's.
        batch_size: training images per process and step.
        val_batch_size: images per process and step in validation and test; ``batch_size`` if ``None``.
        crop: training crop: ``random`` window, ``random_resized`` window of random area and shape, or ``center``.
        scale: range of the share of the image area that ``random_resized`` keeps.
        flip: probability of a mirror image in training.
        val_crop: ``center``, or ``adm`` for the protocol of published FID numbers (square sizes).
        num_workers: worker processes per loader; 0 reads in the main process.
        prefetch_factor: batches that each worker keeps ready.
        pin_memory: page-locked batches; ``None`` means when a CUDA device is there.
        multiprocessing_context: how workers start; ``None`` means the platform's default.
        seed: of orders, crops and mirror images; ``None`` takes the seed of the whole run, or 0.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None = None,
        test: ImageSource | None = None,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        crop: Literal["random", "random_resized", "center"] = "random",
        scale: tuple[float, float] = (0.8, 1.0),
        flip: float = 0.5,
        val_crop: Literal["center", "adm"] = "center",
        num_workers: int = 4,
        prefetch_factor: int = 2,
        pin_memory: bool | None = None,
        multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.image_size = image_size
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.crop, self.scale, self.flip, self.val_crop = crop, scale, flip, val_crop
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.pin_memory = pin_memory
        self.multiprocessing_context = multiprocessing_context
        self.seed = seed
        self._loaders: list[ImageLoader] = []

    def prepare_data(self) -> None:
        """Download and index, on one process per machine."""
        for source in (self.train, self.val, self.test):
            if source is not None:
                source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Check what the loaders need.

        Raises:
            ValueError: if there is no image size yet, or it does not suit the crops.
        """
        if self.image_size is None:
            raise ValueError("image_size is None and no tokenizer has filled it in; give (h, w) or one number")
        self.image_size = as_size(self.image_size)
        EvalTransform(self.image_size, self.val_crop)

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move a batch, but for ``index``: it is looked up on the host, which would have to wait for it."""
        index = {"index": batch["index"]} if "index" in batch else {}
        rest = {name: value for name, value in batch.items() if name != "index"}
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | index

    def teardown(self, stage: str | None = None) -> None:
        """Stop all workers."""
        for loader in self._loaders:
            loader.close()
        self._loaders = []

    def train_dataloader(self) -> ImageLoader:
        transform = TrainTransform(self.image_size, self.crop, self.scale, self.flip)
        return self._loader(self.train, transform, self.batch_size, training=True)

    def val_dataloader(self) -> ImageLoader | list:
        return self._evaluation_loader(self.val)

    def test_dataloader(self) -> ImageLoader | list:
        return self._evaluation_loader(self.val if self.test is None else self.test)

    def _evaluation_loader(self, source: ImageSource | None) -> ImageLoader | list:
        if source is None:
            return []  # Lightning's word for "nothing to evaluate on"
        transform = EvalTransform(self.image_size, self.val_crop)
        return self._loader(source, transform, self.val_batch_size or self.batch_size, training=False)

    def _loader(
        self, source: ImageSource, transform: TrainTransform | EvalTransform, batch_size: int, training: bool
    ) -> ImageLoader:
        loader = ImageLoader(
            source,
            transform,
            batch_size,
            training=training,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            multiprocessing_context=self.multiprocessing_context,
        )
        self._loaders.append(loader)
        return loader
