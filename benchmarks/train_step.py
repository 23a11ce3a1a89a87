"""Time and memory of whole training steps of two published recipes, against a straightforward version of the same step.

    python benchmarks/train_step.py                      # full size, batch 1: five minutes on two cores
    python benchmarks/train_step.py --small              # tiny models: does it run?
    python benchmarks/train_step.py --shards 'train-{000000..000003}.tar' --json step.json

The recipes are TiTok-S-128's second stage and LlamaGen's VQ-16, read from ``configs/``; the discriminator has started.
``ours`` is what ``train.py`` runs: :class:`TokenizerTraining` under a Lightning trainer. ``plain`` is the same step as
public training code writes it, over the same networks: two AdamW optimizers in turn, everything in float32, contiguous
tensors, perceptual features of both images held at once, all distances between latents and codes at once, discriminator
parameters that also get gradients from the generator's loss and images that get them from the discriminator's, every
number fetched in every step, moving averages parameter by parameter. Losses and gradient norms of the first step are
compared; on the CPU, where both sides compute in float32, they must agree. Perceptual trunks have random weights, made
here: time does not depend on them.

Each side runs in a process of its own, and the sides take turns, step by step. On the CPU, time is processor time
(user + system), the least of the steps after a first one, so that other programs matter little; memory is the resident
set at its peak, less what the process held before the model was built. With a GPU the variants are
bfloat16 without and with ``torch.compile``, one after the other; time is that of a synchronised step, memory that of
torch's allocator, and the first steps, which compile, do not count.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vistok.losses.classifier_logits import ClassifierLogitsLoss
from vistok.losses.perceptual_term import PerceptualTerm
from vistok.training.cli import TokenizerCLI
from vistok.training.ema import ema_decay
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import as_pixels

CONFIGS = Path(__file__).parents[1] / "configs"
MARK = "@@"  # starts the lines that a worker reports in
TOLERANCE = 1e-4  # relative, of losses and gradient norms of the first step in float32
SMALLEST = 1e-2  # a smaller number is compared as if it were this large
REST = "pixel loss, rest"
console = Console(width=140)


@dataclass(frozen=True)
class Recipe:
    """A published training run.

    Attributes:
        title: what it is called.
        config: file below ``configs/``.
        trunk: torchvision network of the perceptual loss.
        small: values of the configuration, by dotted path, that make it tiny.
    """

    title: str
    config: str
    trunk: str
    small: dict[str, Any]


TOKENIZER = "model.tokenizer.init_args"
ADVERSARIAL = "model.objective.init_args.adversarial.init_args"
PERCEPTUAL = "model.objective.init_args.perceptual.init_args"
RECIPES = {
    "titok": Recipe(
        "TiTok-S-128, stage 2",
        "titok/s128_stage2.yaml",
        "convnext_small",
        {
            f"{TOKENIZER}.image_size": 64,
            f"{TOKENIZER}.num_latent_tokens": 8,
            f"{TOKENIZER}.encoder_size": [64, 2, 2],
            f"{TOKENIZER}.decoder_size": [64, 2, 2],
            f"{TOKENIZER}.pixel_decoder.init_args.channels": 32,
            f"{ADVERSARIAL}.discriminator.init_args.channels": 32,
        },
    ),
    "llamagen": Recipe(
        "LlamaGen VQ-16",
        "vqgan/llamagen_vq16.yaml",
        "vgg16",
        {
            f"{TOKENIZER}.image_size": 64,
            f"{TOKENIZER}.channels": 32,
            f"{TOKENIZER}.latent_channels": 32,
            f"{TOKENIZER}.quantizer.init_args.codebook_size": 512,
            f"{ADVERSARIAL}.discriminator.init_args.channels": 16,
        },
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to run a step.

    Attributes:
        ours: Vistok's step, or the plain one.
        precision: of Lightning's trainer; the plain step is float32.
        counts: also count operations and time the data.
        changes: values of the configuration by dotted path.
    """

    ours: bool
    precision: str = "32-true"
    counts: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


COMPILED = {"model.compile": True}
LOSSES = {f"{ADVERSARIAL}.precision": "bfloat16", f"{PERCEPTUAL}.precision": "bfloat16"}


