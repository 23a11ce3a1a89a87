"""Pictures for the report: chosen images, the best and the worst.

A pass over 50,000 images keeps a few dozen of them, on the device that evaluates. Which are best and worst is decided
by a per-image value that another metric has left in :attr:`Pairs.values`, so a gallery comes last among the metrics of
its variant. Equal values are ordered by the number of the image: however a dataset is spread over batches and
processes, the same pictures are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..metric import Metric, Pairs, State
from .names import metric_name

_JUDGES = ("lpips_alex", "lpips_vgg", "psnr")  # the first that was computed tells best from worst
_SETTLE = 32  # batches whose keys are held before those of images that dropped out are forgotten


@dataclass(frozen=True)
class Picture:
    """An image and its reconstruction, as kept for the report.

    Attributes:
        index: number of the image.
        key: what it is called.
        kind: why it was kept.
        value_name: metric that judged it; empty if none did.
        value: of that metric; ``None`` if the image has none.
        original: uint8 ``(3, H, W)`` on the host.
        reconstruction: uint8 ``(3, H, W)`` on the host.
    """

    index: int
    key: str
    kind: Literal["preview", "best", "worst"]
    value_name: str
    value: float | None
    original: Tensor
    reconstruction: Tensor


@dataclass
class _Shelf:
    """Some images side by side: numbers and values ``(K,)``, pictures ``(K, 3, H, W)``."""

    index: Tensor
    value: Tensor
    originals: Tensor
    reconstructions: Tensor

    def __getitem__(self, rows: Tensor) -> _Shelf:
        return _Shelf(self.index[rows], self.value[rows], self.originals[rows], self.reconstructions[rows])

    def joined(self, other: _Shelf) -> _Shelf:
        return _Shelf(*(torch.cat([mine, theirs]) for mine, theirs in zip(self.parts(), other.parts(), strict=True)))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.index, self.value, self.originals, self.reconstructions

    def smallest(self, count: int, sign: float) -> _Shelf:
        """The ``count`` images of smallest ``sign * value``, ascending; those without a finite value come last."""
        order = self.index.argsort()
        score = (sign * self.value[order]).nan_to_num(torch.inf, torch.inf, torch.inf)
        return self[order[score.argsort(stable=True)[:count]]]


class Gallery(Metric):
    """Keeps pictures; computes nothing.

    Args:
        previews: numbers of the images to keep whatever they look like.
        count: how many of the best, and how many of the worst, to keep besides.
        judge: per-image value that tells best from worst; LPIPS if it is there, else PSNR, if ``None``.

    Raises:
        ValueError: for a negative count, or a judge of which it is not known whether higher is better.
    """

    def __init__(self, previews: Sequence[int] = (), count: int = 8, judge: str | None = None) -> None:
        if count < 0:
            raise ValueError(f"count must not be negative; got {count}")
        if judge is not None and metric_name(judge).higher_is_better is None:
            raise ValueError(f"judge must be a metric with a direction, such as {', '.join(_JUDGES)}; got {judge!r}")
        self.previews = list(dict.fromkeys(int(number) for number in previews))
        self.count = count
        self.judge = judge
        self._shelves: dict[str, _Shelf] = {}
        self._keys: dict[int, str] = {}
        self._batches = 0

    def update(self, pairs: Pairs) -> None:
        if self.judge is None:
            self.judge = next((name for name in _JUDGES if name in pairs.values), None)
        images = pairs.originals.images
        value = pairs.values.get(self.judge) if self.judge else None
        if value is None:
            value = torch.full((len(pairs),), torch.nan, device=images.device)
        index = pairs.index.to(images.device, non_blocking=True)
        batch = _Shelf(index, value.detach().float().to(images.device), images, pairs.reconstructions)
        wanted = set(self.previews)
        chosen = [row for row, number in enumerate(pairs.index.tolist()) if number in wanted]
        if chosen:
            self._place("preview", batch[torch.tensor(chosen, device=images.device)])
        if self.judge and self.count:
            self._place("best", batch.smallest(self.count, self._sign))
            self._place("worst", batch.smallest(self.count, -self._sign))
        self._keys |= zip(pairs.index.tolist(), pairs.originals.keys, strict=True)
        self._batches += 1
        if self._batches % _SETTLE == 0:
            self._forget()

    def state_dict(self) -> State:
        self._forget()
        shelves = {
            kind: {
                "index": shelf.index.cpu(),
                "value": shelf.value.cpu(),
                "originals": shelf.originals.cpu(),
                "reconstructions": shelf.reconstructions.cpu(),
            }
            for kind, shelf in self._shelves.items()
        }
        return {"judge": self.judge or "", "keys": dict(self._keys), "shelves": shelves}

    def merge(self, state: State) -> None:
        if state["judge"]:
            if self.judge not in (None, state["judge"]):
                raise ValueError(f"galleries judged by {self.judge} and by {state['judge']} cannot be merged")
            self.judge = state["judge"]
        self._keys |= state["keys"]
        for kind, shelf in state["shelves"].items():
            self._place(kind, _Shelf(**shelf))
        self._forget()

    def compute(self) -> dict[str, float]:
        """Nothing: a gallery holds pictures, not numbers."""
        return {}

    def pictures(self) -> list[Picture]:
        """What was kept: previews in the order asked for, the best from the best, the worst from the worst."""
        result = []
        for kind in ("preview", "best", "worst"):
            if kind not in self._shelves:
                continue
            shelf = _Shelf(*(part.cpu() for part in self._shelves[kind].parts()))
            rows = range(len(shelf.index))
            if kind == "preview":
                place = {number: i for i, number in enumerate(self.previews)}
                rows = sorted(rows, key=lambda row: place[int(shelf.index[row])])
            for row in rows:
                number, value = int(shelf.index[row]), float(shelf.value[row])
                finite = abs(value) < float("inf")
                if kind != "preview" and not finite:
                    continue
                result.append(
                    Picture(
                        number,
                        self._keys[number],
                        kind,
                        self.judge or "",
                        value if finite else None,
                        shelf.originals[row],
                        shelf.reconstructions[row],
                    )
                )
        return result

    @property
    def _sign(self) -> float:
        return -1.0 if metric_name(self.judge or "").higher_is_better else 1.0

    def _place(self, kind: str, shelf: _Shelf) -> None:
        """Put images on a shelf, and take off those for which there is no room."""
        if kind in self._shelves:
            shelf = self._shelves[kind].joined(shelf)
        if kind != "preview":
            shelf = shelf.smallest(self.count, self._sign if kind == "best" else -self._sign)
        self._shelves[kind] = shelf

    def _forget(self) -> None:
        """Drop the keys of images that are on no shelf."""
        kept = {number for shelf in self._shelves.values() for number in shelf.index.tolist()}
        self._keys = {number: key for number, key in self._keys.items() if number in kept}
