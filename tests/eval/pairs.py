"""Originals and reconstructions to measure with: parts of a photograph, each worse than the one before."""

import torch
from skimage.data import astronaut

from vistok.eval.metric import Originals, Pairs


def photographs(count, height, width):
    """uint8 ``(count, 3, height, width)``: parts of one photograph."""
    image = torch.from_numpy(astronaut()).permute(2, 0, 1)
    tops, lefts = torch.randint(0, 1 << 16, (2, count), generator=torch.Generator().manual_seed(0)).tolist()
    tops, lefts = [top % (513 - height) for top in tops], [left % (513 - width) for left in lefts]
    return torch.stack(
        [image[:, top : top + height, left : left + width] for top, left in zip(tops, lefts, strict=True)]
    )


def degraded(images, strength=8.0):
    """uint8 images with noise that grows from one to the next, and colours that fade."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    growth = torch.arange(1, len(images) + 1).view(-1, 1, 1, 1)
    return (0.9 * images.float() + 10 + strength * growth * noise).round().clamp(0, 255).byte()


def pair(images, reconstructions, start=0):
    """A batch whose first image has the number ``start``."""
    index = torch.arange(start, start + len(images))
    keys = [str(number) for number in index.tolist()]
    return Pairs(Originals(index, keys, torch.full_like(index, -1), images), reconstructions)


def one_pass_and_merged(make, images, reconstructions):
    """``compute()`` of one metric over all images, and of one that merges the states of two unequal shards."""
    whole, merged = make(), make()
    whole.update(pair(images, reconstructions))
    for shard in (slice(2, None), slice(0, 2)):
        part = make()
        part.update(pair(images[shard], reconstructions[shard], shard.start))
        merged.merge(part.state_dict())
    return whole.compute(), merged.compute()
