"""The LightningModule that trains every tokenizer.

One optimizer and automatic optimisation, also with a discriminator, so gradient clipping, accumulation, checkpoints and
``global_step`` mean what they say. Nothing in a step waits for the device and nothing is reduced over ranks, except at
logging steps.

A run is a function of its configuration and seed alone: every batch reseeds the generators from (seed, epoch, batch,
rank), so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..decoders.adaptive_cnn import AdaptiveGroupNorm
from ..eval.reconstruction import psnr
from ..eval.tokens.codebook import codebook_statistics
from ..layers.conv import Level, Middle
from ..layers.frozen import Frozen
from ..layers.maskgit import MaskGITLevel
from ..layers.q_former import QFormerBlock
from ..layers.transformer import Block
from ..tokenizers.base import Tokenizer
from .checkpoints import finish_epoch
from .ema import ema_copy, ema_decay, ema_update
from .freezing import freeze as freeze_parts
from .guard import StepGuard
from .initialization import Initialization
from .initialization import initialize as initialize_parts
from .objectives import Objective, ObjectiveOutput, as_pixels
from .optimization import DISCRIMINATOR, Optimization

CHECKPOINT_VERSION = 1
_COMPILED = (Block, QFormerBlock, Level, Middle, MaskGITLevel, AdaptiveGroupNorm)
Batch = dict[str, Any]


class TokenizerTraining(pl.LightningModule):
    """A tokenizer, what it minimises, and how.

    Args:
        tokenizer: the model.
        objective: what a step minimises.
        optimizer: AdamW and its schedule.
        ema_decay: decay of the moving average of the weights that validation and export use; ``None`` for none.
        compile: compile the blocks of encoder, decoder and a tokenizer that teaches, and the discriminator, with
            ``torch.compile``.
        freeze: parts of the tokenizer that are not trained: submodules (``encoder``) or parameters. They get no
            gradient, stay in eval, and are out of the optimizer and the moving average.
        initialize: where parts of the tokenizer get their first weights; a run that resumes does not ask.
        max_skipped_steps: a step without a finite gradient is skipped; so many in a row end the run (found at the next
            logging step); never if ``None``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        objective: Objective,
        optimizer: Optimization = Optimization(),  # noqa: B008 -- jsonargparse reads the defaults off it; not mutated
        ema_decay: float | None = 0.999,
        compile: bool = False,
        freeze: Sequence[str] = (),
        initialize: Sequence[Initialization] = (),
        max_skipped_steps: int | None = 20,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1) or be None; got {ema_decay}")
        self.tokenizer = tokenizer
        self.objective = objective
        self.optimization = optimizer
        self.ema_decay = ema_decay
        self._frozen = freeze_parts(tokenizer, freeze)
        self.ema_tokenizer = None if ema_decay is None else ema_copy(tokenizer, shared=self._frozen)
        for model in (self.tokenizer, self.ema_tokenizer):
            if model is not None:
                objective.attach(model)
        self.initialization = list(initialize)
        self.guard = StepGuard(max_skipped_steps)
        self.compile_blocks = compile
        self.resolved_config = ""
        self.validated_at: tuple[int, dict[str, float]] | None = None
        self._counts: Tensor | None = None
        self._images_seen, self._clock = 0, 0.0

    @property
    def averaged(self) -> Tokenizer:
        """The tokenizer that validation and export use: the moving average if there is one."""
        return self.tokenizer if self.ema_tokenizer is None else self.ema_tokenizer

    def train(self, mode: bool = True) -> TokenizerTraining:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        if self.ema_tokenizer is not None:
            self.ema_tokenizer.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.initialization and self.trainer.ckpt_path is None:
            initialize_parts(self.tokenizer, self.initialization)
            if self.ema_tokenizer is not None:
                self.ema_tokenizer.load_state_dict(self.tokenizer.state_dict())

    def configure_model(self) -> None:
        if self.compile_blocks:
            self.compile_blocks = False  # Lightning calls this hook again for every trainer
            frozen = [part.network for part in self.objective.modules() if isinstance(part, Frozen)]
            for network in (self.tokenizer, *frozen):
                for module in network.modules():
                    if isinstance(module, _COMPILED):
                        module.compile()
            if self.objective.discriminator is not None:
                self.objective.discriminator.compile()

    def configure_optimizers(self) -> dict[str, Any]:
        # Under fp16 a fused optimizer unscales the gradients itself, after they have been clipped.
        fused = self.device.type in ("cuda", "cpu") and self.trainer.precision != "16-mixed"
        optimizer, scheduler = self.optimization.build(
            self,
            self.trainer.estimated_stepping_batches,
            fused,
            self.objective.discriminator,
            self.objective.discriminator_start,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.tokenizer.commit_update()
        if self.ema_tokenizer is not None:
            # Here and not at the end of the batch: checkpoints are written before the module's own hook there.
            ema_update(self.ema_tokenizer, self.tokenizer, ema_decay(self.global_step, self.ema_decay))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the tokenizer's and the discriminator's gradient each by its own norm; skip what is not finite."""
        self.objective.before_optimizer_step(self.global_step)
        roles: dict[str, list[Tensor]] = {}
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                roles.setdefault(group["role"], []).extend(parameters)
        norms = []
        for parameters in roles.values():
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            norms.append(norm)
            if gradient_clip_val and gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            elif gradient_clip_val:
                # Not Lightning's: it refuses a fused optimizer under any mixed precision, though only fp16 forbids it.
                torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        skip = self.guard.observe(norms)
        if self.trainer.precision == "16-mixed":
            return  # the loss scaler skips the step itself
        if optimizer.defaults["fused"]:
            optimizer.found_inf = skip  # the fused kernel leaves weights, moments and step counts as they are
        elif skip.item():
            optimizer.zero_grad()

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if self.objective.needs_fixed_images and (data is None or data.crop != "center" or data.flip):
            found = "" if data is None else f"; got data.crop={data.crop}, data.flip={data.flip}"
            raise ValueError(
                f"what a cache holds of an image is right only for images that look the same in every epoch: "
                f"data.crop=center and data.flip=0{found}"
            )

    def on_train_start(self) -> None:
        self._images_seen, self._clock = 0, time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        entropy = np.random.SeedSequence([seed, self.current_epoch, batch_idx, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = _pixels(batch)
        result = self.objective(self.tokenizer, images, self.global_step, batch)
        counts = result.output.statistics.get("counts")
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts
        self._images_seen += len(images)
        if self._is_logging_step(batch_idx):
            self._log_training(result)
        return result.loss

    def _is_logging_step(self, batch_idx: int) -> bool:
        """Whether the optimizer step that this batch completes is one to log."""
        completes = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return completes and (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    @torch.no_grad()
    def _log_training(self, result: ObjectiveOutput) -> None:
        self.guard.check(self.global_step)
        values = {"loss": result.loss.detach(), **result.terms, **_scalars(result.output.statistics)}
        if result.reconstruction is not None:
            values["psnr"] = psnr(result.reconstruction, result.target).mean()
        # One collective, and on a copy: an all-reduce in place would change what the backward pass has kept.
        means = self.trainer.strategy.reduce(torch.stack([v.float() for v in values.values()]), reduce_op="mean")
        values = dict(zip(values, means.unbind(), strict=True))
        if self._counts is not None:
            counts = self.trainer.strategy.reduce(self._counts, reduce_op="sum")
            values |= codebook_statistics(counts, self.tokenizer.codebook_sizes)
            self._counts = None
        now = time.perf_counter()
        values["images/s"] = self._images_seen * self.trainer.world_size / max(now - self._clock, 1e-9)
        self._images_seen, self._clock = 0, now
        for group in self.trainer.optimizers[0].param_groups:
            name = "lr" if group["role"] != DISCRIMINATOR else "lr_discriminator"
            values[name] = group["lr"]
        values["skipped_steps"] = self.guard.total.float()
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        bar = {name: values[name] for name in ("loss", "psnr", "usage", "images/s") if name in values}
        self.log_dict(bar, prog_bar=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images = _pixels(batch)
        tokenizer = self.averaged.eval()
        result = self.objective(tokenizer, images, self.global_step, batch)
        n = torch.tensor(float(len(images)), device=self.device)
        sums = {"images": n, "loss": result.loss.detach().float() * n}
        scalars = result.terms | _scalars(result.output.statistics)
        sums |= {name: value.float() * n for name, value in scalars.items()}
        if result.reconstruction is not None:
            sums["psnr"] = psnr(result.reconstruction, result.target).sum()
        if "counts" in result.output.statistics:
            sums["counts"] = result.output.statistics["counts"]
        for name, value in sums.items():
            self._sums[name] = value.double() + self._sums.get(name, 0)
        return {"images": result.target, "reconstructions": result.reconstruction}

    def on_validation_epoch_end(self) -> None:
        sums = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._sums.items()}
        if not sums or self.trainer.sanity_checking:
            return
        counts, images = sums.pop("counts", None), sums.pop("images")
        values = {name: value / images for name, value in sums.items()}
        if counts is not None:
            values |= codebook_statistics(counts, self.tokenizer.codebook_sizes)
        metrics = {f"val/{name}": float(value) for name, value in values.items()} | {"val/images": float(images)}
        self.validated_at = (self.global_step, metrics)
        self.log_dict(metrics, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vistok"] = {
            "format_version": CHECKPOINT_VERSION,
            "vistok_version": __version__,
            "tokenizer": json.dumps(self.tokenizer.config),
            "config": self.resolved_config,
            "global_step": self.global_step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "vistok" not in checkpoint:
            raise ValueError("this checkpoint was not written by a Vistok training run")
        stored = json.loads(checkpoint["vistok"]["tokenizer"])
        differences = list(_differences(stored, self.tokenizer.config))
        if differences:
            raise ValueError(f"the checkpoint holds another tokenizer than the config: {'; '.join(differences[:5])}")
        finish_epoch(checkpoint["loops"])


def _pixels(batch: Batch) -> Tensor:
    return as_pixels(batch["image"])


def _differences(stored: Any, current: Any, path: str = "tokenizer") -> Any:
    """Yield ``path: stored -> current`` for every leaf in which two config trees differ."""
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(set(stored) | set(current)):
            yield from _differences(stored.get(key), current.get(key), f"{path}.{key}".replace(".init_args", ""))
    elif stored != current:
        yield f"{path}: {stored!r} in the checkpoint, {current!r} in the config"


def _scalars(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in statistics.items() if value.ndim == 0}
