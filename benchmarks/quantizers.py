"""Time and memory of a training step of the quantizers, against vector-quantize-pytorch and dense autograd.

    pip install vector-quantize-pytorch
    python benchmarks/quantizers.py                     # everything: half an hour on one core
    python benchmarks/quantizers.py --case lfq --case vq-8192-dim8
    python benchmarks/quantizers.py --quick             # an eighth of the tokens, once: does it run?

Every case first shows on a few tokens that both sides do the same: equal indices for the same codes, and equal
gradients of the latents where the definitions agree; the last column says where they do not. Then each side runs in a
process of its own. A step is forward, backward and, on our side, ``commit_update``; a peer with moving averages updates
them in its forward pass. Time is processor time (user + system), the least of several steps after a first one, so that
other programs on the machine matter little; the spread is how much longer the slowest step took. Memory is what the
first step adds to the resident set at its peak, without module and latents; some 15 MB of it are noise, so
the ratio takes less as that.

With a GPU, a second table compares the search alone: the Triton kernel, the torch version, ``torch.cdist`` + argmin and
vector-quantize-pytorch, with the share of the machine's measured speed of matrix products.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vistok.quantizers import search
from vistok.quantizers.base import Quantizer
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.ibq import IndexBackpropQuantizer
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.residual import Residual
from vistok.quantizers.sim_vq import SimVQ
from vistok.quantizers.vq import VectorQuantizer

WARM_UP_TOKENS = 64
MEMORY_NOISE = 15.0  # MB
INDICES_EQUAL = 0.999  # share; the others are as near up to rounding

console = Console(width=150)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        tokens: N.
        dim: D.
        ours: builds our quantizer.
        peer: builds the other side, a module whose result starts with quantized, indices and, if any, the loss.
        same: gives the other side our codes.
        differs: where the definitions differ.
        tolerance: how far the gradients of the latents may be apart, as a share of the largest; ``None`` if they
            differ by definition.
        check_tokens: tokens of that comparison.
    """

    tokens: int
    dim: int
    ours: Callable[[], Quantizer]
    peer: Callable[[], nn.Module] | None = None
    same: Callable[[nn.Module, nn.Module], None] | None = None
    differs: str = ""
    tolerance: float | None = 1e-4
    check_tokens: int = 2048


# ------------------------------------------------------------------------------------------ the sides of a comparison
def lucidrains(name: str, **arguments: Any) -> nn.Module:
    """A module of vector-quantize-pytorch."""
    import vector_quantize_pytorch

    return getattr(vector_quantize_pytorch, name)(**arguments)


