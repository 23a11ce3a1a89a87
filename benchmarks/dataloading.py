"""Images per second of Vistok's webdataset path against plain PIL + torchvision transforms, and exact resume.

    python benchmarks/dataloading.py --shards 'path/to/train-{000000..000003}.tar'

Three tables, in one run and interleaved, so that the ratios mean something on a busy machine too: (1) decode and crop
in one process, with the distance of the pixels from PIL's; (2) shards to batches with worker processes, against a
pipeline of the webdataset package; (3) loaders that are killed with SIGKILL and resumed from their last position.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from webdataset.shardlists import expand_urls

from vistok.data.images import decode_image
from vistok.data.loader import ImageLoader
from vistok.data.transforms import EvalTransform, TrainTransform, center_crop, resize_cover
from vistok.data.webdataset import WebDataset

console = Console(width=110)


# ------------------------------------------------------------------------------------------ 1. decode, one process
def pil_path(data: bytes, size: int) -> Tensor:
    """PIL decode, PIL bicubic resize, centre crop."""
    picture = v2.functional.resize(Image.open(io.BytesIO(data)).convert("RGB"), size, v2.InterpolationMode.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(picture, [size, size]))


def pil_decode_path(data: bytes, size: int) -> Tensor:
    """PIL decode, tensor bicubic resize, centre crop."""
    image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
    return center_crop(resize_cover(image, (size, size)), (size, size))


def vistok_path(data: bytes, size: int) -> Tensor:
    """Vistok: torchvision decode where it can, tensor bicubic resize, centre crop."""
    return EvalTransform(size)(decode_image(data))


def grey_levels_from_pil(data: bytes, size: int) -> tuple[float, float]:
    """Mean distance from PIL's pixels, of the decoded image and of the image resized to the same shape."""
    ours, picture = decode_image(data, exif=False), Image.open(io.BytesIO(data)).convert("RGB")
    decoded = (ours.int() - F.pil_to_tensor(picture).int()).abs().float().mean()
    ours = resize_cover(ours, (size, size))
    theirs = picture.resize((ours.shape[2], ours.shape[1]), Image.Resampling.BICUBIC)
    return float(decoded), float((ours.int() - F.pil_to_tensor(theirs).int()).abs().float().mean())


def decode_table(source: WebDataset, size: int, repeats: int, limit: int) -> None:
    files = [source.read_encoded(index)[0] for index in range(min(limit, len(source)))]

    def run(path: Callable[[bytes, int], Tensor]) -> None:
        for data in files:
            path(data, size)

    paths = {"PIL": pil_path, "PIL decode, tensor resize": pil_decode_path, "vistok": vistok_path}
    runs = {name: functools.partial(run, path) for name, path in paths.items()}
    rates = interleaved(runs, len(files), repeats)
    print_rates(f"Decode and crop to {size} px, one process, {len(files)} images", rates, "PIL")
    distances = np.array([grey_levels_from_pil(data, size) for data in files])
    console.print(
        f"Distance of vistok from PIL in grey levels, mean (worst image): decoded {distances[:, 0].mean():.3f} "
        f"({distances[:, 0].max():.3f}), resized {distances[:, 1].mean():.3f} ({distances[:, 1].max():.3f})\n"
    )


