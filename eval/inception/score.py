"""Inception score of the reconstructions, rIS (arXiv:1606.03498): are they clearly something, and different things?

``exp`` of the mean divergence of an image's class distribution from that of its split. Three conventions are published
and give different numbers, in how images are split and whether they are shuffled before:

* ``torch-fidelity``: 10 splits of a random order, the one that its seed 2020 gives;
* ``adm``: splits of 5000 in the order of the dataset (which has to be mixed already), the last may be smaller;
* ``one-split``: all images at once (TiTok's evaluator).

All three take the logits without bias. Sums over the images of a split suffice, so nothing is kept per image.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F

from ..metric import Metric, MetricUnavailable, Pairs, State
from ..protocol import InceptionScore as Convention
from .network import NUM_CLASSES, Inception

_SPLITS = 10
_SPLIT_SIZE = 5000
_SEED = 2020


class InceptionScore(Metric):
    """``ris`` and its standard deviation over splits, ``ris_std``.

    Args:
        inception: the network.
        numbers: of the images that will be evaluated, ascending, or how many if they are numbered from 0; their places
            say which split each belongs to.
        convention: ``torch-fidelity``, ``adm`` or ``one-split``.

    Raises:
        ValueError: for another convention, or fewer than one image.
    """

    def __init__(
        self, inception: Inception, numbers: int | np.ndarray, convention: Convention = "torch-fidelity"
    ) -> None:
        if convention not in get_args(Convention):
            raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}; got {convention!r}")
        self.numbers = torch.as_tensor(np.arange(numbers) if isinstance(numbers, int) else numbers)  # (N,)
        if not len(self.numbers):
            raise ValueError(f"there must be at least 1 image; got {numbers}")
        self.inception = inception
        self.convention = convention
        self.split_of = splits(len(self.numbers), convention)  # (N,)
        number = int(self.split_of.max()) + 1
        self._counts = torch.zeros(number, dtype=torch.float64)
        self._probabilities = torch.zeros(number, NUM_CLASSES, dtype=torch.float64)
        self._negative_entropies = torch.zeros(number, dtype=torch.float64)

    def update(self, pairs: Pairs) -> None:
        """Take in a batch.

        Raises:
            ValueError: for an image of another number.
        """
        places = torch.searchsorted(self.numbers, pairs.index).clamp(max=len(self.numbers) - 1)
        if not torch.equal(self.numbers[places], pairs.index):
            raise ValueError(f"images must be among the {len(self.numbers)} announced; got {pairs.index.tolist()}")
        logits = self.inception.logits(self.inception.reconstructions(pairs).pool)  # (B, 1008)
        if logits.device.type == "mps":  # which has no float64
            logits = logits.cpu()
        logs = logits.double().log_softmax(1)
        probabilities = logs.exp()
        self._to(logits.device)
        # A product instead of an index_add, which CUDA adds up in another order every time.
        members = F.one_hot(self.split_of[places], len(self._counts)).T.to(probabilities)  # (S, B)
        self._counts += members.sum(1)
        self._probabilities.addmm_(members, probabilities)
        self._negative_entropies.addmv_(members, (probabilities * logs).sum(1))

    def state_dict(self) -> State:
        return {
            "counts": self._counts.cpu(),
            "probabilities": self._probabilities.cpu(),
            "negative_entropies": self._negative_entropies.cpu(),
        }

    def merge(self, state: State) -> None:
        device = self._counts.device
        self._counts += state["counts"].to(device)
        self._probabilities += state["probabilities"].to(device)
        self._negative_entropies += state["negative_entropies"].to(device)

    def compute(self) -> dict[str, float]:
        scores = self._scores()
        return {"ris": float(scores.mean()), "ris_std": float(scores.std(correction=0))}

    def details(self) -> dict[str, Any]:
        return {"convention": self.convention, "splits": self._scores().tolist()}

    def _scores(self) -> torch.Tensor:
        """The score of every split that has images."""
        filled = self._counts > 0
        if not filled.any():
            raise MetricUnavailable("no image was evaluated")
        counts = self._counts[filled]
        mean = self._probabilities[filled] / counts.unsqueeze(1)  # (S, 1008)
        entropy = -torch.special.xlogy(mean, mean).sum(1)
        return (entropy + self._negative_entropies[filled] / counts).exp()

    def _to(self, device: torch.device) -> None:
        self._counts = self._counts.to(device)
        self._probabilities = self._probabilities.to(device)
        self._negative_entropies = self._negative_entropies.to(device)


def splits(num_images: int, convention: Convention) -> torch.Tensor:
    """The split that every image belongs to, int64 ``(N,)``."""
    if convention == "one-split":
        return torch.zeros(num_images, dtype=torch.int64)
    if convention == "adm":
        return torch.arange(num_images) // _SPLIT_SIZE
    bounds = [number * num_images // _SPLITS for number in range(_SPLITS + 1)]
    result = torch.empty(num_images, dtype=torch.int64)
    order = torch.from_numpy(np.random.RandomState(_SEED).permutation(num_images))
    for number in range(_SPLITS):
        result[order[bounds[number] : bounds[number + 1]]] = number
    return result
