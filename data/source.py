"""Where images come from: the contract that image folders, webdataset shards and the demo photographs share.

A source is a list of samples plus a plan: which sample a rank takes when, as a pure function of (seed, epoch, rank,
world size). So the position of a run is two numbers, the epoch and the batches consumed, the same on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Sample(NamedTuple):
    """One image, and what else its source knows about it.

    Attributes:
        image: uint8 ``(3, H, W)`` RGB.
        label: class index; -1 if unknown.
        key: what the image is called.
        text: caption; empty if there is none.
        target: uint8 ``(3, H, W)`` RGB, the image that a reconstruction should look like where that is another one.
    """

    image: Tensor
    label: int
    key: str
    text: str = ""
    target: Tensor | None = None


class ImageSource(ABC):
    """Base class of all sources of images.

    Attributes:
        has_text: whether samples have a caption; batches have ``text`` then.
        has_target: whether samples have a target; batches have ``target`` then.
    """

    has_text: bool = False
    has_target: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample at ``index``, 0 <= index < len.

        Raises:
            ImageError: if this one sample cannot be read; the message names it and the reason.
        """

    def prepare(self) -> None:  # noqa: B027 -- nothing to do is a sensible default
        """Do what one process per machine has to do once: download, index. Calling it again costs nothing."""

    def order(self, epoch: int, seed: int, rank: int, world_size: int) -> np.ndarray:
        """The samples that ``rank`` trains on in ``epoch``, in order: int64, ``len // world_size`` of them.

        The ranks take turns in one seeded permutation, so the k-th batches of all ranks together are the k-th batch of
        a single process that is ``world_size`` times as large. The remainder (less than ``world_size`` samples) sits
        this epoch out; it is another one in every epoch.
        """
        permutation = generator(seed, epoch).permutation(len(self))
        return permutation[: len(self) // world_size * world_size][rank::world_size]

    def manifest(self) -> list[str] | None:
        """What the source consists of, a line per file: changes whenever images do; ``None`` if it cannot say."""
        return None

    def replacement(self, index: int, attempt: int) -> int:
        """The sample to take in place of an unreadable one; ``attempt`` counts the replacements tried, from 0."""
        return (index + 1 + attempt) % len(self)


def generator(*key: int) -> np.random.Generator:
    """A random generator of its own for every tuple of non-negative integers."""
    return np.random.default_rng(np.random.SeedSequence(key))