# ------------------------------------------------------------------------------------------ 2. shards to batches
def plain_sample(sample: dict[str, Any], transform: v2.Transform) -> Tensor:
    return transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def plain_loader(shards: str, size: int, batch_size: int, workers: int) -> DataLoader:
    """webdataset's own pipeline with PIL decode and torchvision transforms, as its users write it."""
    transform = v2.Compose(
        [
            v2.Resize(size, v2.InterpolationMode.BICUBIC),
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    dataset = webdataset.WebDataset(expand_urls(shards), shardshuffle=100).shuffle(500)
    dataset = dataset.map(functools.partial(plain_sample, transform=transform)).batched(batch_size, torch.stack)
    return DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def loader_table(source: WebDataset, shards: str, size: int, batch_size: int, workers: int, repeats: int) -> None:
    ours = training_loader(source, size, batch_size, workers)
    peer = plain_loader(shards, size, batch_size, workers)
    rates = interleaved(
        {
            "webdataset + PIL + torchvision": lambda: sum(len(batch) for batch in peer),
            "vistok": lambda: sum(len(batch["image"]) for batch in ours),
        },
        None,
        repeats,
    )
    ours.close()
    title = f"Shards to shuffled, cropped, flipped uint8 batches of {batch_size} at {size} px, {workers} workers"
    print_rates(title, rates, "webdataset + PIL + torchvision")


def training_loader(source: WebDataset, size: int, batch_size: int, workers: int, **ranks: int) -> ImageLoader:
    transform = TrainTransform(size)
    return ImageLoader(source, transform, batch_size, training=True, seed=0, num_workers=workers, **ranks)


def interleaved(runs: dict[str, Callable[[], Any]], images: int | None, repeats: int) -> dict[str, list[float]]:
    """Images per second of every run in every round; the first round (start of workers, page cache) does not count."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
            if attempt:
                rates[name].append((result if images is None else images) / seconds)
    return rates


def print_rates(title: str, rates: dict[str, list[float]], baseline: str) -> None:
    table = Table("path", "images/s (median)", f"ratio to {baseline}", "lowest", "highest", title=title)
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates[baseline], strict=True)]
        numbers = statistics.median(ratios), min(ratios), max(ratios)
        table.add_row(name, f"{statistics.median(values):.0f}", *(f"{number:.2f}" for number in numbers))
    console.print(table)


# ------------------------------------------------------------------------------------------ 3. kill and resume
def fingerprint(batch: dict[str, Any]) -> tuple[list[str], int]:
    """What a batch holds: its samples and a checksum of its pixels."""
    return batch["key"], int((batch["image"].long().flatten() * torch.arange(batch["image"].numel())).sum())


def run_until_killed(pipe: Any, build: Callable[[], ImageLoader]) -> None:
    loader = build()
    for batch in loader:
        pipe.send((fingerprint(batch), loader.state_dict()))
        pipe.recv()


def kill_and_resume(build: Callable[[int], ImageLoader], workers: int, other_workers: int) -> tuple[int, int, bool]:
    """Batches before the kill, batches after it, and whether together they are the uninterrupted epoch."""
    whole_loader = build(workers)
    whole = [fingerprint(batch) for batch in whole_loader]
    whole_loader.close()
    kill_after = max(1, len(whole) // 3)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    victim = context.Process(target=run_until_killed, args=(theirs, functools.partial(build, workers)))
    victim.start()
    before = []
    for k in range(kill_after):
        seen, state = ours.recv()
        before.append(seen)
        if k < kill_after - 1:
            ours.send("next")
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    resumed = build(other_workers)
    resumed.load_state_dict(state)
    after = [fingerprint(batch) for batch in resumed]
    resumed.close()
    return len(before), len(after), before + after == whole


def resume_table(source: WebDataset, size: int, batch_size: int) -> bool:
    title = "Killed with SIGKILL, resumed from the last position: the same samples and pixels as without?"
    columns = ("ranks", "rank", "workers before", "workers after", "batches before", "after", "identical")
    table = Table(*columns, title=title)
    good = True
    for world_size in (1, 2):
        for workers, other_workers in ((0, 0), (2, 2), (0, 2), (2, 0)):
            for rank in range(world_size):
                ranks = {"rank": rank, "world_size": world_size}

                def build(count: int, ranks: dict[str, int] = ranks) -> ImageLoader:
                    return training_loader(source, size, batch_size, count, **ranks)

                before, after, same = kill_and_resume(build, workers, other_workers)
                numbers = (world_size, rank, workers, other_workers, before, after)
                table.add_row(*map(str, numbers), "yes" if same else "NO")
                good &= same
    console.print(table)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="pattern of local shards, braces allowed")
    parser.add_argument("--size", type=int, default=256, help="side of the square crops in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of table 2")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds that count")
    parser.add_argument("--images", type=int, default=300, help="images of table 1")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a loader's worker has one; two would measure the machine's load
    source = WebDataset(args.shards)
    decode_table(source, args.size, args.repeats, args.images)
    loader_table(source, args.shards, args.size, args.batch_size, args.workers, args.repeats)
    if not resume_table(source, min(args.size, 64), args.batch_size):
        raise SystemExit("a resumed loader did not yield the remaining samples")


if __name__ == "__main__":
    main()
