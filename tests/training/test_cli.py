"""The command line of training: every YAML, overrides, mistakes, and what a run leaves behind."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import vistok
from vistok.layers.configurable import build
from vistok.training.cli import TokenizerCLI, main
from vistok.training.module import TokenizerTraining

_spec = importlib.util.spec_from_file_location("vistok_test_runs", Path(__file__).with_name("runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

# Those with perceptual networks or teachers need files of weights; test_recipes.py parses them.
CONFIGS = [runs.ROOT / "configs" / f"{n}.yaml" for n in ("quickstart", "tiny_imagenet_titok", "tiny_imagenet_vqgan")]
QUANTIZERS = sorted((runs.ROOT / "configs" / "quantizers").glob("*.yaml"))


class Parsed(TokenizerCLI):
    """Parses and instantiates, and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path, tmp_path):
    with torch.device("meta"):
        cli = Parsed(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path)])
    tokenizer = cli.model.tokenizer
    assert all(p.device.type == "meta" for p in tokenizer.parameters())
    assert cli.datamodule.image_size == tokenizer.image_size
    assert path.read_text().startswith("#"), "a config opens with what it is and how to run it"
    again = Parsed(["fit", "--config", str(_dump(tmp_path, cli.model.resolved_config))])
    assert again.model.tokenizer.config == tokenizer.config


@pytest.mark.parametrize("path", QUANTIZERS, ids=lambda path: path.stem)
def test_every_quantizer_example_is_a_value_of_the_command_line(path, tmp_path):
    recipe = "tiny_imagenet_vqgan" if path.stem == "multi_scale" else "quickstart"
    config = runs.ROOT / "configs" / f"{recipe}.yaml"
    with torch.device("meta"):
        cli = Parsed(
            ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)]
            + ["--model.tokenizer.quantizer", str(path)]
        )
        alone = build(yaml.safe_load(path.read_text()))
    # Arguments of the recipe's own quantizer stay where an example of the same class does not name them.
    assert cli.model.tokenizer.quantizer.config == alone.config
    assert path.read_text().startswith("#")
    again = Parsed(["fit", "--config", str(_dump(tmp_path, cli.model.resolved_config))])
    assert again.model.tokenizer.config == cli.model.tokenizer.config


def _dump(tmp_path, text):
    (tmp_path / "resolved.yaml").write_text(text)
    return tmp_path / "resolved.yaml"


