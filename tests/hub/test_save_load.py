"""An export read back is the same tokenizer, and a save that fails leaves nothing half-written."""

import copy
import errno
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import vistok
from vistok.hub import save as save_module
from vistok.hub import weights as weights_module
from vistok.hub.format import fingerprint
from vistok.hub.weights import collect_weights, fill_weights
from vistok.layers.configurable import Configurable

FILES = {"config.json", "model.safetensors", "README.md"}


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_loaded_tokenizer_has_the_same_weights_tokens_and_pixels(tokenizer, images, tmp_path):
    folder = vistok.save(tokenizer, tmp_path / "export")
    loaded = vistok.load(folder)
    assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config
    assert names(folder) == FILES and names(tmp_path) == {"export"}
    expected, found = tokenizer.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokens, again = tokenizer.encode(images), loaded.encode(images)
    assert torch.equal(tokens.indices["image"], again.indices["image"])
    assert torch.equal(tokenizer.decode(tokens), loaded.decode(again))


def test_loaded_tokenizer_is_in_eval_mode_and_can_be_trained_further(tokenizer, images, tmp_path):
    loaded = vistok.load(vistok.save(tokenizer.train(), tmp_path / "export"))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(images).decoded.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in loaded.decoder.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in loaded.decoder.parameters())


