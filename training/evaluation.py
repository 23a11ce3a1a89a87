"""The quick suite of the evaluation while a tokenizer trains: rFID, PSNR, SSIM, LPIPS and codebook on a subset.

Its numbers rest on fewer images than reported ones and say so: every result is marked as partial. They tell how a run
goes; a result to publish comes from ``vistok evaluate`` on all images.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import lightning.pytorch as pl

from ..data.module import ImageData
from ..data.transforms import EvalTransform
from ..eval.evaluate import Subject, choose, evaluate, manifest
from ..eval.processes import Processes
from ..eval.protocol import preset
from ..eval.results import Results
from ..eval.suites import Settings, tokenizer_suite
from ..eval.variants import Codes
from ..eval.weights import Weights

logger = logging.getLogger(__name__)


class QuickEvaluation(pl.Callback):
    """After validations, evaluates the averaged weights on some validation images.

    Writes ``<run>/evaluation/step=00001000/`` with the files of ``vistok evaluate`` and logs every number as
    ``eval/<metric>``. The ranks share the images.

    Args:
        num_images: evaluate so many, spread evenly over the validation images; all if there are not more.
        every_n_validations: evaluate after each so many.
        weights: folder with the weights of Inception and AlexNet; torch's hub cache is looked into as well.
        download: fetch weights that are missing; metrics without weights are left out.
        batch_size: images per process at a time; that of validation if ``None``.

    Attributes:
        latest: the last results, on the first rank.
    """

    def __init__(
        self,
        num_images: int = 2000,
        every_n_validations: int = 1,
        weights: str | None = None,
        download: bool = True,
        batch_size: int | None = None,
    ) -> None:
        if num_images < 2 or every_n_validations < 1:
            raise ValueError(
                f"num_images must be at least 2 and every_n_validations at least 1; got {num_images} and "
                f"{every_n_validations}"
            )
        self.num_images = num_images
        self.every_n_validations = every_n_validations
        self.weights = weights
        self.download = download
        self.batch_size = batch_size
        self.latest: Results | None = None
        self._validations = 0
        self._told = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = trainer.datamodule
        if stage == "fit" and not (isinstance(data, ImageData) and data.val is not None):
            raise ValueError("QuickEvaluation needs data.val: images to evaluate on")
        if pl_module.tokenizer.takes_context:
            raise ValueError("QuickEvaluation decodes tokens alone, and this decoder reads text features besides")

    def state_dict(self) -> dict[str, int]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._validations = state_dict["validations"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        folder = Path(trainer.default_root_dir) / "evaluation" / f"step={trainer.global_step:08d}"
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed on its way here
        trainer.strategy.barrier()
        self.latest = self._evaluate(trainer, pl_module, folder)
        if self.latest is not None:
            values = {f"eval/{name}": value for name, value in self.latest.main.metrics.items()}
            for one in trainer.loggers:
                one.log_metrics(values, trainer.global_step)
            if self.latest.skipped and not self._told:
                self._told = True
                reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.latest.skipped.items()))
                logger.warning("left out of the evaluation: %s", reasons)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> Results | None:
        data: ImageData = trainer.datamodule
        source, size = data.val, data.image_size
        source.prepare()
        number = None if len(source) <= self.num_images else self.num_images
        protocol = preset("torch-fidelity", crop=data.val_crop, height=size[0], width=size[1])
        settings = Settings(
            "quick",
            protocol,
            Weights(self.weights, self.download),
            pl_module.device,
            choose(len(source), number),
            manifest(source),
        )
        tokenizer = pl_module.averaged.eval()
        name = f"{Path(trainer.default_root_dir).name}, step {trainer.global_step}"
        return evaluate(
            source,
            EvalTransform(size, data.val_crop),
            tokenizer_suite(settings, Codes(tokenizer)),
            Subject({"name": name, "kind": "tokenizer", "class": type(tokenizer).__name__}, {"name": "data.val"}),
            folder,
            num_images=number,
            batch_size=self.batch_size or data.val_batch_size or data.batch_size,
            num_workers=data.num_workers,
            device=pl_module.device,
            processes=Processes(trainer.global_rank, trainer.world_size, trainer.strategy.barrier),
            note="measured during training",
        )
