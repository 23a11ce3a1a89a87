"""The evaluation during training: what it writes and logs, and that it leaves the training alone."""

import importlib.util
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from vistok.data.demo import DemoPhotographs
from vistok.data.module import ImageData
from vistok.data.transforms import EvalTransform
from vistok.eval.reconstruction import psnr
from vistok.eval.report.per_image import read_per_image
from vistok.eval.results import Results
from vistok.training.evaluation import QuickEvaluation
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import ReconstructionObjective

_spec = importlib.util.spec_from_file_location("vistok_test_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)


class Log(pl.loggers.Logger):
    name = version = "log"

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params):
        pass


def train(folder, *callbacks, val=True, **options):
    module = TokenizerTraining(small.titok(), ReconstructionObjective(l1=0.5), **options)
    data = ImageData(
        DemoPhotographs(num_samples=16),
        DemoPhotographs(num_samples=10) if val else None,
        image_size=16,
        batch_size=4,
        num_workers=0,
    )
    log = Log()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=8,
        val_check_interval=4,
        num_sanity_val_steps=1,
        default_root_dir=folder,
        logger=log,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=data)
    return module, log


def test_every_validation_leaves_a_partial_result_and_logs_its_numbers(tmp_path):
    callback = QuickEvaluation(num_images=6, download=False)
    _, log = train(tmp_path, callback)
    folders = sorted((tmp_path / "evaluation").iterdir())
    assert [folder.name for folder in folders] == ["step=00000004", "step=00000008"]
    assert sorted(path.name for path in folders[1].iterdir()) == ["per_image.parquet", "report.html", "results.json"]
    results = Results.load(folders[1] / "results.json")
    assert results.partial == "measured during training; a subset: 6 of 10 images"
    assert (results.evaluated, results.protocol.crop) == (6, "center")
    assert log.values[8]["eval/psnr"] == results.main.metrics["psnr"]
    assert "rfid" in results.skipped and results.main.metrics["usage"] > 0
    index, _, columns = read_per_image(folders[1] / "per_image.parquet")
    assert index.tolist() == [0, 1, 3, 5, 6, 8]
    assert columns["psnr"].mean() == pytest.approx(results.main.metrics["psnr"], abs=1e-4)


class Modes(pl.Callback):
    """Whether the tokenizer trains, at every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, *_):
        self.seen.append(module.tokenizer.training)


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_training_goes_on_as_if_nobody_had_looked(tmp_path, ema_decay):
    alone, _ = train(tmp_path / "alone", ema_decay=ema_decay)
    callbacks = QuickEvaluation(num_images=4, download=False), Modes()
    watched, _ = train(tmp_path / "watched", *callbacks, ema_decay=ema_decay)
    assert callbacks[1].seen == [True] * 8
    for (name, one), (_, other) in zip(alone.state_dict().items(), watched.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_the_averaged_weights_are_judged(tmp_path):
    callback = QuickEvaluation(num_images=10, download=False)
    module, _ = train(tmp_path, callback, ema_decay=0.9)
    source, transform = DemoPhotographs(num_samples=10), EvalTransform((16, 16), "center")
    pixels = torch.stack([transform(source.read(number).image) for number in range(10)])
    with torch.no_grad():
        judged, raw = (
            psnr(tokenizer.decode(tokenizer.encode(pixels / 255)).mul(255).round() / 255, pixels / 255).mean().item()
            for tokenizer in (module.ema_tokenizer.eval(), module.tokenizer.eval())
        )
    assert callback.latest.main.metrics["psnr"] == pytest.approx(judged, abs=5e-5)
    assert judged != pytest.approx(raw, abs=2e-4)
    assert callback.latest.partial == "measured during training"


def test_what_a_killed_run_left_at_a_step_is_replaced(tmp_path):
    left = tmp_path / "evaluation" / "step=00000004" / "unfinished" / "parts"
    left.mkdir(parents=True)
    (left / "0000-0000.pt").write_bytes(b"half a part")
    train(tmp_path, QuickEvaluation(num_images=4, download=False))
    assert Results.load(left.parents[1] / "results.json").evaluated == 4 and not left.parent.exists()


def test_what_was_left_out_is_said_once(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        train(tmp_path, QuickEvaluation(num_images=4, download=False))
    assert caplog.text.count("left out of the evaluation: lpips_alex: no weights") == 1


def test_it_can_skip_validations(tmp_path):
    callback = QuickEvaluation(num_images=4, every_n_validations=2, download=False)
    train(tmp_path, callback)
    assert [folder.name for folder in (tmp_path / "evaluation").iterdir()] == ["step=00000008"]
    assert callback.state_dict() == {"validations": 2}


def test_a_run_without_validation_images_is_refused_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match="needs data.val"):
        train(tmp_path, QuickEvaluation(), val=False)
    with pytest.raises(ValueError, match="num_images must be at least 2"):
        QuickEvaluation(num_images=1)