def variants(device: str) -> dict[str, Variant]:
    """What is compared, the plain step first."""
    if device == "cpu":
        return {"plain": Variant(False), "ours": Variant(True, counts=True)}
    return {
        "plain": Variant(False),
        "ours, bf16": Variant(True, "bf16-mixed", counts=True),
        "ours, bf16, compiled": Variant(True, "bf16-mixed", changes=COMPILED),
        "ours, bf16 losses too, compiled": Variant(True, "bf16-mixed", changes=COMPILED | LOSSES),
    }


# ------------------------------------------------------------------------------------------ time by part
class Timeline:
    """Divides a step among its parts: what is read between two marks belongs to the first of them.

    Args:
        read: anything that grows: seconds, CUDA events, operations.
        between: how much it grew from one reading to another.
    """

    def __init__(
        self, read: Callable[[], Any], between: Callable[[Any, Any], float] = lambda start, end: end - start
    ) -> None:
        self.read, self.between = read, between
        self._marks: list[tuple[str, Any]] = []
        self._inside = [REST]

    def start(self) -> None:
        self._marks, self._inside = [(REST, self.read())], [REST]

    def mark(self, part: str) -> None:
        """From here on it is ``part``."""
        self._marks.append((part, self.read()))

    def stop(self) -> dict[str, float]:
        self.mark(REST)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for (part, start), (_, end) in itertools.pairwise(self._marks):
            parts[part] = parts.get(part, 0.0) + self.between(start, end)
        return parts

    def watch(self, module: nn.Module, part: str | Callable[[Tensor], str], backward: bool = True) -> None:
        """Marks where a module's forward pass begins and ends, and where its backward pass begins.

        The backward pass of a module ends where the next one's begins: autograd runs the operations of a step in the
        reverse of their order.

        Args:
            module: anything that returns a tensor, a tuple that starts with one, or what a quantizer returns.
            part: its name, or what gives the name for an input.
            backward: whether the output starts a backward pass of its own.
        """

        # Around what calling the module runs, not hooks: those of a compiled module are compiled with it.
        call = module._compiled_call_impl or module._call_impl

        def watched(*args: Any, **kwargs: Any) -> Any:
            name = part if isinstance(part, str) else part(args[0])
            self._inside.append(name)
            self.mark(name)
            result = call(*args, **kwargs)
            self._inside.pop()
            self.mark(self._inside[-1])
            output = getattr(result, "quantized", result)
            output = output[0] if isinstance(output, tuple) else output
            if backward and output.requires_grad:
                output.register_hook(lambda _: self.mark(name))
            return result

        module._compiled_call_impl = watched


def watch_networks(
    timeline: Timeline,
    tokenizer: nn.Module,
    quantizer: nn.Module,
    perceptual: Iterable[nn.Module],
    discriminator: nn.Module,
) -> None:
    timeline.watch(tokenizer.encoder, "encoder")
    timeline.watch(quantizer, "quantizer")
    pixels = getattr(tokenizer.decoder, "pixel_decoder", None)
    timeline.watch(tokenizer.decoder, "decoder" if pixels is None else "decoder: ViT", backward=pixels is None)
    if pixels is not None:
        timeline.watch(tokenizer.decoder.to_logits, "decoder: ViT")
        timeline.watch(pixels, "decoder: pixels")
    for term in perceptual:
        timeline.watch(term, "perceptual")
    # The discriminator's own loss sees detached images.
    timeline.watch(discriminator, lambda images: f"discriminator, {'D' if images.grad_fn is None else 'G'} loss")


# ------------------------------------------------------------------------------------------ the plain step
class PlainVQ(nn.Module):
    """l2-normalised vector quantizer that computes all squared distances at once, with gradients enabled."""

    def __init__(self, codebook: nn.Parameter) -> None:
        super().__init__()
        self.codebook = codebook

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = F.normalize(z, dim=-1)  # (B, N, D)
        codes = F.normalize(self.codebook, dim=-1)  # (K, D)
        flat = z.flatten(0, 1)
        distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T  # (B * N, K)
        quantized = codes[distances.argmin(1)].view_as(z)
        losses = {
            "commitment": F.mse_loss(z, quantized.detach()),
            "codebook": F.mse_loss(quantized, z.detach()),
        }
        return z + (quantized - z).detach(), losses


