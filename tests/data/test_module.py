"""The data module under a real Trainer: every checkpoint resumes with the samples that come next."""

from __future__ import annotations

import logging
import multiprocessing

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from vistok.data.folder import ImageFolder
from vistok.data.module import ImageData
from vistok.data.source import ImageSource
from vistok.data.webdataset import WebDataset

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCHES = 5  # per epoch
STEPS = 13  # two and a half epochs


class Recorder(pl.LightningModule):
    """A model that remembers which samples it was trained on, at which step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, list[str]]] = []
        self.validated: list[str] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch["key"]))
        return self.layer(batch["image"].float().mean().reshape(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.fixture
def shards(tmp_path, make_shards) -> str:
    return make_shards(tmp_path / "shards", [9, 2, 6, 4])


def data(shards: str, **options) -> ImageData:
    options = {"image_size": 8, "batch_size": 4, "num_workers": 0, "seed": 3} | options
    return ImageData(WebDataset(shards), **options)


def fit(data: ImageData, folder, ckpt_path=None, callbacks=(), **options) -> Recorder:
    model = Recorder()
    options = {"max_steps": STEPS} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model


def checkpoints(folder, **options) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}-{epoch}", save_top_k=-1, **options)


@pytest.mark.parametrize("limit", [{"max_steps": STEPS}, {"max_epochs": 3, "max_steps": -1}], ids=["steps", "epochs"])
@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}],
    ids=["every step", "epoch end", "validation end"],
)  # fmt: skip
def test_every_checkpoint_resumes_with_exactly_the_samples_that_come_next(tmp_path, shards, limit, when):
    def run(callbacks=(), ckpt_path=None):
        module = data(shards) if "every_n_train_steps" in when else data(shards, val=WebDataset(shards))
        return fit(module, tmp_path, ckpt_path, callbacks, **limit)

    whole = run([checkpoints(tmp_path / "ckpt", **when)])
    assert [step for step, _ in whole.seen] == list(range(STEPS if "max_epochs" not in limit else 3 * BATCHES))
    saved = sorted((tmp_path / "ckpt").iterdir())
    # every step of two epochs and a half; or the two ends of epochs before the last step
    assert len(saved) >= (STEPS if "every_n_train_steps" in when else 2)
    for path in saved:
        step = int(path.stem.split("=")[1].split("-")[0])
        resumed = run(ckpt_path=path)
        assert resumed.seen == whole.seen[step:], f"resumed at step {step}"


def test_a_limited_epoch_resumes_like_a_whole_one(tmp_path, shards):
    options = {"limit_train_batches": 3, "max_steps": 8}
    whole = fit(data(shards), tmp_path, callbacks=[checkpoints(tmp_path / "ckpt", every_n_train_steps=1)], **options)
    for path in (tmp_path / "ckpt").iterdir():
        step = int(path.stem.split("=")[1].split("-")[0])
        assert fit(data(shards), tmp_path, path, **options).seen == whole.seen[step:], f"resumed at step {step}"


def test_workers_may_change_at_a_resume(tmp_path, shards):
    whole = fit(data(shards), tmp_path)
    fork = {"multiprocessing_context": "fork"}
    save = checkpoints(tmp_path / "ckpt", every_n_train_steps=7)
    fit(data(shards, num_workers=2, **fork), tmp_path, max_steps=7, callbacks=[save])
    resumed = fit(data(shards, num_workers=1, **fork), tmp_path, next((tmp_path / "ckpt").iterdir()))
    assert resumed.seen == whole.seen[7:]
    assert not multiprocessing.active_children(), "workers outlive the run"


def test_validation_sees_every_sample_once_and_may_be_absent(tmp_path, shards):
    model = fit(data(shards, val=WebDataset(shards), val_batch_size=8), tmp_path, max_steps=BATCHES)
    assert len(model.validated) == len(set(model.validated)) == 21
    assert fit(data(shards), tmp_path, max_steps=BATCHES).validated == []


def test_ranks_and_seed_come_from_the_trainer_and_the_run(shards, monkeypatch):
    module = data(shards, seed=None, val=WebDataset(shards))
    module.setup("fit")
    assert (module.train_dataloader().rank, module.train_dataloader().world_size) == (0, 1)
    assert module.train_dataloader().seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")

    class FakeTrainer:
        global_rank, world_size = 1, 3

    module.trainer = FakeTrainer()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        assert (loader.rank, loader.world_size, loader.seed) == (1, 3, 17)
    assert module.test_dataloader().source is module.val, "test falls back to val"


def test_a_missing_or_unsuitable_image_size_is_an_error_at_setup(shards):
    with pytest.raises(ValueError, match="image_size is None"):
        data(shards, image_size=None).setup("fit")
    with pytest.raises(ValueError, match=r"'adm' needs a square size; got \(8, 16\)"):
        data(shards, image_size=(8, 16), val_crop="adm").setup("fit")


def test_a_yaml_config_builds_it_and_a_typo_is_refused(tmp_path, shards, capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageData, "data")
    config = {
        "train": {"class_path": "vistok.data.webdataset.WebDataset", "init_args": {"shards": [shards]}},
        "val": {"class_path": "vistok.data.folder.ImageFolder", "init_args": {"root": str(tmp_path)}},
        "image_size": [16, 24],
        "crop": "random_resized",
        "scale": [0.5, 1.0],
        "batch_size": 5,
        "num_workers": 0,
    }
    module = parser.instantiate_classes(parser.parse_object({"data": config})).data
    assert isinstance(module.train, WebDataset) and isinstance(module.val, ImageFolder)
    assert isinstance(module.train, ImageSource) and len(module.train) == 21
    module.setup("fit")
    assert next(iter(module.train_dataloader()))["image"].shape == (5, 3, 16, 24)
    for key, value in (("crop", "middle"), ("image_sise", 16), ("batch_size", "many")):
        with pytest.raises(Exception, match=key):
            parser.parse_object({"data": config | {key: value}})
