"""The tokenizer inside a checkpoint of a training run."""

import json
import os

import pytest
import torch

import vistok
from vistok.hub.format import CheckpointError, fingerprint
from vistok.hub.load import load_with_source


def write_checkpoint(path, model, ema=None, changes=()):
    """What training writes: both tokenizers in one state dict, beside things that no tokenizer needs."""
    state = {f"tokenizer.{name}": tensor for name, tensor in model.state_dict().items()}
    state["objective.weight"] = torch.zeros(3)
    if ema is not None:
        state |= {f"ema_tokenizer.{name}": tensor for name, tensor in ema.state_dict().items()}
    entry = {
        "format_version": 1,
        "vistok_version": vistok.__version__,
        "tokenizer": json.dumps(model.config),
        "global_step": 7,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "optimizer_states": [{}], "vistok": entry | dict(changes)}, path)
    return path


def test_averaged_weights_are_taken_where_there_are_any(titok, tmp_path):
    raw, averaged = titok(0), titok(1)
    with_ema = write_checkpoint(tmp_path / "a.ckpt", raw, averaged)
    without = write_checkpoint(tmp_path / "b.ckpt", raw)
    assert fingerprint(vistok.load(with_ema)) == fingerprint(averaged)
    assert fingerprint(vistok.load(with_ema, ema=False)) == fingerprint(raw)
    assert fingerprint(vistok.load(without)) == fingerprint(raw)
    assert "step 7, averaged" in load_with_source(with_ema).source
    assert load_with_source(without).metadata == {"training_step": 7, "weights": "raw"}


def test_checkpoint_and_its_export_write_the_same_tokens(tokenizer, images, tmp_path):
    loaded = load_with_source(write_checkpoint(tmp_path / "a.ckpt", tokenizer))
    exported = load_with_source(vistok.save(loaded.tokenizer, tmp_path / "export"))
    assert loaded.fingerprint == exported.fingerprint == fingerprint(tokenizer)
    tokens = tokenizer.encode(images).indices["image"]
    assert torch.equal(loaded.tokenizer.encode(images).indices["image"], tokens)
    assert torch.equal(exported.tokenizer.encode(images).indices["image"], tokens)


def test_run_folder_gives_its_last_checkpoint_else_the_newest(titok, tmp_path):
    old = write_checkpoint(tmp_path / "run" / "checkpoints" / "step=00000010.ckpt", titok(0))
    new = write_checkpoint(tmp_path / "run" / "checkpoints" / "step=00000005.ckpt", titok(1))
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert fingerprint(vistok.load(folder)) == fingerprint(titok(1))
    os.utime(write_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", titok(2)), (1, 1))
    assert fingerprint(vistok.load(tmp_path / "run")) == fingerprint(titok(2))


def test_loaded_weights_do_not_change_when_training_writes_on(titok, tmp_path):
    path = write_checkpoint(tmp_path / "last.ckpt", titok(0))
    loaded = vistok.load(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert fingerprint(loaded) == fingerprint(titok(0))


def test_checkpoint_of_another_program_is_refused(titok, tmp_path):
    for content in ({"state_dict": titok().state_dict()}, [1, 2], {"vistok": {"format_version": 1}}):
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match="a.ckpt is not a checkpoint of a Vistok training run"):
            vistok.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 9}, "format_version 9 is unknown"),
        ({"tokenizer": "{"}, "'tokenizer' entry is not the JSON"),
        ({"tokenizer": 3}, "'tokenizer' entry is not the JSON"),
        ({"tokenizer": '{"class_path": "os.system"}'}, "'os.system' is not a Vistok component"),
    ],
)
def test_damaged_entry_is_refused(changes, reason, titok, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", titok(), changes=changes)
    with pytest.raises(CheckpointError, match=f"a.ckpt.*{reason}"):
        vistok.load(path)


def test_checkpoint_of_another_size_is_refused(titok, tmp_path):
    path = write_checkpoint(
        tmp_path / "a.ckpt", titok(), changes={"tokenizer": json.dumps(titok(codebook_size=16).config)}
    )
    with pytest.raises(CheckpointError, match="quantizer.codebook has shape .256, 8."):
        vistok.load(path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_checkpoint_is_refused(kept, titok, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", titok(), titok(1))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match="a.ckpt is not a training checkpoint, or is damaged"):
        vistok.load(path)