def test_any_field_can_be_overridden(tmp_path):
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "run")
    cli = Parsed(
        ["fit", "--config", str(config), "--model.tokenizer.num_latent_tokens", "3", "--model.optimizer.lr", "1e-5"]
        + ["--model.tokenizer.quantizer.codebook_size", "64", "--data.batch_size=6", "--model.ema_decay", "null"]
        + ["--data.train", "vistok.data.folder.ImageFolder", "--data.train.root", str(tmp_path)]
    )
    assert cli.model.tokenizer.layout()[0].length == 3
    assert cli.model.tokenizer.codebook_sizes == (64,)
    assert cli.model.optimization.lr == 1e-5 and cli.datamodule.batch_size == 6
    assert cli.model.ema_tokenizer is None
    assert type(cli.datamodule.train).__name__ == "ImageFolder"


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--model.tokenizer.num_latent_tokenz", "3"], "num_latent_tokenz"),
        (["--model.optimizer.lr", "fast"], "model.optimizer.lr"),
        (["--trainer.max_stepz", "3"], "max_stepz"),
        (["--data.train.class_path", "vistok.data.demo.Nothing"], "Nothing"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--ckpt_path", "last", "--model.tokenizer.quantizer.dims", "3"], "dims"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs_in_a_few_lines(tmp_path, capsys, arguments, named):
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in error and len(error.strip().splitlines()) <= 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["vistok.data.webdataset.WebDataset", "--data.train.shards", "nowhere/x-{000..001}.tar"], "x-001.tar"),
        (["vistok.data.folder.ImageFolder", "--data.train.root", "nowhere"], "nowhere"),
    ],
)
def test_missing_data_is_one_line_before_training(tmp_path, capsys, arguments, named):
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--data.train", *arguments])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(error) == 1 and named in error[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_in_the_file_is_refused_too(tmp_path, capsys):
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "run")
    tree = yaml.safe_load(config.read_text())
    tree["model"]["tokenizer"]["init_args"]["quantizer"]["init_args"]["codebook_sise"] = 3
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config)])
    assert stop.value.code == 2 and "codebook_sise" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validation_needs_a_checkpoint(tmp_path, capsys, command):
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "run")
    for arguments, named in (([], "--ckpt_path"), (["--ckpt_path", "last"], "holds no checkpoint")):
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", str(config), *arguments])
        assert stop.value.code == 2 and named in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny configuration."""
    folder = tmp_path_factory.mktemp("finished")
    config = runs.write_config(folder / "config.yaml", folder / "run", max_steps=6)
    main(["fit", "--config", str(config)])
    return folder, config


def test_a_run_leaves_metrics_picture_export_and_the_next_commands(finished, capsys, tmp_path):
    folder, _ = finished
    run = folder / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == 6 and metrics["val/images"] == 6
    assert 0 < metrics["val/usage"] <= 1 and 1 <= metrics["val/perplexity"] <= 32
    assert Image.open(run / "images" / "step=00000006.png").size == (2 + 6 * 18, 2 * 16 + 6)
    assert [path.name for path in (run / "checkpoints").iterdir()] and (run / "config.yaml").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert len(list((run / "samples").glob("*.png"))) == 4

    tokenizer = vistok.load(run / "export")
    state = runs.load(sorted((run / "checkpoints").iterdir())[-1])["state_dict"]
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, state[f"ema_tokenizer.{name}"]), name


def test_tensorboard_has_curves_and_grids(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "run" / "tensorboard"))
    events.Reload()
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    wanted = {"train/loss", "train/psnr", "train/usage", "train/images/s", "train/lr", "val/psnr", "val/usage"}
    assert wanted <= set(scalars) and "val/reconstructions" in images
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3, 5]


def test_the_printed_commands_work(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # evaluate does without the networks that it would fetch
    folder, config = finished
    main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "printed")])
    printed = capsys.readouterr().out
    commands = [line.split() for line in printed.splitlines() if line.strip().startswith("vistok ")]
    assert [command[1] for command in commands] == ["encode", "decode", "evaluate"]
    from vistok.cli.main import main as vistok_main

    for command in commands:
        assert vistok_main(command[1:]) == 0
    assert len(list((tmp_path / "printed" / "decoded").glob("*.png"))) == 4
    assert (tmp_path / "printed" / "evaluation" / "samples" / "report.html").is_file()


def test_validation_of_a_checkpoint_gives_the_numbers_of_the_run(finished, tmp_path):
    folder, config = finished
    checkpoint = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    expected = json.loads((folder / "run" / "metrics.json").read_text())

    class Validate(TokenizerCLI):
        def _run_subcommand(self, subcommand):
            super()._run_subcommand(subcommand)
            self.numbers = self.model.validated_at[1]

    for command in ("validate", "test"):
        cli = Validate(
            [command, "--config", str(folder / "run" / "config.yaml"), "--ckpt_path", str(checkpoint)]
            + ["--trainer.default_root_dir", str(tmp_path)]
        )
        assert cli.numbers == {name: value for name, value in expected.items() if name != "step"}


def test_a_new_run_never_writes_into_an_old_one(finished):
    folder, config = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    cli = Parsed(["fit", "--config", str(config)])
    assert cli.trainer.default_root_dir.endswith("run-2")
    cli = Parsed(["fit", "--config", str(config), "--ckpt_path", "last"])
    assert cli.trainer.default_root_dir.endswith("run")
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_architecture_is_refused_by_name(finished, tmp_path):
    folder, config = finished
    checkpoint = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    with pytest.raises(ValueError, match=r"tokenizer.num_latent_tokens: 4 in the checkpoint, 5 in the config"):
        main(
            ["fit", "--config", str(config), "--ckpt_path", str(checkpoint), "--model.tokenizer.num_latent_tokens", "5"]
            + ["--trainer.default_root_dir", str(tmp_path)]
        )


def weights(config, *overrides):
    """Weights of the tokenizer after a short run."""
    main(["fit", "--config", str(config), *overrides])
    run = Path(yaml.safe_load(Path(config).read_text())["trainer"]["default_root_dir"])
    (checkpoint,) = (run / "checkpoints").iterdir()
    return {k: v for k, v in runs.load(checkpoint)["state_dict"].items() if not k.startswith("ema")}


def test_accumulated_gradients_equal_one_large_batch(tmp_path):
    overrides = ["--model.tokenizer.quantizer.restart_after", "null", "--trainer.max_steps", "3"]
    whole = weights(runs.write_config(tmp_path / "a.yaml", tmp_path / "a"), *overrides)
    parts = weights(
        runs.write_config(tmp_path / "b.yaml", tmp_path / "b"),
        *overrides,
        *("--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2"),
    )
    runs.assert_close(whole, parts)


def test_bf16_trains_with_the_codebook_in_float32(tmp_path):
    config = runs.write_config(tmp_path / "c.yaml", tmp_path / "run", max_steps=4, precision="bf16-mixed")
    state = weights(config)
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    assert all(torch.isfinite(value).all() for value in state.values())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val/psnr"] > 5


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms = []

    def record(self, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    monkeypatch.setattr(TokenizerTraining, "on_before_zero_grad", record)
    config = runs.write_config(tmp_path / "c.yaml", tmp_path / "run", max_steps=3, gradient_clip_val=1e-3)
    main(["fit", "--config", str(config)])
    assert norms and all(0 < norm <= 1.001e-3 for norm in norms)


def test_a_perceptual_term_starts_when_it_should(tmp_path):
    import torchvision

    torch.manual_seed(0)
    features = torchvision.models.alexnet(weights=None).features
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "trunk.pth")
    config = runs.write_config(tmp_path / "c.yaml", tmp_path / "run", max_steps=4, log_every_n_steps=1)
    tree = yaml.safe_load(config.read_text())
    tree["model"]["objective"]["init_args"]["perceptual"] = {
        "class_path": "vistok.losses.perceptual.LPIPSLoss",
        "init_args": {"net": "alex", "start_step": 2, "trunk_weights": str(tmp_path / "trunk.pth")},
    }
    config.write_text(yaml.safe_dump(tree))
    state = weights(config, "--model.tokenizer.image_size", "64")
    assert not [name for name in state if "lpips" in name.lower() or "perceptual" in name]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/lpips")] == [2, 3]


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_weights(tmp_path):
    overrides = ["--model.tokenizer.quantizer.restart_after", "null", "--trainer.max_steps", "3"]
    eager = weights(runs.write_config(tmp_path / "a.yaml", tmp_path / "a"), *overrides)
    compiled = weights(runs.write_config(tmp_path / "b.yaml", tmp_path / "b"), *overrides, "--model.compile", "true")
    runs.assert_close(eager, compiled, atol=1e-4)
