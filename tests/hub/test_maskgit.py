"""The released MaskGIT VQGAN loads, and its decoder out of other checkpoints, with the numbers of the originals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok.decoders.maskgit import MaskGITDecoder
from vistok.hub.maskgit import decoder_arguments, decoder_rules, recognise
from vistok.hub.published import load_published
from vistok.hub.renaming import rename
from vistok.quantizers.vq import VectorQuantizer
from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN

ROOT = Path(os.environ.get("VISTOK_PARITY", Path(__file__).resolve().parents[2] / ".." / "shared" / "parity"))


def folder(name):
    if not (ROOT / name).is_dir():
        pytest.skip(f"no fixtures in {ROOT} (set VISTOK_PARITY)")
    return ROOT / name


def rows(x):
    """``(B, C, h, w)`` -> ``(B, h * w, C)``."""
    return x.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_tokens_are_exact_and_reconstructions_agree():
    path = folder("maskgit-vqgan")
    tokenizer, io = vistok.load(path), load_file(path / "io.safetensors")
    assert not tokenizer.training and tokenizer.image_size == (64, 64)
    tokens = tokenizer.encode(io["image"])
    assert torch.equal(tokens.indices["image"].flatten(), io["indices"].flatten())
    assert tokens.layout[0].grid == (4, 4)
    assert (tokenizer.latents(io["image"]) - rows(io["latents"])).abs().max() < 2e-5
    assert (tokenizer.decode(tokens) - io["reconstruction"]).abs().max() < 2e-5
    assert (tokenizer.decode(tokens, clamp=False) - io["reconstruction_unclamped"]).abs().max() < 2e-5
    assert (tokenizer(io["image"]).decoded - io["reconstruction_unclamped"]).abs().max() < 2e-5


@torch.no_grad()
def test_a_fine_tuned_decoder_is_found_under_its_prefix():
    path = folder("titok-twostage")
    state, io = load_file(path / "model.safetensors"), load_file(path / "io.safetensors")
    arguments = decoder_arguments(state, "pixel_decoder.")
    assert arguments["channel_multipliers"] == [1, 1, 1, 2, 1] and arguments["shortcut_of"] == "output"
    renamed = rename(state, decoder_rules("pixel_decoder.", "decoder.pixel_decoder."))
    ours = "decoder.pixel_decoder."
    untouched = {name for name in state if not name.startswith("pixel_decoder.")}
    assert {name for name in renamed if not name.startswith(ours)} == untouched
    decoder = MaskGITDecoder(**arguments)
    decoder.load_state_dict({name.removeprefix(ours): renamed[name] for name in renamed if name.startswith(ours)})
    images = decoder(rows(io["soft_quantized"]), (4, 4))
    assert (images - io["reconstruction"]).abs().max() < 3e-5


def test_key_maps_are_strict_in_both_directions(tmp_path):
    path = folder("maskgit-vqgan")
    state = load_file(path / "model.safetensors")

    def load(change):
        copy = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(path, copy)
        changed = dict(state)
        change(changed)
        save_file(changed, copy / "model.safetensors")
        return load_published(copy)

    load(lambda state: None)
    with pytest.raises(ValueError, match="not used: encoder.surplus"):
        load(lambda state: state.update({"encoder.surplus": torch.zeros(1)}))
    with pytest.raises(ValueError, match="missing: encoder.levels.4.blocks.0.shortcut.weight"):
        load(lambda state: state.pop("encoder.down.4.block.0.nin_shortcut.weight"))
    with pytest.raises(ValueError, match="missing: decoder.levels.1.resample.conv.bias"):
        load(lambda state: state.pop("decoder.up.3.upsample_conv.bias"))
    with pytest.raises(ValueError, match="no decoder.conv_out.weight"):
        load(lambda state: state.pop("decoder.conv_out.weight"))
    with pytest.raises(ValueError, match="no quantize.embedding.weight"):
        load(lambda state: state.pop("quantize.embedding.weight"))


def published_names(tokenizer):
    """The state of one of our tokenizers as its authors would have written it."""
    last, state = len(tokenizer.decoder.levels) - 1, {}
    for name, tensor in tokenizer.state_dict().items():
        parts = name.split(".")
        if name == "quantizer.codebook":
            parts = ["quantize", "embedding", "weight"]
        elif parts[1] == "middle":
            parts[1:3] = ["mid"]
        elif parts[1] == "levels":
            level = int(parts[2]) if parts[0] == "encoder" else last - int(parts[2])
            parts[1:3] = ["down" if parts[0] == "encoder" else "up", str(level)]
            parts = ["block" if part == "blocks" else part for part in parts]
            if "resample" in parts:
                parts[3:5] = ["upsample_conv"]
        parts = ["nin_shortcut" if part == "shortcut" else part for part in parts]
        state[".".join(parts)] = tensor.contiguous()
    return state


@pytest.mark.parametrize("shortcut_of", ["input", "output"])
@pytest.mark.parametrize("multipliers", [(1, 2, 1), (1, 1, 2, 2, 4)])
def test_sizes_and_shortcut_are_read_off_the_weights(shortcut_of, multipliers, tmp_path):
    torch.manual_seed(0)
    arguments = {"channels": 32, "channel_multipliers": multipliers, "num_blocks": 2, "shortcut_of": shortcut_of}
    tokenizer = MaskGITVQGAN(VectorQuantizer(16, 8), 32, latent_channels=8, **arguments).eval()
    torch.save(published_names(tokenizer), tmp_path / "pytorch_model.bin")
    config = {"hidden_channels": 32, "num_res_blocks": 2, "num_embeddings": 16, "z_channels": 8, "resolution": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, x = vistok.load(tmp_path), torch.rand(1, 3, 32, 32)
    assert again.config["init_args"] == tokenizer.config["init_args"]
    assert torch.equal(again.decode(again.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert vistok.load(tmp_path, image_size=48).image_size == (48, 48)
    with pytest.raises(ValueError, match=r"take the overrides \['image_size'\]"):
        vistok.load(tmp_path, channels=64)


def test_only_its_own_config_is_recognised():
    for name in ("titok-twostage", "llamagen-vq16", "taming-vqgan-f16"):
        assert not recognise(json.loads((folder(name) / "config.json").read_text()))
    assert recognise(json.loads((folder("maskgit-vqgan") / "config.json").read_text()))


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="no MaskGIT decoder under 'pixel_decoder.'"):
        decoder_arguments({"decoder.conv_in.weight": torch.zeros(1)}, "pixel_decoder.")