class PlainPerceptual(nn.Module):
    """Perceptual term that runs reconstructions and images alike and compares what is kept of both."""

    def __init__(self, term: PerceptualTerm) -> None:
        super().__init__()
        self.term = term
        self.networks = [term.trunk.network]
        self.networks += [term.classifier.network] if isinstance(term, ClassifierLogitsLoss) else []
        for network in self.networks:
            network.to(memory_format=torch.contiguous_format)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        if isinstance(self.term, ClassifierLogitsLoss):
            return F.mse_loss(self._logits(fake), self._logits(real))
        return self._lpips(fake, real)

    def _features(self, images: Tensor) -> list[Tensor]:
        trunk, features = self.networks[0], []
        x = (images - trunk.mean) / trunk.std
        for stage in trunk.stages:
            x = stage(x)
            features.append(x)
        return features

    def _lpips(self, fake: Tensor, real: Tensor) -> Tensor:
        total = torch.zeros((), device=real.device)
        heads = self.term.heads.network
        for a, b, head in zip(self._features(fake), self._features(real), heads, strict=True):
            a, b = (x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10) for x in (a, b))
            total = total + F.conv2d((a - b).square(), head).mean()
        return total

    def _logits(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
        return self.networks[1](self._features(resized)[0])  # (B, 1000)


class PlainStep:
    """Two optimizers in turn over the networks of a recipe.

    Args:
        training: built from the recipe, on its device; its step is not used, its networks, weights and settings are.
        clip: largest norm of a gradient.
        timeline: told about the parts.
    """

    def __init__(self, training: TokenizerTraining, clip: float, timeline: Timeline) -> None:
        training.ema_tokenizer = None
        training.train()
        self.tokenizer, self.objective = training.tokenizer, training.objective
        self.clip, self.timeline = clip, timeline
        self.adversarial = self.objective.adversarial
        self.discriminator = self.adversarial.discriminator
        self.quantizer = PlainVQ(self.tokenizer.quantizer.codebook)
        self.perceptual = [PlainPerceptual(term) for term in self.objective.perceptual]
        make_contiguous(self.tokenizer)
        make_contiguous(self.discriminator)
        self.average, self.decay = copy.deepcopy(self.tokenizer).requires_grad_(False), training.ema_decay
        self.mean_real = self.mean_fake = torch.zeros((), device=training.device)
        self.trained = [p for p in self.tokenizer.parameters() if p.requires_grad]
        settings = training.optimization
        options = {"betas": settings.betas, "weight_decay": settings.weight_decay}
        self.optimizer = torch.optim.AdamW(self.trained, settings.lr, **options)
        self.optimizer_d = torch.optim.AdamW(self.discriminator.parameters(), settings.lr, **options)
        self.steps = 0
        watch_networks(timeline, self.tokenizer, self.quantizer, self.perceptual, self.discriminator)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step; the values of all terms, and the norms of both gradients."""
        images = as_pixels(batch["image"])
        reconstruction, loss, values = self._generator_loss(images)
        values["gradient"] = self._update(loss, self.optimizer, self.trained)
        loss, own = self._discriminator_loss(images, reconstruction)
        values |= own
        values["discriminator gradient"] = self._update(loss, self.optimizer_d, [*self.discriminator.parameters()])
        self.timeline.mark("EMA")
        self._update_average()
        self.timeline.mark(REST)
        return {name: value.item() for name, value in values.items()}

    def _update(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss.backward()
        self.timeline.mark("optimizer, clipping")
        norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()
        self.timeline.mark(REST)
        return norm

    def _generator_loss(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.set_grad_enabled(next(self.tokenizer.encoder.parameters()).requires_grad):
            quantized, values = self.quantizer(self.tokenizer.latents(images))
        reconstruction = self.tokenizer.decode_latents(quantized, self.tokenizer.encoder.grid(images.shape[2:]))
        values["pixel"] = self.objective.pixel.l2 * F.mse_loss(reconstruction, images)
        weights = {**self.tokenizer.default_loss_weights, **self.objective.quantizer_weights}
        loss = values["pixel"] + sum(weights[name] * values[name] for name in ("commitment", "codebook"))
        for plain in self.perceptual:
            values[plain.term.name] = plain(reconstruction, images)
            loss = loss + plain.term.weight * values[plain.term.name]
        values["generator"] = -self.discriminator(reconstruction).mean()
        return reconstruction, loss + self.adversarial.weight * values["generator"], values

    def _discriminator_loss(self, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        real, fake = (self.discriminator(x.detach().requires_grad_()) for x in (images, reconstruction))
        values = {"discriminator": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())}
        loss = self.adversarial.discriminator_weight * values["discriminator"]
        if self.adversarial.lecam_weight:
            values["lecam"] = (
                F.relu(real.mean() - self.mean_fake).square() + F.relu(self.mean_real - fake.mean()).square()
            )
            loss = loss + self.adversarial.lecam_weight * values["lecam"]
            decay = self.adversarial.lecam.decay
            self.mean_real = decay * self.mean_real + (1 - decay) * real.mean().detach()
            self.mean_fake = decay * self.mean_fake + (1 - decay) * fake.mean().detach()
        return loss, values

    @torch.no_grad()
    def _update_average(self) -> None:
        self.steps += 1
        share = 1 - ema_decay(self.steps, self.decay)
        for own, live in zip(self.average.parameters(), self.tokenizer.parameters(), strict=True):
            own.sub_(share * (own - live))


def make_contiguous(network: nn.Module) -> None:
    """Undo channels-last: in the weights, and in the activations, which take the layout of the first convolution."""
    network.to(memory_format=torch.contiguous_format)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and name.endswith(("conv_in", "layers.0")):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


# ------------------------------------------------------------------------------------------ one side, one process
class Measure:
    """Time of steps, in total and by part, and memory.

    Args:
        device: ``cpu`` or ``cuda``.
        skipped: steps at the start that do not count.
    """

    def __init__(self, device: str, skipped: int) -> None:
        self.device, self.skipped, self.steps = device, skipped, 0
        self.timeline = Timeline(time.process_time) if device == "cpu" else Timeline(*cuda_clock())
        self.before = resident()

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            if self.steps == self.skipped:
                torch.cuda.reset_peak_memory_stats()
        self._start = self.now()
        self.timeline.start()

    def stop(self, values: Mapping[str, Tensor | float]) -> None:
        """End a step and report it, the first one with the values of losses and norms."""
        parts = self.timeline.stop()
        report: dict[str, Any] = {"seconds": self.now() - self._start, "parts": parts}
        if not self.steps:
            report["values"] = {name: float(value) for name, value in values.items()}
        self.steps += 1
        say(report)

    def now(self) -> float:
        return time.process_time() if self.device == "cpu" else time.perf_counter()

    def memory(self) -> float:
        """MB at the peak."""
        peak = peak_resident() - self.before if self.device == "cpu" else torch.cuda.max_memory_allocated()
        return peak / 1e6


def cuda_clock() -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record, lambda start, end: start.elapsed_time(end) / 1e3


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


class Stepwise(pl.Callback):
    """Lets a trainer make one step for every command ``step``, and measures it."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.values: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, training: TokenizerTraining) -> None:
        timeline, tokenizer, objective = self.measure.timeline, training.tokenizer, training.objective
        watch_networks(timeline, tokenizer, tokenizer.quantizer, objective.perceptual, objective.discriminator)
        trainer.optimizers[0].register_step_post_hook(lambda *_: timeline.mark("EMA"))
        objective.register_forward_hook(lambda _, inputs, output: self.values.update(output.terms))

    def on_train_batch_start(self, trainer: pl.Trainer, training: TokenizerTraining, *_: Any) -> None:
        self.measure.start()

    def on_after_backward(self, trainer: pl.Trainer, training: TokenizerTraining) -> None:
        self.measure.timeline.mark("optimizer, clipping")
        if not self.measure.steps:  # this step does not count: there is time to look at its gradients
            for name, network in (("", training.tokenizer), ("discriminator ", training.objective.discriminator)):
                gradients = [p.grad for p in network.parameters() if p.grad is not None]
                self.values[f"{name}gradient"] = nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, training: TokenizerTraining, *_: Any) -> None:
        self.measure.stop(self.values)
        trainer.should_stop = not another()