def test_loading_casts_floating_weights_and_draws_no_random_numbers(titok, tmp_path):
    folder = vistok.save(titok(), tmp_path / "export")
    state = torch.random.get_rng_state()
    assert {p.dtype for p in vistok.load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert torch.equal(state, torch.random.get_rng_state())


def test_save_pretrained_is_save(titok, tmp_path):
    tokenizer = titok()
    folder = tokenizer.save_pretrained(tmp_path / "export", metadata={"license": "mit"})
    assert json.loads((folder / "config.json").read_text())["metadata"] == {"license": "mit"}


def test_config_states_the_facts_of_the_tokenizer(titok, tmp_path):
    config = json.loads((vistok.save(titok(), tmp_path / "e", crop="adm") / "config.json").read_text())
    assert config["format_version"] == 1 and config["vistok_version"] == vistok.__version__
    assert config["image"] == {
        "size": [32, 32],
        "stride": 8,
        "any_image_size": False,
        "channels": 3,
        "range": [0, 1],
        "resize": "bicubic antialias, shorter side",
        "crop": "adm",
    }
    assert config["tokens"] == {
        "streams": [{"name": "image", "length": 6, "codebook_sizes": [256], "grid": None}],
        "bits": 48.0,
    }
    weights = load_file(tmp_path / "e" / "model.safetensors")
    assert config["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_card_header_is_yaml_and_its_snippet_runs(titok, images, tmp_path, monkeypatch):
    metadata = {"license": "mit", "tags": ["demo: x"], "metrics": {"PSNR": 21.5}, "note": "kept out of the card"}
    card = (vistok.save(titok(), tmp_path / "my-titok", metadata=metadata) / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "vistok",
        "pipeline_tag": "image-to-image",
        "tags": ["vistok", "image-tokenizer", "demo: x"],
        "license": "mit",
        "metrics": ["PSNR"],
    }
    assert "| PSNR | 21.5 |" in body and "kept out" not in card
    monkeypatch.chdir(tmp_path)
    scope = {"images": images}
    exec(re.search(r"```python\n(.*?)```", body, re.S)[1], scope)
    assert scope["images"].shape == images.shape and not torch.equal(scope["images"], images)


def test_fingerprint_follows_weights_and_config_and_survives_the_file(tokenizer, tmp_path):
    expected = fingerprint(tokenizer)
    assert fingerprint(vistok.load(vistok.save(tokenizer, tmp_path / "export"))) == expected
    other = copy.deepcopy(tokenizer)
    with torch.no_grad():
        next(other.decoder.parameters())[-1].add_(1e-6)
    assert fingerprint(other) != expected
    other = copy.deepcopy(tokenizer)
    other.config["init_args"]["image_size"] = 64
    assert fingerprint(other) != expected


def test_saving_again_replaces_the_export(titok, tmp_path):
    vistok.save(titok(0), tmp_path / "export")
    vistok.save(titok(1), tmp_path / "export")
    assert fingerprint(vistok.load(tmp_path / "export")) == fingerprint(titok(1))
    assert names(tmp_path) == {"export"} and names(tmp_path / "export") == FILES


def test_saving_into_an_empty_folder_and_through_a_link(titok, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    vistok.save(titok(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == FILES


@pytest.mark.parametrize(
    "content",
    [
        {"config.json": '{"model_type": "bert"}', "model.safetensors": "x", "README.md": "x"},
        {"config.json": "not json"},
        {"README.md": "x"},
        {"config.json": '{"format_version": 1, "tokenizer": {}}', "thesis.tex": "x"},
    ],
)
def test_save_refuses_a_folder_that_holds_something_else(content, titok, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match="something other than an export"):
        vistok.save(titok(), tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == content


def test_save_refuses_what_load_would_refuse(tmp_path):
    class MyQuantizer(vistok.VectorQuantizer):
        pass

    tokenizer = vistok.TiTok(MyQuantizer(16, 8), 32, 8, 4, (32, 1, 2), (32, 1, 2))
    with pytest.raises(ValueError, match="MyQuantizer.*is not a Vistok component"):
        vistok.save(tokenizer, tmp_path / "export")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("metadata", [{"x": torch.zeros(1)}, {"x": float("nan")}, {"x": {1, 2}}])
def test_save_refuses_metadata_that_json_cannot_hold(metadata, titok, tmp_path):
    with pytest.raises(TypeError, match="metadata must be plain JSON"):
        vistok.save(titok(), tmp_path / "export", metadata=metadata)


def test_disk_full_is_a_clear_error_and_leaves_nothing(titok, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*export: No space left") as caught:
        vistok.save(titok(), tmp_path / "new" / "export")
    assert caught.value.errno == errno.ENOSPC and names(tmp_path / "new") == set()


def test_failed_save_keeps_the_earlier_export(titok, tmp_path, monkeypatch):
    vistok.save(titok(0), tmp_path / "export")
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".partial") and str(target).endswith("export"):
            if not failing.failed:
                failing.failed = True
                raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    failing.failed = False
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        vistok.save(titok(1), tmp_path / "export")
    assert fingerprint(vistok.load(tmp_path / "export")) == fingerprint(titok(0))
    assert names(tmp_path) == {"export"}


def test_write_that_the_system_cuts_short_is_a_clear_error(titok, tmp_path):
    tokenizer = titok()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*export: .*File too large"):
            vistok.save(tokenizer, tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == set()


def test_unwritable_place_is_a_clear_error(titok, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write .*export: "):
        vistok.save(titok(), tmp_path / "file" / "export")
    with pytest.raises(FileExistsError, match="it is a file"):
        vistok.save(titok(), tmp_path / "file")


KILLED = """
import os, signal, sys
import vistok
from vistok.hub.format import fingerprint

folder, old, new = sys.argv[1], vistok.load(sys.argv[2]), vistok.load(sys.argv[3])


def kill_at(name, moment):
    real, calls = getattr(os, name), []
    def dying(*args):
        calls.append(args)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(os, name, dying)


for name, moment in [*[("fsync", i) for i in (1, 2, 3, 4)], ("rename", 1), ("rename", 2), ("fsync", 5)]:
    vistok.save(old, folder)
    child = os.fork()
    if child == 0:
        kill_at(name, moment)
        vistok.save(new, folder)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), (name, moment)
    state = "gone"
    if os.path.exists(folder):
        state = {fingerprint(old): "old", fingerprint(new): "new"}[fingerprint(vistok.load(folder))]
    print(name, moment, state)
"""


def test_save_killed_at_any_moment_leaves_no_half_export(titok, tmp_path):
    old, new = vistok.save(titok(0), tmp_path / "old"), vistok.save(titok(1), tmp_path / "new")
    command = [sys.executable, "-c", KILLED, tmp_path / "export", old, new]
    # One thread, because a forked child has no OpenMP threads.
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Flushes 1 to 4 are those of the three files and their folder; between the two renames there is none.
    assert run.stdout.splitlines() == [
        "fsync 1 old",
        "fsync 2 old",
        "fsync 3 old",
        "fsync 4 old",
        "rename 1 old",
        "rename 2 gone",
        "fsync 5 new",
    ]


class Tied(Configurable):
    """Two layers with one weight, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("saved", torch.arange(3))
        self.register_buffer("computed", torch.arange(4.0).exp(), persistent=False)


def test_tied_weights_are_stored_once_and_stay_one_object(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "build", lambda config: Tied())
    original = Tied()
    weights = collect_weights(original)
    assert set(weights) == {"first.weight", "saved"}
    with torch.device("meta"):
        loaded = Tied()
    fill_weights(loaded, weights, tmp_path)
    assert loaded.first.weight is loaded.second.weight
    assert torch.equal(loaded.first.weight, original.first.weight)


def test_buffers_that_no_file_holds_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "build", lambda config: Tied())
    with torch.device("meta"):
        loaded = Tied()
    fill_weights(loaded, collect_weights(Tied()), tmp_path)
    assert torch.equal(loaded.computed, torch.tensor([0.0, 1.0, 2.0, 3.0]).exp())
    assert loaded.saved.tolist() == [0, 1, 2]


def test_stored_weights_are_contiguous_whatever_the_module_runs_in(tmp_path):
    class Conv(Configurable):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.conv.to(memory_format=torch.channels_last)
            self.register_buffer("slice", torch.arange(10)[2:5])

    module = Conv()
    assert not module.conv.weight.is_contiguous()
    weights = collect_weights(module)
    assert all(tensor.is_contiguous() for tensor in weights.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in weights.values())
    assert torch.equal(weights["conv.weight"], module.conv.weight) and weights["slice"].tolist() == [2, 3, 4]
