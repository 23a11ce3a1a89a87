"""An Inception without a network: features are a fixed linear map of the pixels of tiny images."""

import torch

from vistok.eval.inception.network import Inception, InceptionFeatures
from vistok.eval.metric import Originals, Pairs


class FakeInception(Inception):
    """Sharing of features is that of the real one; ``calls`` counts how often images were looked at."""

    def __init__(self, size=4):
        self.device = torch.device("cpu")
        self.calls = 0
        generator = torch.Generator().manual_seed(0)
        # Small fractions of powers of two: products with pixels are exact, however many images come together.
        self.weight = torch.randint(-64, 65, (3 * size * size, 2048), generator=generator) / 16384
        self.spatial_weight = torch.randint(-64, 65, (3 * size * size, 2023), generator=generator) / 16384
        self._classifier = torch.randn(1008, 2048, generator=generator).double() * 0.05
        self._classifier_bias = torch.zeros(1008).double()

    def __call__(self, images):
        self.calls += 1
        pixels = images.flatten(1).float()
        return InceptionFeatures((pixels @ self.weight).relu(), (pixels @ self.spatial_weight).relu())


def random_images(number, seed=0, size=4):
    return torch.randint(0, 256, (number, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def make_pairs(originals, reconstructions, rows=None):
    """A batch of the images numbered ``rows``, of all by default."""
    index = torch.arange(len(originals)) if rows is None else torch.as_tensor(rows)
    keys = [str(number) for number in index.tolist()]
    batch = Originals(index, keys, torch.full_like(index, -1), originals[index])
    return Pairs(batch, reconstructions[index])


def feed(metrics, originals, reconstructions, rows=None, batch=7):
    """Update metrics with the images numbered ``rows``, batch by batch."""
    rows = torch.arange(len(originals)) if rows is None else torch.as_tensor(rows)
    for part in rows.split(batch):
        pairs = make_pairs(originals, reconstructions, part)
        for metric in metrics:
            metric.update(pairs)


def saved(state, path):
    """A state as another process would find it."""
    torch.save(state, path)
    return torch.load(path, weights_only=True)
