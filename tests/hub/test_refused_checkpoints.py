"""Damaged, foreign and hostile checkpoints are refused with the file and the reason, and nothing in them runs."""

import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok.hub.format import CheckpointError


@pytest.fixture
def export(titok, tmp_path):
    return vistok.save(titok(), tmp_path / "export")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    fingerprint = json.loads((folder / "config.json").read_text())["fingerprint"]
    save_file(weights, folder / "model.safetensors", {"fingerprint": fingerprint})


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported, where an import would find it."""
    (tmp_path / "trap_module.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "sprung"


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "trap_module.Trap",
        "vistok.training.module.TokenizerTraining",
        "vistok.cli.main.main",
        "vistok.hub.load.load",
        "vistok.tokenizers.titok.torch.load",
        "vistok.tokenizers.titok.annotations",
        "vistok.tokenizers...trap_module.Trap",
        "vistok.tokenizers.nothing.Trap",
        "vistok.tokenizers.titok.LatentViTEncoder",
        "vistok.tokenizers.base.Path",
        ["vistok.tokenizers.titok.TiTok"],
        None,
    ],
)
def test_config_that_names_other_code_is_refused_and_runs_nothing(class_path, export, trap):
    for tree in ({"class_path": class_path, "init_args": {"command": "true"}}, nested(class_path)):
        edit_config(export, tokenizer=tree)
        before = set(sys.modules)
        with pytest.raises(CheckpointError, match="config.json: the tokenizer that it describes cannot be built"):
            vistok.load(export)
        assert not {name for name in set(sys.modules) - before if "training" in name or "trap" in name}
    assert not trap.exists()


def nested(class_path):
    return {"class_path": "vistok.tokenizers.titok.TiTok", "init_args": {"quantizer": {"class_path": class_path}}}


@pytest.mark.parametrize(
    "tree",
    [
        {"class_path": "vistok.tokenizers.titok.TiTok"},
        {"class_path": "vistok.tokenizers.titok.TiTok", "init_args": {"quantizer": 3}},
        {"class_path": "vistok.tokenizers.titok.TiTok", "init_args": {"size": 3}},
        {"class_path": "vistok.tokenizers.titok.TiTok", "init_args": [1, 2]},
    ],
)
def test_config_that_cannot_be_built_is_refused(tree, export):
    edit_config(export, tokenizer=tree)
    with pytest.raises(CheckpointError, match="config.json"):
        vistok.load(export)


@pytest.mark.parametrize("tree", [3, "vistok", [], {}, {"init_args": {}}])
def test_config_without_a_class_is_refused(tree, export):
    edit_config(export, tokenizer=tree)
    with pytest.raises(CheckpointError, match="config.json describes a .* which is not a tokenizer"):
        vistok.load(export)


def test_config_of_a_part_is_refused(export):
    part = {"class_path": "vistok.quantizers.vq.VectorQuantizer", "init_args": {"codebook_size": 4, "dim": 2}}
    edit_config(export, tokenizer=part)
    with pytest.raises(CheckpointError, match="describes a VectorQuantizer, which is not a tokenizer"):
        vistok.load(export)


def test_config_of_a_base_class_is_refused(export):
    edit_config(export, tokenizer={"class_path": "vistok.tokenizers.base.Tokenizer", "init_args": {}})
    with pytest.raises(CheckpointError, match="the weights do not fit the config: unexpected"):
        vistok.load(export)


@pytest.mark.parametrize("version", [2, 0, "1", None, [1]])
def test_unknown_format_version_says_what_is_read(version, export):
    edit_config(export, format_version=version)
    with pytest.raises(CheckpointError, match="format_version .* is unknown; Vistok .* reads 1"):
        vistok.load(export)


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 1,', "\x00\x01", "[" * 100_000])
def test_config_that_is_not_json_is_refused(text, export):
    (export / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        vistok.load(export)


@pytest.mark.parametrize("config", ["[]", "3", '{"model_type": "bert"}', '{"format_version": 1}'])
def test_config_of_something_else_is_refused(config, export):
    (export / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="config.json"):
        vistok.load(export)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_weights_are_refused(kept, export):
    data = (export / "model.safetensors").read_bytes()
    cut = int(len(data) * kept) if isinstance(kept, float) else kept
    (export / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        vistok.load(export)


def test_missing_weights_file_is_refused(export):
    (export / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        vistok.load(export)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("decoder.mask_token"), "missing decoder.mask_token"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda w: w.update({"decoder.mask_token": torch.zeros(1, 1, 7)}), r"has shape \(1, 1, 7\)"),
        (lambda w: w.update({"decoder.mask_token": torch.zeros(1, 1, 32, dtype=torch.int32)}), "is torch.int32"),
        (lambda w: w.clear(), "and [0-9]+ more"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, reason, export):
    edit_weights(export, change)
    with pytest.raises(CheckpointError, match=f"model.safetensors: the weights do not fit the config: .*{reason}"):
        vistok.load(export)


def test_config_beside_the_weights_of_another_export_is_refused(export, titok, tmp_path):
    other = vistok.save(titok(1), tmp_path / "other")
    (export / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="belong to different exports"):
        vistok.load(export)


def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"vistok": Bomb(), "state_dict": {}}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.ckpt", "plain.ckpt"):
        with pytest.raises(CheckpointError, match=f"{name} is not a training checkpoint"):
            vistok.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "./a/b", "runs/", "", "https://example.org/x", "-a/b", "a b/c"])
def test_name_of_nothing_lists_what_is_accepted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises((FileNotFoundError, CheckpointError), match="accepted|no checkpoint"):
        vistok.load(name)


def test_folder_without_a_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="neither config.json nor checkpoints"):
        vistok.load(tmp_path)


def test_arguments_for_released_checkpoints_are_refused_elsewhere(export):
    with pytest.raises(ValueError, match=r"\['encoder_size'\] are only for released checkpoints"):
        vistok.load(export, encoder_size=3)
    with pytest.raises(ValueError, match="ema=False is for training checkpoints"):
        vistok.load(export, ema=False)
