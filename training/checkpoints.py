"""Checkpoints of a run: written whole or not at all, the newest few kept, the last step always saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..data.files import atomic_file

_NAME = re.compile(r"step=(\d{8,})\.ckpt")


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in checkpoint_folder(run_dir).glob("*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


class RunCheckpoints(Checkpoint):
    """Saves the full training state under ``<run>/checkpoints/step=00001000.ckpt``.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step of a run is saved besides.
        keep: how many of the newest checkpoints stay; all if 0.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        super().__init__()
        if every_n_steps < 1 or keep < 0:
            raise ValueError(f"needs every_n_steps >= 1 and keep >= 0; got {every_n_steps} and {keep}")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = -1
        self._due = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for partial in checkpoint_folder(trainer.default_root_dir).glob(".*.partial"):
                partial.unlink()  # what a killed run was writing

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now is the step restored. It must not be saved again: with gradient accumulation the next batches still
        # belong to it, and a checkpoint between them would lose their gradients.
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The last step is saved here too where it can be: afterwards Lightning counts an epoch cut short as finished,
        # and a run that is extended would lose the rest of it.
        due = trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps
        self._due = (self._due or due) and trainer.global_step != self._saved_step
        # A run whose steps are being skipped may be about to end; what it saved before is what its user wants to keep.
        if self._due and not pl_module.guard.in_a_row:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._saved_step or trainer.fast_dev_run:
            return
        self._saved_step, self._due = trainer.global_step, False
        folder = checkpoint_folder(trainer.default_root_dir)
        trainer.save_checkpoint(folder / f"step={trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero and self.keep:
            for old in list_checkpoints(trainer.default_root_dir)[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)


def finish_epoch(loops: dict[str, Any]) -> None:
    """Let a checkpoint of the last batch of an epoch stand for the start of the next one, in place.

    Lightning resumes such a checkpoint once, but counts the next epoch wrongly: one written at the end of that epoch
    would resume with other data (seen in 2.6.6).

    Args:
        loops: the ``loops`` entry of a Lightning checkpoint.
    """
    fit = loops["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    if not batches["is_last_batch"]:
        return
    if batches["total"]["completed"] < batches["total"]["ready"]:  # written in on_train_batch_end
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    batches["total"]["completed"] = batches["total"]["ready"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    for progress in fit["epoch_progress"].values():
        progress.update(dict.fromkeys(progress, progress["ready"]))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name and renames, so a killed run never leaves half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with atomic_file(Path(path)) as partial:
            torch.save(checkpoint, partial)