def vq(codebook_size: int, dim: int, **arguments: Any) -> VectorQuantizer:
    """With codes as far apart as the latents, where a trained codebook is and not where it starts."""
    quantizer = VectorQuantizer(codebook_size, dim, **arguments)
    codes = torch.randn(codebook_size, dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        quantizer.codebook.copy_(F.normalize(codes, dim=1) if quantizer.l2_normalize else codes)
    return quantizer


def same_codebook(ours: nn.Module, peer: nn.Module) -> None:
    with torch.no_grad():
        peer._codebook.embed.copy_(ours.codebook)


def same_codebooks(ours: nn.Module, peer: nn.Module) -> None:
    for level, layer in zip(ours.quantizers, peer.layers, strict=True):
        same_codebook(level, layer)


def same_transform(ours: nn.Module, peer: nn.Module) -> None:
    with torch.no_grad():
        peer.frozen_codebook.copy_(ours.frozen)
        peer.code_transform.weight.copy_(ours.transform[0].weight)


def same_parameters(ours: nn.Module, peer: nn.Module) -> None:
    peer.load_state_dict(ours.state_dict())


def residual(codebook_size: int, dim: int) -> Residual:
    quantizer = Residual(VectorQuantizer(codebook_size, dim, codebook_update="ema"), depth=4)
    with torch.no_grad():
        for number, level in enumerate(quantizer.quantizers):
            generator = torch.Generator().manual_seed(number)
            level.codebook.copy_(torch.randn(codebook_size, dim, generator=generator) * 0.7**number)
    return quantizer


class DenseIBQ(nn.Module):
    """Index backpropagation as it is written down: one-hot, softmax and their product with the codebook."""

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = z @ self.codebook.T  # (1, N, K)
        probabilities = logits.softmax(-1)
        indices = logits.argmax(-1)
        chosen = F.one_hot(indices, len(self.codebook)).to(z.dtype)
        quantized = (chosen - probabilities.detach() + probabilities) @ self.codebook
        codes = chosen @ self.codebook
        losses = (quantized - z).square().mean() + (codes.detach() - z).square().mean()
        return quantized, indices, losses + 0.25 * (codes - z.detach()).square().mean()


def cases() -> dict[str, Case]:
    """All comparisons by name."""
    found: dict[str, Case] = {}
    for codebook_size in (8192, 16384):
        for dim in (8, 16, 64):
            found[f"vq-{codebook_size}-dim{dim}"] = ema_case(codebook_size, dim, 16384)
    for dim in (8, 64):
        found[f"vq-cosine-8192-dim{dim}"] = ema_case(8192, dim, 16384, cosine=True)
    found["vq-gradient-8192-dim8"] = Case(
        16384,
        8,
        functools.partial(vq, 8192, 8),
        functools.partial(
            lucidrains,
            "VectorQuantize",
            dim=8,
            codebook_size=8192,
            learnable_codebook=True,
            ema_update=False,
            commitment_weight=0.25,
            rotation_trick=False,
        ),
        same_codebook,
        "weight of the loss that moves the codes: 1; the peer: 0.25, as for the latents",
    )
    for dim in (8, 16, 64):
        found[f"vq-262144-dim{dim}"] = ema_case(262144, dim, 1024)
        found[f"vq-262144-dim{dim}-large"] = Case(
            16384, dim, functools.partial(vq, 262144, dim, codebook_update="ema"), differs="the peer needs 103 GB"
        )
    found |= lfq_cases()
    for dim in (8, 64):
        found[f"residual-4x8192-dim{dim}"] = Case(
            16384,
            dim,
            functools.partial(residual, 8192, dim),
            functools.partial(
                lucidrains,
                "ResidualVQ",
                dim=dim,
                num_quantizers=4,
                codebook_size=8192,
                decay=0.99,
                commitment_weight=0.25,
                rotation_trick=False,
            ),
            same_codebooks,
            "the peer's gradient of the latents is 4 times too large; its losses are a sum over the levels",
            tolerance=None,
        )
    found["fsq-8-8-8-6-5"] = Case(
        16384,
        5,
        functools.partial(FiniteScalarQuantizer, [8, 8, 8, 6, 5]),
        functools.partial(lucidrains, "FSQ", levels=[8, 8, 8, 6, 5]),
    )
    found["simvq-8192-dim8"] = Case(
        16384,
        8,
        functools.partial(SimVQ, 8192, 8),
        functools.partial(lucidrains, "SimVQ", dim=8, codebook_size=8192),
        same_transform,
    )
    found["ibq-16384-dim256"] = Case(
        1024,
        256,
        functools.partial(IndexBackpropQuantizer, 16384, 256, entropy_temperature=None),
        functools.partial(DenseIBQ, 16384, 256),
        same_parameters,
        "the peer is dense autograd; neither side has the entropy loss",
        check_tokens=128,
    )
    return found


def ema_case(codebook_size: int, dim: int, tokens: int, cosine: bool = False) -> Case:
    return Case(
        tokens,
        dim,
        functools.partial(vq, codebook_size, dim, l2_normalize=cosine, codebook_update="ema"),
        functools.partial(
            lucidrains,
            "VectorQuantize",
            dim=dim,
            codebook_size=codebook_size,
            decay=0.99,
            commitment_weight=0.25,
            rotation_trick=False,
            use_cosine_sim=cosine,
        ),
        same_codebook,
        "averages: fractions of the tokens, applied in commit_update; the peer: counts, in forward",
        check_tokens=min(2048, tokens // 4),
    )


def lfq_cases() -> dict[str, Case]:
    found = {}
    for bits, tokens in ((14, 4096), (18, 512)):
        found[f"lfq-2^{bits}"] = Case(
            tokens,
            bits,
            functools.partial(LookupFreeQuantizer, bits, bit_order="most_significant_first"),
            functools.partial(
                lucidrains, "LFQ", dim=bits, codebook_size=2**bits, commitment_loss_weight=0.25, entropy_loss_weight=0.1
            ),
            differs="the peer bounds probabilities below by 1e-5 in the logarithm: its gradient is off",
            tolerance=0.05,
            check_tokens=64,
        )
    found["lfq-2^18-large"] = Case(
        16384, 18, functools.partial(LookupFreeQuantizer, 18), differs="the peer needs 121 GB"
    )
    return found


# ------------------------------------------------------------------------------------------ one side, one process
def make_step(module: nn.Module, tokens: int, dim: int, scale: float = 1.0) -> Callable[[], tuple[Tensor, Tensor]]:
    """A training step that returns indices ``(1, N, G)`` and the gradient of the latents ``(1, N, D)``."""
    generator = torch.Generator().manual_seed(1234)  # no codebook has it: latents must not be codes
    z = torch.randn(1, tokens, dim, generator=generator).requires_grad_()
    upstream = torch.randn(1, tokens, dim, generator=generator) * scale

    def step() -> tuple[Tensor, Tensor]:
        z.grad = None
        module.zero_grad(set_to_none=True)
        if isinstance(module, Quantizer):
            result = module(z)
            quantized, indices = result.quantized, result.indices
            loss = sum(module.default_loss_weights[name] * value for name, value in result.losses.items())
        else:
            quantized, indices, *losses = module(z)
            loss = sum(value.sum() for value in losses)
        ((quantized * upstream).sum() + loss).backward()
        if isinstance(module, Quantizer):
            module.commit_update()
        return indices.reshape(1, tokens, -1), z.grad

    return step


def resident() -> int:
    """Bytes of the resident set now; its peak so far where /proc does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident()


def peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(case: Case, side: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of every step and the memory that the first one adds."""
    torch.manual_seed(0)
    module = (case.ours if side == "ours" else case.peer)().train()
    make_step(module, WARM_UP_TOKENS, case.dim)()  # imports and threads
    step = make_step(module, tokens, case.dim)
    module.zero_grad(set_to_none=True)
    gc.collect()
    before = resident()
    step()
    memory = peak_resident() - before
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"tokens": tokens, "seconds": seconds, "memory_mb": max(0, memory) / 1e6}


def compare(case: Case) -> dict[str, Any]:
    """Share of equal indices, and how far the gradients of the latents are apart."""
    torch.manual_seed(0)
    ours, peer = case.ours().train(), case.peer().train()
    if case.same is not None:
        case.same(ours, peer)
    # A gradient from behind that is no larger than that of the losses: neither may hide the other.
    steps = [
        make_step(module, case.check_tokens, case.dim, 1 / (case.check_tokens * case.dim)) for module in (ours, peer)
    ]
    (indices, gradient), (peer_indices, peer_gradient) = (step() for step in steps)
    equal = (indices == peer_indices).all(-1)
    apart = (gradient - peer_gradient)[equal].abs().max() / peer_gradient.abs().max()
    return {
        "indices_equal": float((indices == peer_indices).double().mean()),
        "gradient_apart": None if case.tolerance is None else float(apart),
    }


def in_a_process(work: str, name: str, tokens: int = 0, repeats: int = 0, threads: int = 1) -> dict[str, Any]:
    """The result of :func:`measure` or :func:`compare` from a fresh interpreter."""
    task = json.dumps({"work": work, "name": name, "tokens": tokens, "repeats": repeats, "threads": threads})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, os.path.abspath(__file__), "--worker", task]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{name}, {work}: the process failed\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def worker(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    case = cases()[task["name"]]
    if task["work"] == "compare":
        result = compare(case)
    else:
        result = measure(case, task["work"], task["tokens"], task["repeats"])
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------ the table
def run_case(name: str, case: Case, repeats: int, quick: bool, threads: int) -> dict[str, Any]:
    tokens = max(WARM_UP_TOKENS, case.tokens // 8) if quick else case.tokens
    repeats = 1 if quick else repeats
    result: dict[str, Any] = {"case": name, "differs": case.differs}
    if case.peer is not None:
        result["check"] = in_a_process("compare", name, threads=threads)
        apart = result["check"]["gradient_apart"]
        agree = result["check"]["indices_equal"] >= INDICES_EQUAL and (apart is None or apart <= case.tolerance)
        if not agree:
            raise SystemExit(f"{name}: the two sides do not do the same: {result['check']}")
    for side in ("ours", "peer") if case.peer is not None else ("ours",):
        result[side] = in_a_process(side, name, tokens, repeats, threads)
    return result


def spread(seconds: list[float]) -> str:
    return f"+{100 * (max(seconds) / min(seconds) - 1):.0f} %"


def row(result: dict[str, Any]) -> list[str]:
    ours, peer = result["ours"], result.get("peer")
    best = min(ours["seconds"])
    cells = [result["case"], str(ours["tokens"]), f"{best:.4f}", spread(ours["seconds"]), f"{ours['memory_mb']:.0f}"]
    if peer is None:
        return [*cells, "", "", "", "", "", "", result["differs"]]
    check = result["check"]
    same = f"{100 * check['indices_equal']:.2f} %"
    if check["gradient_apart"] is not None:
        same += f", {check['gradient_apart']:.0e}"
    theirs = min(peer["seconds"])
    return [
        *cells,
        f"{theirs:.4f}",
        spread(peer["seconds"]),
        f"{peer['memory_mb']:.0f}",
        f"{theirs / best:.1f}x",
        f"{max(MEMORY_NOISE, peer['memory_mb']) / max(MEMORY_NOISE, ours['memory_mb']):.0f}x",
        same,
        result["differs"],
    ]


def print_table(results: list[dict[str, Any]], threads: int) -> None:
    columns = (
        "case", "tokens", "s", "spread", "MB", "peer s", "spread", "MB", "faster", "leaner", "indices, gradient",
        "differs",
    )  # fmt: skip
    title = f"Training step on the CPU, {threads} thread(s): processor seconds and extra memory"
    table = Table(*columns, title=title)
    for result in results:
        table.add_row(*row(result))
    console.print(table)


# ------------------------------------------------------------------------------------------ search on a GPU
@contextmanager
def backend(name: str) -> Iterator[None]:
    before, search.BACKEND = search.BACKEND, name
    try:
        yield
    finally:
        search.BACKEND = before


def gpu_seconds(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least seconds of a call after two others, and MB that it takes at its peak."""
    work()
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds), (torch.cuda.max_memory_allocated() - before) / 1e6


def ceilings(repeats: int) -> dict[str, float]:
    """Measured operations per second of large matrix products."""
    size = 8192
    found = {}
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        found[name] = 2 * size**3 / gpu_seconds(functools.partial(torch.mm, a, b), repeats)[0]
        torch.set_float32_matmul_precision(before)
    return found


def search_paths(z: Tensor, codebook: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to find the nearest codes; those that need all distances at once only where they fit."""

    def ours(name: str) -> Tensor:
        with backend(name):
            return search.nearest_codes(z, codebook)

    paths: dict[str, Callable[[], Tensor]] = {"torch version": functools.partial(ours, "torch")}
    if search._triton_is_installed():
        paths = {"Triton": functools.partial(ours, "triton"), **paths}
    all_distances = 4 * len(z) * len(codebook)
    room = torch.cuda.mem_get_info()[0]
    if 2.5 * all_distances < room:
        paths["cdist + argmin"] = lambda: torch.cdist(z, codebook).argmin(1)
    if 5 * all_distances < room:  # 16 bytes for every token and code
        peer = lucidrains("VectorQuantize", dim=z.shape[1], codebook_size=len(codebook)).cuda().eval()
        peer._codebook.embed.copy_(codebook)
        paths["vector-quantize-pytorch"] = torch.no_grad()(lambda: peer(z.unsqueeze(0))[1].flatten())
    return paths


def gpu_table(repeats: int, quick: bool) -> list[dict[str, Any]]:
    speeds = ceilings(repeats)
    found = []
    tokens = 8192 if quick else 65536
    shares = [f"% of {name} ({speed / 1e12:.0f} TFLOP/s)" for name, speed in speeds.items()]
    title = f"Nearest codes on {torch.cuda.get_device_name()}, {tokens} tokens"
    table = Table("codes", "dim", "path", "ms", "MB", "indices as float64", *shares, title=title)
    for codebook_size in (16384, 262144):
        for dim in (8, 64):
            generator = torch.Generator("cuda").manual_seed(0)
            z, codebook = (
                torch.randn(size, dim, device="cuda", generator=generator) for size in (tokens, codebook_size)
            )
            exact = search.nearest_codes(z.double(), codebook.double())
            for path, work in search_paths(z, codebook).items():
                seconds, memory = gpu_seconds(work, repeats)
                speed = 2 * tokens * codebook_size * dim / seconds
                right = float((work() == exact).double().mean())
                found.append(
                    {"codes": codebook_size, "dim": dim, "path": path, "seconds": seconds, "memory_mb": memory}
                )
                cells = [
                    str(codebook_size),
                    str(dim),
                    path,
                    f"{1e3 * seconds:.2f}",
                    f"{memory:.0f}",
                    f"{100 * right:.3f} %",
                ]
                table.add_row(*cells, *(f"{100 * speed / limit:.1f}" for limit in speeds.values()))
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="part of a name; may be given several times (all cases)")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens, one step each")
    parser.add_argument("--repeats", type=int, default=5, help="steps that count")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        raise SystemExit("the other side is missing: pip install vector-quantize-pytorch")
    chosen = {name: case for name, case in cases().items() if any(part in name for part in args.case or [""])}
    if not chosen:
        raise SystemExit(f"no case matches {args.case}; there are {', '.join(cases())}")
    results = []
    for name, case in chosen.items():
        results.append(run_case(name, case, args.repeats, args.quick, args.threads))
        console.print("  ".join(row(results[-1])[:-1]))
    print_table(results, args.threads)
    report: dict[str, Any] = {"cpu": results}
    if torch.cuda.is_available() and not args.case:
        report["gpu"] = gpu_table(args.repeats, args.quick)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
