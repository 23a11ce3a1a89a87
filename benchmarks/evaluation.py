"""Time and memory of the quick suite against the same numbers from separate tools, and where the time goes.

    python benchmarks/evaluation.py                       # 200 pairs of 256x256: about ten minutes on two cores
    python benchmarks/evaluation.py --images 24           # does it run?
    python benchmarks/evaluation.py --json evaluation.json

``ours`` is what ``vistok evaluate images --suite quick`` runs: one pass, rFID, PSNR, SSIM and LPIPS from images that
are read once. ``again`` is the same with the statistics of the originals kept from the first run, as every later
tokenizer on the same data has them. ``separate`` is how evaluation scripts get these numbers: torch-fidelity on two
folders, then a loop over images with torchmetrics' SSIM and PSNR and the ``lpips`` package. The numbers must agree.

Each side runs in a process of its own, one after the other, one thread each, without reading workers; time is processor
time (user + system, children included), so other programs matter little. Memory is the resident set at its peak, less
what the process held before the first image, for two numbers of images: it must not grow with them. Images are crops of
the photographs in scikit-image; their reconstructions are JPEGs of quality 20. Networks have random weights, made here:
time does not depend on them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

SIZE = 256
MARK = "@@"  # starts the line that a worker reports in
TOLERANCES = {"rfid": 2e-3, "psnr": 1e-4, "ssim": 1e-3, "lpips_alex": 1e-4}
INCEPTION, ALEXNET = "weights-inception-2015-12-05-6726825d.pth", "alexnet-owt-7be5be79.pth"
console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="per process; time per pair is processor time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, folder = options.worker
        print(MARK + json.dumps(WORKERS[side](Path(folder))), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_weights(folder)
        for name, count in (("data", options.images), ("quarter", max(options.images // 4, 2))):
            write_images(folder / name, count)
        found = {
            "quarter": worker("ours", folder / "quarter", options.threads),
            "ours": worker("ours", folder / "data", options.threads),
            "again": worker("again", folder / "data", options.threads),
            "separate": worker("separate", folder / "data", options.threads),
        }
    report(found, options.images, max(options.images // 4, 2), options.threads)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    check(found)


def worker(side: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one side in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "VISTOK_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--worker", side, str(folder)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith(MARK))[len(MARK) :])


class Cost:
    """Processor seconds and growth of the resident set since the object was made."""

    def __init__(self) -> None:
        self.memory = _resident()
        self.time, self.clock = _processor_time(), time.perf_counter()

    def measure(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "seconds": _processor_time() - self.time,
            "wall": time.perf_counter() - self.clock,
            "megabytes": peak - self.memory,
        }


def _processor_time() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def ours(folder: Path) -> dict[str, Any]:
    """The quick suite on the files of a folder."""
    from vistok.eval import runner
    from vistok.eval.evaluate import Subject, choose, evaluate, manifest
    from vistok.eval.given import GivenReconstructions
    from vistok.eval.protocol import preset
    from vistok.eval.suites import Settings, images_suite
    from vistok.eval.weights import Weights

    source = GivenReconstructions(str(folder / "rec"), str(folder / "ref"))
    numbers = choose(len(source), None)
    protocol = preset("torch-fidelity", crop="none", rounding="given", height=SIZE, width=SIZE)
    weights = Weights(folder.parent, download=False, check=False)
    settings = Settings("quick", protocol, weights, torch.device("cpu"), numbers, manifest(source), extremes=4)
    suite = images_suite(settings)
    runner.time = SimpleNamespace(perf_counter=_processor_time, monotonic=time.monotonic)  # stages in processor time
    cost = Cost()
    with tempfile.TemporaryDirectory() as out:
        subject = Subject({"name": "jpeg"}, {"name": "crops"})
        results = evaluate(source, lambda image: image, suite, subject, Path(out), batch_size=8)
    values = {name: results.main.metrics[name] for name in TOLERANCES}
    return {"values": values, "stages": results.timing, **cost.measure()}


def separate(folder: Path) -> dict[str, Any]:
    """torch-fidelity on two folders, then one image after the other through torchmetrics and lpips."""
    import lpips
    import torch_fidelity
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    from torchvision.models import alexnet

    distance = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    network = alexnet(weights=None)
    network.load_state_dict(torch.load(folder.parent / ALEXNET, weights_only=True))
    _fill_lpips(distance, network)
    cost, stages = Cost(), Stages()
    values = {}
    with stages("torch-fidelity"):
        values["rfid"] = torch_fidelity.calculate_metrics(
            input1=str(folder / "rec"),
            input2=str(folder / "ref"),
            fid=True,
            cuda=False,
            cache=False,
            verbose=False,
            batch_size=8,
            feature_extractor_weights_path=str(folder.parent / INCEPTION),
        )["frechet_inception_distance"]
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "lpips_alex": []}
    for path in sorted((folder / "ref").iterdir()):
        with stages("read"):
            pair = [_read(folder / side / path.name) for side in ("rec", "ref")]
        with stages("psnr"):
            found["psnr"].append(float(PeakSignalNoiseRatio(data_range=1.0)(*pair)))
        with stages("ssim"):
            found["ssim"].append(float(StructuralSimilarityIndexMeasure(data_range=1.0)(*pair)))
        with stages("lpips_alex"), torch.no_grad():
            found["lpips_alex"].append(float(distance(*pair, normalize=True)))
    values |= {name: float(np.mean(column)) for name, column in found.items()}
    return {"values": values, "stages": stages.seconds, **cost.measure()}


class Stages:
    """Processor seconds by name: ``with stages("read"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def __call__(self, name: str) -> Stages:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = _processor_time()

    def __exit__(self, *error: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + _processor_time() - self._start


def _read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def _fill_lpips(distance: Any, network: Any) -> None:
    """Give the package's trunk the weights that our side reads from the file."""
    convolutions = [module for module in distance.net.modules() if isinstance(module, torch.nn.Conv2d)]
    for own, given in zip(convolutions, (m for m in network.features if isinstance(m, torch.nn.Conv2d)), strict=True):
        own.load_state_dict(given.state_dict())


WORKERS: dict[str, Callable[[Path], dict[str, Any]]] = {"ours": ours, "again": ours, "separate": separate}


def write_weights(folder: Path) -> None:
    """Files of random weights under the published names."""
    from torchvision.models import alexnet

    path = Path(__file__).parents[1] / "tests" / "eval" / "inception_weights.py"
    spec = importlib.util.spec_from_file_location("vistok_benchmark_inception_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.save_random_inception(folder / INCEPTION)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), folder / ALEXNET)


def write_images(folder: Path, count: int) -> None:
    """``ref``: crops of photographs; ``rec``: what JPEG of quality 20 leaves of them. PNG files."""
    import io

    from skimage import data

    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    random = np.random.default_rng(0)
    for side in ("ref", "rec"):
        (folder / side).mkdir(parents=True)
    for number in range(count):
        photograph = Image.fromarray(photographs[number % len(photographs)])
        side = int(random.integers(SIZE, min(photograph.size) + 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        crop.save(folder / "ref" / f"{number:05d}.png")
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=20)
        Image.open(file).save(folder / "rec" / f"{number:05d}.png")


def report(found: dict[str, Any], count: int, quarter: int, threads: int) -> None:
    """Print the numbers, the totals and the stages."""
    sides = ("separate", "ours", "again")
    table = Table("", *sides, title=f"{count} pairs of {SIZE}x{SIZE}, threads: {threads}")
    for name in TOLERANCES:
        table.add_row(name, *(f"{found[side]['values'][name]:.6f}" for side in sides))
    table.add_section()
    base, clock = (found["separate"][name] for name in ("seconds", "wall"))
    table.add_row("pairs/s", *(f"{count / found[side]['wall']:.2f}" for side in sides))
    table.add_row("CPU-ms per pair", *(f"{1000 * found[side]['seconds'] / count:.0f}" for side in sides))
    table.add_row("times as fast", *(f"{clock / found[side]['wall']:.2f}" for side in sides))
    table.add_row("times as fast, CPU", *(f"{base / found[side]['seconds']:.2f}" for side in sides))
    table.add_row("peak memory, MB", *(f"{found[side]['megabytes']:.0f}" for side in sides))
    console.print(table)
    growth = found["ours"]["megabytes"] - found["quarter"]["megabytes"]
    console.print(
        f"memory of ours: {found['quarter']['megabytes']:.0f} MB for {quarter} pairs, {growth:+.0f} MB for {count}"
    )
    stages = Table("stage", "CPU-ms per pair", title="where the time goes")
    for side in sides:
        stages.add_section()
        for name, seconds in sorted(found[side]["stages"].items(), key=lambda item: -item[1]):
            stages.add_row(f"{side}: {name}", f"{1000 * seconds / count:.1f}")
        rest = found[side]["seconds"] - sum(found[side]["stages"].values())
        stages.add_row(f"{side}: before and after the pass", f"{1000 * rest / count:.1f}")
    console.print(stages)


def check(found: dict[str, Any]) -> None:
    """End with an error if the sides do not measure the same."""
    expected = found["separate"]["values"]
    for side in ("ours", "again"):
        for name, tolerance in TOLERANCES.items():
            error = abs(found[side]["values"][name] - expected[name])
            if error > tolerance * max(abs(expected[name]), 1e-2):
                raise SystemExit(
                    f"{side}: {name} is {found[side]['values'][name]}, separate tools say {expected[name]}"
                )


if __name__ == "__main__":
    main()
