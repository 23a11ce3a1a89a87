"""A small evaluation: random images in memory, one variant, metrics of all three kinds of state."""

import torch

from vistok.data.images import ImageError
from vistok.data.source import ImageSource, Sample
from vistok.eval.metric import Metric, Pairs, PerImageMetric
from vistok.eval.rows import Rows
from vistok.eval.runner import Evaluation
from vistok.eval.variants import OriginalsVariant, Variant


class RandomImages(ImageSource):
    """Images of 8x8 random pixels, a function of their number; some of them cannot be read."""

    def __init__(self, length=23, damaged=(), side=8):
        self.length, self.damaged, self.side = length, damaged, side

    def __len__(self):
        return self.length

    def read(self, index):
        if index in self.damaged:
            raise ImageError(f"image {index}: damaged")
        return Sample(self.image(index), index % 3, f"image {index}")

    def image(self, index):
        draws = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, self.side, self.side), generator=draws, dtype=torch.uint8)


class Darker(Variant):
    """Half as bright."""

    name, kind, settings = "dark/half", "codec", {"factor": 0.5}

    def reconstruct(self, originals):
        return Pairs(originals, originals.images // 2)


class Brightness(PerImageMetric):
    names = ("brightness", "first_pixel")

    def values(self, pairs):
        pixels = pairs.reconstructions.float()
        return {"brightness": pixels.mean((1, 2, 3)), "first_pixel": pixels[:, 0, 0, 0]}


class PixelSum(Metric):
    def __init__(self):
        self.total = torch.zeros((), dtype=torch.float64)
        self.seen = []

    def update(self, pairs):
        self.total += pairs.reconstructions.double().sum()
        self.seen += pairs.index.tolist()

    def state_dict(self):
        return {"total": self.total.clone(), "seen": list(self.seen)}

    def merge(self, state):
        self.total += state["total"]
        self.seen += state["seen"]

    def compute(self):
        return {"pixel_sum": float(self.total)}


class Table(Metric):
    """Keeps the first row of every image on disk."""

    def __init__(self, width=8):
        self.rows = Rows(width, "uint8")

    def open(self, folder, part):
        self.rows.open(folder, part)

    def update(self, pairs):
        self.rows.append(pairs.index, pairs.reconstructions[:, 0, 0])

    def state_dict(self):
        return self.rows.state_dict()

    def merge(self, state):
        self.rows.merge(state)

    def compute(self):
        return {"rows": float(len(self.rows))}


def build():
    return [
        Evaluation(Darker(), {"brightness": Brightness(), "sum": PixelSum(), "table": Table()}),
        Evaluation(OriginalsVariant(), {"sum": PixelSum()}),
    ]


def same(image):
    return image
