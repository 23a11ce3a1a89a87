"""What every metric is: an object that is fed batches of pairs and can be split over processes, killed and resumed.

Originals and reconstructions come as uint8, so every metric judges the pixels that a file would hold. What a metric has
gathered is plain data (:meth:`Metric.state_dict`) that adds up (:meth:`Metric.merge`): sums add, per-image values are
appended with the number of their image. So one process, eight ranks and a run that was killed twice end with the same
numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..tokenizers.base import Tokens

T = TypeVar("T")
State = dict[str, Any]  # tensors, numbers, strings, and lists and dicts of them: what torch.load(weights_only) reads


class MetricUnavailable(Exception):
    """A metric cannot be computed here: no weights, images too small ... One line that says why and what helps."""


class EvaluationError(ValueError):
    """Something about the images or the folder of results that the user can put right."""


@dataclass
class Originals:
    """A batch of B images to evaluate on.

    Attributes:
        index: int64 ``(B,)`` on the host, the number of every image in its dataset.
        keys: what the images are called.
        labels: int64 ``(B,)`` on the host, -1 if unknown.
        images: uint8 ``(B, 3, H, W)``, on the device that evaluates.
        targets: uint8 ``(B, 3, H, W)``, reconstructions that came with the images; ``None`` if a tokenizer makes them.
    """

    index: Tensor
    keys: list[str]
    labels: Tensor
    images: Tensor
    targets: Tensor | None = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, computed once per batch, whoever asks: tokens, features of the originals."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


@dataclass
class Pairs:
    """Originals beside one reconstruction of each.

    Attributes:
        originals: what was given.
        reconstructions: uint8 ``(B, 3, H, W)``, on the device of the originals.
        tokens: what the reconstructions were decoded from; ``None`` if there are none.
        bits: float64 ``(B,)`` on the host, what every image costs to store; ``None`` if unknown.
        values: per-image values float32 ``(B,)`` of the metrics that have seen these pairs, by name.
    """

    originals: Originals
    reconstructions: Tensor
    tokens: Tokens | None = None
    bits: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.originals)

    @property
    def index(self) -> Tensor:
        return self.originals.index

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, computed once per batch of pairs, whoever asks: features of the reconstructions."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


class Metric(ABC):
    """Base class of all metrics.

    The life of one: :meth:`open`, :meth:`update` for every batch, :meth:`state_dict` whenever progress is saved; then,
    in a fresh object, :meth:`merge` for the last state of every process that took part, and :meth:`compute`.
    """

    def open(self, folder: Path, part: str) -> None:  # noqa: B027 -- most metrics keep their state in memory
        """Called before the first update and the first merge: where a metric may keep what is too large for memory.

        Args:
            folder: of this metric alone, shared by all processes that take part.
            part: a name of this process and start that no other has.
        """

    @abstractmethod
    def update(self, pairs: Pairs) -> None:
        """Take in a batch."""

    @abstractmethod
    def state_dict(self) -> State:
        """What has been gathered by this process since its start, as plain data on the host."""

    @abstractmethod
    def merge(self, state: State) -> None:
        """Add what a process has gathered: the :meth:`state_dict` of an object made like this one."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values, by name.

        Raises:
            MetricUnavailable: if what was gathered does not suffice.
        """

    def details(self) -> dict[str, Any]:
        """Tables and curves behind the values, as JSON data; asked for after :meth:`compute`."""
        return {}


class PerImageMetric(Metric):
    """A metric that gives every image values of its own; the result is their mean.

    The mean is taken in the order of the dataset, so it does not depend, not even in the last bit, on how images were
    spread over batches and processes.
    """

    names: Sequence[str] = ()

    def __init__(self) -> None:
        self._index: list[Tensor] = []
        self._values: list[Tensor] = []

    @abstractmethod
    def values(self, pairs: Pairs) -> Mapping[str, Tensor]:
        """The values ``(B,)`` under each of :attr:`names`, not finite where an image has none."""

    def update(self, pairs: Pairs) -> None:
        values = {name: value.detach().float() for name, value in self.values(pairs).items()}
        pairs.values |= values
        self._index.append(pairs.index)
        self._values.append(torch.stack([values[name] for name in self.names], 1))  # (B, V)

    def state_dict(self) -> State:
        index, values = self.table()
        return {"index": index, "values": values}

    def merge(self, state: State) -> None:
        self._index.append(state["index"])
        self._values.append(state["values"])

    def table(self) -> tuple[Tensor, Tensor]:
        """Numbers of the images, int64 ``(N,)`` ascending, and their values, float32 ``(N, V)``."""
        if not self._index:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, len(self.names))
        index, values = torch.cat(self._index), torch.cat([part.cpu() for part in self._values])
        order = index.argsort()
        self._index, self._values = [index[order]], [values[order]]
        return self._index[0], self._values[0]

    def compute(self) -> dict[str, float]:
        _, values = self.table()
        if not len(values):
            raise MetricUnavailable("no image was evaluated")
        result = {}
        for name, column in zip(self.names, values.double().unbind(1), strict=True):
            column = column[column.isfinite()]
            result[name] = float(column.mean()) if len(column) else float("nan")
        return result