class Built(TokenizerCLI):
    """What a configuration describes, built and not run."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_trainer(self, **kwargs: Any) -> None:
        return None

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def run_ours(built: Built, batch: dict[str, Tensor], measure: Measure, precision: str) -> None:
    settings = built.config["fit"].trainer
    trainer = pl.Trainer(
        accelerator="cpu" if measure.device == "cpu" else "gpu",
        devices=1,
        precision=precision,
        max_steps=settings.max_steps,
        gradient_clip_val=settings.gradient_clip_val,
        log_every_n_steps=settings.max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Stepwise(measure)],
    )
    trainer.fit(built.model, itertools.repeat(batch))


def run_plain(built: Built, batch: dict[str, Tensor], measure: Measure) -> None:
    if measure.device == "cuda":  # as public training code sets them
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    training = built.model.to(measure.device)
    batch = {name: value.to(measure.device) for name, value in batch.items()}
    step = PlainStep(training, built.config["fit"].trainer.gradient_clip_val, measure.timeline)
    going = True
    while going:
        measure.start()
        values = step(batch)
        measure.stop(values)
        going = another()


def count_operations(training: TokenizerTraining, batch: dict[str, Tensor], timeline: Timeline) -> dict[str, float]:
    """Floating-point operations of matrix products and convolutions of our step, by part; nothing is computed."""
    training.cpu()
    counter, fake = FlopCounterMode(display=False), FakeTensorMode()
    timeline.read, timeline.between = counter.get_total_flops, lambda start, end: end - start
    training.ema_tokenizer = None
    training._apply(fake.from_tensor)
    with fake, counter:
        timeline.start()
        training.objective(training.tokenizer, as_pixels(fake.from_tensor(batch["image"])), 0).loss.backward()
        return timeline.stop()


def data_seconds(built: Built, repeats: int) -> float:
    """Least processor seconds that one worker takes for a batch of the recipe's crops."""
    data = built.datamodule
    data.image_size = built.model.tokenizer.image_size
    data.setup()
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        next(batches)
        seconds.append(time.process_time() - start)
    return min(seconds)


