"""Batches of images with an exact position: a torch ``DataLoader`` behind a plan that can stop and go on anywhere.

Which samples make up batch k of epoch e follows from the seed alone, and so does every crop and mirror image: random
numbers are keyed by (seed, epoch, sample). Workers, their number and start method, what they have prefetched, and a
restart change nothing. The position is (epoch, batches handed out), the same on all ranks, and part of a checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .images import ImageError
from .source import ImageSource

logger = logging.getLogger(__name__)
MAX_REPLACEMENTS = 16

Item = tuple[int, int]  # epoch, sample: all that a worker has to know


class ImageLoader:
    """Iterate over batches of one rank.

    A batch is a dict: ``image`` uint8 ``(B, 3, h, w)``, ``label`` int64 ``(B,)``, ``key`` list of B strings, ``index``
    int64 ``(B,)``, the samples' places in the source, and ``skipped``, one line for every sample that could not be read
    ("name: reason"). From sources that have them come ``text``, list of B strings, and ``target`` uint8
    ``(B, 3, h, w)``, which goes through the same crop and mirror image as ``image``.

    In training all batches are full, every rank has the same number of them, and an unreadable sample is replaced by
    another one. In evaluation every sample comes exactly once over all ranks, the last batch may be short, and an
    unreadable sample is left out; the ranks have equally many batches wherever their samples allow it.

    Each ``iter()`` begins the next epoch, except that the first one after :meth:`load_state_dict` (or
    :meth:`set_epoch`) goes on from the position that was set.

    Args:
        source: where samples come from. It is prepared here if it has not been.
        transform: ``transform(image, generator)`` in training, ``transform(image)`` in evaluation; uint8
            ``(3, H, W)`` to uint8 ``(3, h, w)``.
        batch_size: images per batch of this rank.
        training: training or evaluation, see above.
        seed: decides orders and random transforms.
        rank: number of this process among ``world_size``.
        world_size: number of processes.
        num_workers: worker processes; 0 reads in this process.
        prefetch_factor: batches that each worker keeps ready.
        pin_memory: put batches into page-locked memory, for fast copies to a GPU.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; ``None`` for the platform's default.
        persistent_workers: keep the workers from one epoch to the next.

    Attributes:
        skipped: how often each unreadable sample was met so far, by its line.

    Raises:
        ValueError: for numbers out of range, or too few samples for one batch on every rank.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[..., Tensor],
        batch_size: int,
        *,
        training: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
        persistent_workers: bool = True,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie between 0 and world_size - 1 = {world_size - 1}; got {rank}")
        source.prepare()
        self.source = source
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.skipped: dict[str, int] = {}
        self._num_samples = len(source)
        if training and self._num_samples // world_size < batch_size:
            raise ValueError(
                f"{self._num_samples} samples do not make one batch on every rank: batch_size {batch_size} x "
                f"world_size {world_size} = {batch_size * world_size}; use a smaller batch_size or more data"
            )
        self._plan = _Plan()
        self._loader = DataLoader(
            _Reader(source, transform, seed, training),
            batch_sampler=self._plan,
            collate_fn=_collate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            multiprocessing_context=multiprocessing_context if num_workers else None,
            persistent_workers=persistent_workers and num_workers > 0,
            generator=torch.Generator(),  # or each iter() would draw from, and so disturb, torch's global generator
        )
        self._epoch = 0
        self._batches = 0  # of this epoch, handed out
        self._position_set = True  # rather than reached by iterating
        self._loaded_epoch: int | None = None
        self._iteration: object | None = None
        self._reading: Iterator[dict[str, Any]] | None = None

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        if self.training:
            return self._num_samples // self.world_size // self.batch_size
        return len(self._evaluation_batches())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator starts with the first next(): Lightning calls iter() once more often than it starts epochs.
        return self._run()

    def _run(self) -> Iterator[dict[str, Any]]:
        self._iteration = iteration = object()
        if not self._position_set or self._batches >= len(self):
            self._epoch, self._batches = self._epoch + 1, 0
        self._position_set = False
        self._plan.epoch, self._plan.batches = self._epoch, self._planned(self._epoch)[self._batches :]
        self._reading = iter(self._loader)
        for batch in self._reading:
            if self._iteration is not iteration:
                raise RuntimeError("this iteration is over: the ImageLoader was closed, or a newer iteration began")
            self._batches += 1
            self._report(batch["skipped"])
            if batch["image"] is not None:
                yield batch

    def _planned(self, epoch: int) -> list[np.ndarray]:
        """The samples of every batch of an epoch."""
        if not self.training:
            return self._evaluation_batches()
        order = self.source.order(epoch, self.seed, self.rank, self.world_size)
        return list(order[: len(self) * self.batch_size].reshape(len(self), self.batch_size))

    def _evaluation_batches(self) -> list[np.ndarray]:
        mine = np.arange(self.rank, self._num_samples, self.world_size)
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        # Ranks differ by one sample at most. Where that costs this rank its last batch, an earlier one is split: DDP
        # synchronises buffers in every forward pass, so a rank with fewer batches would leave the others waiting.
        most = math.ceil(math.ceil(self._num_samples / self.world_size) / self.batch_size)
        if batches and len(batches) < most and len(batches[-1]) > 1:
            last = batches.pop()
            batches += [last[:-1], last[-1:]]
        return batches

    def _report(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.skipped:
                logger.warning("skipped %s", line)
            self.skipped[line] = self.skipped.get(line, 0) + 1

    batch_sampler = None  # Lightning asks whoever has a sampler

    @property
    def sampler(self) -> ImageLoader:
        """The object whose ``set_epoch`` Lightning calls before every epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin this epoch; the position within it is kept if it is the present one.

        After :meth:`load_state_dict` the loader counts epochs by itself: a larger number then only says that the saved
        epoch was over, however many batches of it were used. (Lightning counts one epoch too many when a run with
        ``max_steps`` resumes from the end of an epoch.)
        """
        if self._loaded_epoch is None:
            if epoch != self._epoch:
                self._epoch, self._batches, self._position_set = epoch, 0, True
        elif self._position_set and epoch > self._loaded_epoch:
            self._epoch, self._batches = self._loaded_epoch + 1, 0

    def close(self) -> None:
        """Stop the workers now; the next ``iter()`` starts new ones.

        Left to the garbage collector, each worker can cost five seconds at some later moment.
        """
        self._iteration = None
        if hasattr(self._reading, "_shutdown_workers"):  # torch's iterator over worker processes; no public way exists
            self._reading._shutdown_workers()
        self._reading = self._loader._iterator = None

    def state_dict(self) -> dict[str, int]:
        """The position, and what it depends on."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "num_samples": self._num_samples,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position.

        A changed batch size or world size makes other batches: a warning is logged and the epoch starts again.

        Raises:
            ValueError: if the state is of another seed or another number of samples.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"not the state of an ImageLoader: it lacks {missing}")
        for name, mine in (("seed", self.seed), ("num_samples", self._num_samples)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved position belongs to {name}={state[name]}, this run has {name}={mine}; resume with the "
                    f"same data and seed, or start a new run from the weights alone"
                )
        batches = state["batches"]
        for name, mine in (("batch_size", self.batch_size), ("world_size", self.world_size)):
            if state[name] != mine:
                logger.warning(
                    "the saved position belongs to %s=%d, this run has %d: epoch %d starts again from its first batch",
                    *(name, state[name], mine, state["epoch"]),
                )
                batches = 0
        self._epoch, self._batches, self._position_set = state["epoch"], batches, True
        self._loaded_epoch = state["epoch"]


class _Plan:
    """The batch sampler: hands the planned batches to the DataLoader, in the main process."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: list[np.ndarray] = []

    def __iter__(self) -> Iterator[list[Item]]:
        return ([(self.epoch, int(index)) for index in batch] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Reader(Dataset):
    """Reads, replaces and transforms one sample; lives in the workers."""

    def __init__(self, source: ImageSource, transform: Callable[..., Tensor], seed: int, training: bool) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.training = training

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, index = item
        candidate, skipped = index, []
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                sample = self.source.read(candidate)
                break
            except ImageError as error:
                skipped.append(str(error))
            if not self.training:
                return {"image": None, "skipped": skipped}
            candidate = self.source.replacement(index, attempt)
        else:
            raise RuntimeError(
                f"sample {index} and the {MAX_REPLACEMENTS} taken in its place are all unreadable: "
                + "; ".join(skipped[:3] + ["..."] + skipped[-1:])
            )
        item = {"image": self._transformed(sample.image, epoch, index)}
        item |= {"label": sample.label, "key": sample.key, "index": candidate, "skipped": skipped}
        if self.source.has_text:
            item["text"] = sample.text
        if self.source.has_target:
            item["target"] = self._transformed(sample.target, epoch, index)
        return item

    def _transformed(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """The image as the batch has it: random draws depend on (seed, epoch, index) alone."""
        if not self.training:
            return self.transform(image)
        seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
        return self.transform(image, torch.Generator().manual_seed(int(seed)))


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples; its ``image`` is ``None`` if not one of them could be read."""
    good = [sample for sample in samples if sample["image"] is not None]
    batch = {
        "image": default_collate([sample["image"] for sample in good]) if good else None,
        "label": torch.tensor([sample["label"] for sample in good], dtype=torch.int64),
        "key": [sample["key"] for sample in good],
        "index": torch.tensor([sample["index"] for sample in good], dtype=torch.int64),
        "skipped": [line for sample in samples for line in sample["skipped"]],
    }
    if good and "text" in good[0]:
        batch["text"] = [sample["text"] for sample in good]
    if good and "target" in good[0]:
        batch["target"] = default_collate([sample["target"] for sample in good])
    return batch
