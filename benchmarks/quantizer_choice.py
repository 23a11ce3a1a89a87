"""The same small tokenizer with every quantizer of configs/quantizers, trained alike: quality against bits.

    python benchmarks/quantizer_choice.py                        # writes docs/quantizers.json and docs/quantizers.png
    python benchmarks/quantizer_choice.py --only fsq lfq --steps 100

A small VQGAN with 8 x 8 tokens learns 32 x 32 crops of the demo photographs for a few hundred steps at the quantizer's
own loss weights. The PSNR of such a run ranks nothing beyond this scale; it shows what each quantizer costs in bits,
that it learns from the start, and how many of its codes it uses. Every run has the same seed, crops and schedule; the
figures of another machine differ in the last digit. ``--plot`` draws from the stored figures alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import yaml
from rich.progress import track

from vistok import VQGAN
from vistok.data.demo import DemoPhotographs
from vistok.eval.reconstruction import psnr
from vistok.eval.tokens.codebook import codebook_statistics
from vistok.layers.configurable import build
from vistok.training.objectives import ReconstructionObjective

ROOT = Path(__file__).resolve().parents[1]
SIZE, BATCH, LEARNING_RATE = 32, 16, 1e-3


def crops(split: str, number: int) -> torch.Tensor:
    """``(number, 3, 32, 32)`` crops of the photographs at a quarter of their size, in [0, 1]."""
    source = DemoPhotographs(split)
    source.prepare()
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(number):
        photograph = torch.nn.functional.avg_pool2d(source.read(i).image.float() / 255, 4)
        top, left = (int(torch.randint(side - SIZE + 1, (), generator=generator)) for side in photograph.shape[1:])
        found.append(photograph[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(found)


def train(config: Path, steps: int, training: torch.Tensor, validation: torch.Tensor) -> dict[str, float]:
    """Train one tokenizer; returns bits per token, PSNR in dB, usage and perplexity on the validation crops."""
    torch.manual_seed(0)
    quantizer = build(yaml.safe_load(config.read_text()))
    model = VQGAN(quantizer, SIZE, channels=32, channel_multipliers=(1, 1, 1), num_blocks=1, latent_channels=32)
    objective = ReconstructionObjective(l1=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    order = torch.Generator().manual_seed(1)
    started = time.process_time()
    for step in range(steps):
        batch = training[torch.randint(len(training), (BATCH,), generator=order)]
        result = objective(model, batch, step)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.commit_update()
    seconds = time.process_time() - started
    model.eval()
    with torch.no_grad():
        result = objective(model, validation, steps)
    values = {
        "bits_per_image": sum(stream.length * stream.bits for stream in model.layout()),
        "tokens": sum(stream.length for stream in model.layout()),
        "psnr": float(psnr(result.reconstruction.clamp(0, 1), validation).mean()),
        "cpu_seconds_per_step": seconds / steps,
    }
    counts = result.output.statistics.get("counts")
    if counts is not None:
        used = codebook_statistics(counts, model.codebook_sizes)
        values |= {"usage": float(used["usage"]), "perplexity": float(used["perplexity"])}
    return values


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """One row per quantizer, by bits and then PSNR: bits per image, PSNR, share of the codes in use."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(results.items(), key=lambda item: (item[1]["bits_per_image"], item[1]["psnr"]))
    places = range(len(rows))
    panels = (
        ("bits per 32 x 32 image", [row["bits_per_image"] for _, row in rows], "{:.0f}"),
        ("PSNR of held-out crops (dB)", [row["psnr"] for _, row in rows], "{:.1f}"),
        ("codes in use (%)", [100 * row.get("usage", math.nan) for _, row in rows], "{:.0f}"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.26 * len(rows) + 1), sharey=True, constrained_layout=True)
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        axis.hlines(places, min(0, *values) if title != panels[1][0] else min(values) - 0.5, values, color="#b9cbe0")
        axis.plot(values, places, "o", color="#1f5fa8", markersize=5)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                form.format(value), (value, place), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center"
            )
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.14, y=0.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(places, [name for name, _ in rows])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the command line, train, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="*", help="names of configs/quantizers to run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quantizers.json")
    parser.add_argument("--plot", action="store_true", help="draw from the stored figures, train nothing")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if not arguments.plot:
        configs = sorted((ROOT / "configs" / "quantizers").glob("*.yaml"))
        wanted = [path for path in configs if not arguments.only or path.stem in arguments.only]
        # One-dimensional scales need a one-dimensional tokenizer.
        wanted = [path for path in wanted if not path.stem.endswith("_1d")]
        training, validation = crops("train", 512), crops("val", 64)
        for path in track(wanted, description="training"):
            results[path.stem] = train(path, arguments.steps, training, validation)
            arguments.out.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
    print(f"{'quantizer':24} {'bits/image':>10} {'PSNR':>6} {'usage':>6} {'perplexity':>10} {'ms/step':>8}")
    for name, result in results.items():
        usage = f"{result['usage']:6.1%} {result['perplexity']:10.1f}" if "usage" in result else f"{'-':>6} {'-':>10}"
        cost = 1000 * result["cpu_seconds_per_step"]
        print(f"{name:24} {result['bits_per_image']:10.0f} {result['psnr']:6.2f} {usage} {cost:8.1f}")
    plot(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