def worker(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    variant = variants(task["device"])[task["variant"]]
    measure = Measure(task["device"], task["skipped"])
    built = Built(["fit", "--config", task["config"]])
    height, width = built.model.tokenizer.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (task["batch"], 3, height, width), dtype=np.uint8)
    batch = {"image": torch.from_numpy(pixels)}
    if another():
        if variant.ours:
            run_ours(built, batch, measure, variant.precision)
        else:
            run_plain(built, batch, measure)
    report: dict[str, Any] = {"memory_mb": measure.memory()}
    if variant.counts:
        report["operations"] = count_operations(built.model, batch, measure.timeline)
        report["data"] = data_seconds(built, 3)
    say(report)


def another() -> bool:
    """Whether the process that started this one wants a further step."""
    return sys.stdin.readline().strip() == "step"


def say(report: dict[str, Any]) -> None:
    print(MARK + json.dumps(report), flush=True)


# ------------------------------------------------------------------------------------------ both sides
class Side:
    """A process that makes steps on demand."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.name, self.skipped = task["variant"], task["skipped"]
        self.steps: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(task)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def step(self) -> None:
        self.steps.append(self._ask("step"))

    def finish(self) -> None:
        self.summary = self._ask("end")
        self._process.communicate()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    @property
    def counted(self) -> list[dict[str, Any]]:
        return self.steps[self.skipped :]

    @property
    def best(self) -> dict[str, Any]:
        return min(self.counted, key=lambda step: step["seconds"])

    def _ask(self, command: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self._errors.seek(0)
        raise SystemExit(f"{self.name}: the process failed\n{self._errors.read()[-3000:]}")


def run_sides(tasks: list[dict[str, Any]], steps: int, in_turn: bool) -> list[Side]:
    """All steps of all sides: step by step in turn, or one side after the other."""
    done: list[Side] = []
    for group in [tasks] if in_turn else [[task] for task in tasks]:
        sides = [Side(task) for task in group]
        try:
            for _ in range(steps):
                for side in sides:
                    side.step()
            for side in sides:
                side.finish()
        finally:
            for side in sides:
                side.stop()
        done += sides
    return done


def differences(plain: Side, ours: Side) -> float:
    """Largest relative difference of losses and gradient norms of the first step.

    Raises:
        SystemExit: if a number of the plain step is missing on our side.
    """
    theirs, own = plain.steps[0]["values"], ours.steps[0]["values"]
    missing = sorted(set(theirs) - set(own))
    if missing:
        raise SystemExit(f"{ours.name}: the step has no {', '.join(missing)}; it has {', '.join(own)}")
    return max(abs(own[name] - value) / max(abs(value), SMALLEST) for name, value in theirs.items())


def run_recipe(recipe: Recipe, folder: Path, args: argparse.Namespace, device: str) -> dict[str, Any]:
    config = yaml.safe_load((CONFIGS / recipe.config).read_text())
    batch = args.batch or (1 if device == "cpu" else config["data"]["batch_size"])
    prepare(config, recipe, folder, batch, args)
    tasks = []
    skipped = 1 if device == "cpu" else 4
    for name, variant in variants(device).items():
        path = folder / f"{recipe.trunk}-{len(tasks)}.yaml"
        path.write_text(yaml.safe_dump(changed(config, variant.changes)))
        task = {"variant": name, "config": str(path), "batch": batch, "device": device, "skipped": skipped}
        tasks.append({**task, "threads": args.threads})
    plain, *others = run_sides(tasks, skipped + args.repeats, in_turn=device == "cpu")
    result: dict[str, Any] = {"recipe": recipe.title, "batch": batch, "variants": {}}
    for side in (plain, *others):
        found = {"seconds": [step["seconds"] for step in side.counted], "parts": side.best["parts"], **side.summary}
        if side is not plain:
            found["difference"] = differences(plain, side)
            if found["difference"] > TOLERANCE and device == "cpu":
                raise SystemExit(
                    f"{recipe.title}: the two sides do not do the same: plain {plain.steps[0]['values']}, "
                    f"{side.name} {side.steps[0]['values']}"
                )
        result["variants"][side.name] = found
    return result


def prepare(config: dict[str, Any], recipe: Recipe, folder: Path, batch: int, args: argparse.Namespace) -> None:
    """Change a published configuration, in place, into one that runs here, with the discriminator started."""
    trunk, pictures = folder / f"{recipe.trunk}.pth", folder / "pictures"
    if not trunk.exists():
        write_trunk(recipe.trunk, trunk)
    if args.shards is None and not pictures.exists():
        write_pictures(pictures, max(16, 2 * batch))
    source = {"class_path": "vistok.data.folder.ImageFolder", "init_args": {"root": str(pictures)}}
    if args.shards is not None:
        source = {"class_path": "vistok.data.webdataset.WebDataset", "init_args": {"shards": args.shards}}
    config["model"].pop("initialize", None)
    config["data"] |= {"train": source, "val": None, "batch_size": batch, "num_workers": 0}
    changes = {
        f"{ADVERSARIAL}.start_step": 0,
        f"{PERCEPTUAL}.trunk_weights": str(trunk),
        **(recipe.small if args.small else {}),
    }
    config.update(changed(config, changes))


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with other values at dotted paths."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return config


def write_trunk(name: str, path: Path) -> None:
    """A torchvision weights file of a random network whose activations neither vanish nor explode."""
    from torchvision import models

    with torch.device("meta"):
        network = getattr(models, name)()
        state = network.state_dict()
    if name != "convnext_small":  # whose classifier is part of the loss
        state = {key: value for key, value in state.items() if key.startswith("features")}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in state.items():
        scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.0
        weights[key] = scale * torch.randn(value.shape, generator=generator)
        if value.ndim == 1 and key.endswith("weight"):
            weights[key] += 1
        if key.endswith("layer_scale"):
            weights[key] += 0.1
    torch.save(weights, path)


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of the size of an average ImageNet photograph (500 x 400 pixels, some 100 kB)."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draws.integers(0, 256, (50, 62, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((500, 400), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (picture + draws.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)


# ------------------------------------------------------------------------------------------ the tables
def ceiling(device: str) -> float:
    """Measured operations per second of a large matrix product: float32 on a CPU, bfloat16 on a GPU."""
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    measure, seconds = Measure(device, 0), []
    for _ in range(10):
        start = measure.now()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(measure.now() - start)
    return 2 * size**3 / min(seconds)


def print_totals(result: dict[str, Any], limit: float, device: str) -> None:
    kind = "fp32" if device == "cpu" else "bf16"
    title = f"{result['recipe']}, batch {result['batch']}: one training step"
    columns = ("", "s", "spread", "images/s", "faster", "MB", "leaner", "first step")
    table = Table(*columns, f"% of {kind} matmul ({limit / 1e9:.0f} GFLOP/s)", title=title)
    plain = result["variants"]["plain"]
    operations = sum(next(v["operations"] for v in result["variants"].values() if "operations" in v).values())
    for name, found in result["variants"].items():
        best = min(found["seconds"])
        table.add_row(
            name,
            f"{best:.3f}",
            f"+{100 * (max(found['seconds']) / best - 1):.0f} %",
            f"{result['batch'] / best:.3g}",
            "" if found is plain else f"{min(plain['seconds']) / best:.2f}x",
            f"{found['memory_mb']:.0f}",
            "" if found is plain else f"{plain['memory_mb'] / found['memory_mb']:.2f}x",
            f"within {found['difference']:.0e}" if "difference" in found else "",
            "" if found is plain else f"{100 * operations / best / limit:.1f}",
        )
    console.print(table)


def print_parts(result: dict[str, Any]) -> list[tuple[float, str]]:
    """Table of the parts of our fastest step; returns shares of the step and names, largest first."""
    variants_ = {name: found for name, found in result["variants"].items() if name != "plain"}
    name = min(variants_, key=lambda name: min(variants_[name]["seconds"]))
    parts, plain = variants_[name]["parts"], result["variants"]["plain"]["parts"]
    counted = next(found for found in variants_.values() if "operations" in found)
    total = sum(parts.values())
    table = Table("part", "s", "share", "plain s", "faster", "GFLOP", "GFLOP/s", title=f"{result['recipe']}: {name}")
    for part in sorted(parts, key=parts.get, reverse=True):
        operations = counted["operations"].get(part, 0.0)
        table.add_row(
            part,
            f"{parts[part]:.3f}",
            f"{100 * parts[part] / total:.1f} %",
            f"{plain.get(part, 0):.3f}",
            f"{plain.get(part, 0) / max(parts[part], 1e-9):.2f}x",
            f"{operations / 1e9:.1f}" if operations else "",
            f"{operations / parts[part] / 1e9:.0f}" if operations else "",
        )
    table.add_row("data: decode, crop (not part of the step)", f"{counted['data']:.4f}", "", "", "", "", "")
    console.print(table)
    return sorted(((seconds / total, part) for part, seconds in parts.items()), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES), help="may be given twice (both)")
    parser.add_argument("--batch", type=int, help="images per step (CPU: 1; GPU: the recipe's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--repeats", type=int, help="steps that count (CPU: 2; GPU: 10)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--small", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--shards", help="shards to read batches from, instead of pictures made here")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    args.repeats = args.repeats or (2 if device == "cpu" else 10)
    torch.set_num_threads(args.threads)
    limit = ceiling(device)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.recipe or RECIPES:
            result = run_recipe(RECIPES[name], Path(folder), args, device)
            print_totals(result, limit, device)
            costs = print_parts(result)[:3]
            console.print(
                f"Largest remaining costs of {result['recipe']}: "
                + ", ".join(f"{part} ({100 * share:.0f} %)" for share, part in costs)
                + "\n"
            )
            results.append(result)
    if not torch.cuda.is_available():
        console.print("no CUDA device: GPU section not run")
    if args.json:
        Path(args.json).write_text(json.dumps({"device": device, "ceiling": limit, "recipes": results}, indent=1))


if __name__ == "__main__":
    main()
