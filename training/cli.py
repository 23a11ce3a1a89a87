"""``train.py fit | validate | test``: LightningCLI over :class:`TokenizerTraining` and :class:`ImageData`.

Everything a run writes lies in one folder, ``trainer.default_root_dir``: the resolved ``config.yaml``,
``checkpoints/``, ``images/``, ``tensorboard/`` and, at the end, ``export/`` and ``metrics.json``. A new run never
writes into the folder of an old one; ``--ckpt_path last`` continues the run that is there, or starts it if there is
none.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from ..data.files import atomic_file
from ..data.images import save_png
from ..data.module import ImageData
from .callbacks import ReconstructionGrids
from .checkpoints import AtomicCheckpointIO, RunCheckpoints, list_checkpoints
from .module import TokenizerTraining

SAMPLES = 4
logger = logging.getLogger(__name__)


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved configuration as ``<run>/config.yaml``, whole or not at all."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not self.already_saved:
            with atomic_file(Path(trainer.default_root_dir) / "config.yaml") as partial:
                partial.write_text(pl_module.resolved_config)
            self.already_saved = True


class TokenizerCLI(LightningCLI):
    """Command line of training."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            TokenizerTraining,
            ImageData,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs/vistok", "use_distributed_sampler": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ("fit", "validate", "test")}

    def init_parser(self, **kwargs: Any) -> Any:
        return super().init_parser(**{"exit_on_error": False, **kwargs})

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(ReconstructionGrids, "grids")

    def parse_arguments(self, parser: Any, args: list[str] | None) -> None:
        load_yaml = jsonargparse.get_loader("yaml")

        def load(text: str) -> Any:
            # jsonargparse writes an override two classes deep out again, and a null becomes Python's "None".
            return None if text == "None" else load_yaml(text)

        jsonargparse.set_loader("yaml", load, exceptions=(yaml.YAMLError,))
        try:
            self.config = parser.parse_args(args)
        finally:
            jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run_dir = Path(config.trainer.default_root_dir)
        if config.ckpt_path == "last":
            found = list_checkpoints(run_dir)
            config.ckpt_path = str(found[-1]) if found else None
            if not found and self.subcommand != "fit":
                raise UsageError(f"ckpt_path is 'last', but {run_dir / 'checkpoints'} holds no checkpoint")
        elif self.subcommand == "fit" and config.ckpt_path is None and not config.trainer.fast_dev_run:
            config.trainer.default_root_dir = str(_unused_run_dir(run_dir))
        if self.subcommand != "fit" and config.ckpt_path is None:
            raise UsageError(
                f"{self.subcommand} needs a checkpoint: --ckpt_path FILE, or last for the newest of the run"
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand]
        trainer = config["trainer"]
        run_dir = trainer["default_root_dir"]
        if trainer["logger"] in (None, True) and not trainer["fast_dev_run"] and self.subcommand == "fit":
            kwargs["logger"] = TensorBoardLogger(run_dir, name="tensorboard", version="")
        callbacks = trainer["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if not any(isinstance(callback, ProgressBar) for callback in callbacks) and trainer["enable_progress_bar"] in (
            None,
            True,
        ):
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=max(1, (trainer["log_every_n_steps"] or 50) // 2))]
        kwargs["callbacks"] = callbacks
        if not trainer["plugins"]:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        if self.datamodule.image_size is None:
            self.datamodule.image_size = self.model.tokenizer.image_size
        parser = self._parser(self.subcommand)
        self.model.resolved_config = parser.dump(self.config[self.subcommand], skip_unset=False)

    def before_fit(self) -> None:
        """Prepare the data now, so that a missing shard or an empty folder is one clear line."""
        if not self.trainer.is_global_zero:
            return
        try:
            self.datamodule.prepare_data()
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error

    before_validate = before_test = before_fit

    def after_fit(self) -> None:
        """Final validation, export and a word on what lies where."""
        if self.trainer.fast_dev_run:
            return
        run_dir = Path(self.trainer.default_root_dir)
        has_validation = self.datamodule.val is not None
        step = self.trainer.global_step
        if has_validation and (self.model.validated_at is None or self.model.validated_at[0] != step):
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        if not self.trainer.is_global_zero:
            return
        metrics = self.model.validated_at[1] if has_validation else {}
        with atomic_file(run_dir / "metrics.json") as partial:
            partial.write_text(json.dumps({"step": step, **metrics}, indent=2) + "\n")
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        export = run_dir / "export"
        self.model.averaged.eval().save_pretrained(
            export, metadata={"metrics": finite, "training_step": step}, crop=self.datamodule.val_crop
        )
        samples = self._write_samples(run_dir / "samples") if has_validation else None
        decodes = getattr(getattr(self.model.tokenizer, "decoder", None), "makes_images", True)
        _report(run_dir, step, metrics, self._grid(), export, samples, decodes)

    def _grid(self) -> Path | None:
        grids = [callback for callback in self.trainer.callbacks if isinstance(callback, ReconstructionGrids)]
        return grids[0].latest if grids else None

    def _write_samples(self, folder: Path) -> Path:
        """A few validation images as PNG, so that the commands that are printed next have something to work on."""
        folder.mkdir(parents=True, exist_ok=True)
        batch = next(iter(self.datamodule.val_dataloader()))
        for i, image in enumerate(batch["image"][:SAMPLES]):
            save_png(image, folder / f"{i}.png")
        return folder


def _unused_run_dir(run_dir: Path) -> Path:
    """``run_dir``, or the first of ``run_dir-2``, ``run_dir-3`` ... that holds no checkpoints yet."""
    candidate, number = run_dir, 1
    while list_checkpoints(candidate):
        number += 1
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    if candidate != run_dir:
        logger.warning("%s holds a run already; this one goes to %s (--ckpt_path last continues)", run_dir, candidate)
    return candidate


def _report(
    run_dir: Path,
    step: int,
    metrics: dict[str, float],
    grid: Path | None,
    export: Path,
    samples: Path | None,
    decodes: bool,
) -> None:
    print(f"\nTrained for {step} steps.")
    if "val/psnr" in metrics:
        usage = f", {100 * metrics['val/usage']:.0f} % of the codes used" if "val/usage" in metrics else ""
        print(f"  validation      {metrics['val/psnr']:.2f} dB PSNR on {metrics['val/images']:.0f} images{usage}")
    print(f"  metrics         {run_dir / 'metrics.json'}")
    if grid is not None:
        print(f"  reconstructions {grid}")
    print(f"  tokenizer       {export}")
    images = samples if samples is not None else "IMAGES"
    tokens = run_dir / "tokens.safetensors"
    print("\nNext:")
    print(f"  vistok encode {images} --tokenizer {export} --out {tokens}")
    if decodes:
        print(f"  vistok decode {tokens} --tokenizer {export} --out {run_dir / 'decoded'}")
        print(f"  vistok evaluate {export} --data {images} --out {run_dir / 'evaluation' / 'samples'}\n")
    else:
        print("  train the next stage: initialize it from this run\n")


class UsageError(ValueError):
    """A mistake in what the user asked for, found before anything runs."""


def main(args: list[str] | None = None) -> None:
    """Run ``fit``, ``validate`` or ``test``; a mistake in the configuration ends with one clear line and status 2."""
    # What Lightning says at every start and no user of a finished pipeline can act on.
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", message="Found .* module\\(s\\) in eval mode at the start of training")
    try:
        TokenizerCLI(args)
    except (jsonargparse.ArgumentError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
