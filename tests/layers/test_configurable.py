"""Modules remember how they were built, and only our own classes are ever built from a config."""

import inspect
import json
import sys

import pytest
import torch

from vistok import TiTok, VectorQuantizer
from vistok.layers.configurable import build, resolve_class


def titok():
    return TiTok(
        VectorQuantizer(32, 4),
        image_size=(16, 32),
        patch_size=8,
        num_latent_tokens=3,
        encoder_size=(32, 1, 2),
        decoder_size=(32, 1, 2),
    )


def test_config_is_json_and_builds_the_same_architecture():
    tokenizer = titok()
    again = build(json.loads(json.dumps(tokenizer.config)))
    assert again.config == tokenizer.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in tokenizer.state_dict().items()
    }


def test_config_writes_defaults_out():
    written = VectorQuantizer(32, 4).config["init_args"]
    assert {key: written[key] for key in ("codebook_size", "dim", "l2_normalize", "restart_after")} == {
        "codebook_size": 32,
        "dim": 4,
        "l2_normalize": False,
        "restart_after": None,
    }
    assert list(written) == list(inspect.signature(VectorQuantizer).parameters)


def test_config_names_the_outermost_class():
    assert titok().config["class_path"] == "vistok.tokenizers.titok.TiTok"


def test_arguments_that_are_not_data_are_refused():
    with pytest.raises(TypeError, match="device"):
        VectorQuantizer(codebook_size=torch.device("cpu"), dim=4)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "vistok.training.cli.TokenizerCLI",
        "vistok.tokenizers.titok.LatentViTEncoder",
        "vistok.tokenizers.base.Any",
        "vistok.tokenizers.base.torch.load",
        "vistok.tokenizers..os.system",
        "quantizers.vq.VectorQuantizer",
        "vistok.quantizers.no_such_file.VectorQuantizer",
        "vistok.quantizers.vq.NoSuchClass",
        None,
        7,
    ],
)
def test_foreign_class_paths_are_refused(path):
    with pytest.raises(ValueError, match="class_path"):
        build({"class_path": path, "init_args": {}})


def test_a_foreign_module_is_not_even_imported():
    with pytest.raises(ValueError):
        resolve_class("antigravity.anything.Class")
    assert "antigravity" not in sys.modules


def test_unknown_arguments_are_named():
    with pytest.raises(ValueError, match="codebook_sise"):
        build({"class_path": "vistok.quantizers.vq.VectorQuantizer", "init_args": {"codebook_sise": 8, "dim": 2}})
