"""Batches of given tokens, and metrics fed with them in one pass or in shards."""

import torch

from vistok.eval.metric import Originals, Pairs
from vistok.tokenizers.base import Stream, Tokens


def layout_of(sizes=(16,), length=12, grid=None, name="image"):
    return (Stream(name, length, tuple(sizes), grid),)


def random_tokens(layout, images, seed=0, dropped=0.0):
    draws = torch.Generator().manual_seed(seed)
    indices, mask = {}, {}
    for stream in layout:
        columns = [torch.randint(size, (images, stream.length), generator=draws) for size in stream.codebook_sizes]
        skewed = [
            torch.minimum(c, torch.randint(s, c.shape, generator=draws))
            for c, s in zip(columns, stream.codebook_sizes, strict=True)
        ]
        indices[stream.name] = torch.stack(skewed, 2)
        mask[stream.name] = torch.rand(images, stream.length, generator=draws) >= dropped
    return Tokens(indices, layout, mask if dropped else None)


def pairs(tokens, index, pixels=(8, 8)):
    index = torch.as_tensor(index)
    images = torch.zeros(len(index), 3, *pixels, dtype=torch.uint8)
    originals = Originals(index, [str(i) for i in index.tolist()], torch.full_like(index, -1), images)
    return Pairs(originals, images, tokens)


def gathered(make, tokens, folder, parts=None, index=None, batch=4, through=None):
    """Metrics made by ``make`` after merging parts; ``parts``: the images of each process, all in one if ``None``."""
    index = torch.arange(len(tokens)) if index is None else torch.as_tensor(index)
    states = []
    for number, part in enumerate([range(len(tokens))] if parts is None else parts):
        metrics = make()
        for place, metric in enumerate(metrics):
            metric.open(folder / str(place), f"part-{number}")
        for chosen in torch.tensor(list(part), dtype=torch.int64).split(batch):
            for metric in metrics:
                metric.update(pairs(tokens[chosen], index[chosen]))
        states.append([metric.state_dict() for metric in metrics])
    if through is not None:
        torch.save(states, through)
        states = torch.load(through, weights_only=True)
    merged = make()
    for place, metric in enumerate(merged):
        metric.open(folder / str(place), "merged")
        for state in states:
            metric.merge(state[place])
    return merged
