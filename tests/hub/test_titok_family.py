"""Released checkpoints of the TiTok family give the numbers of the original implementations.

The fixtures were computed with the originals at small sizes; see ``test_published.py``.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok import ContinuousTiTok, OneDPiece, TATiTok, TiTok, TwoStageTiTok
from vistok.hub.published import load_published

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).resolve().parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FAMILY = {
    "titok-stage1": TwoStageTiTok,
    "titok-twostage": TwoStageTiTok,
    "titok-singlestage-vq": TiTok,
    "titok-singlestage-vae": ContinuousTiTok,
    "tatitok-vq": TATiTok,
    "onedpiece": OneDPiece,
}
DISCRETE = [name for name in FAMILY if name != "titok-singlestage-vae"]
DECODING = [name for name in DISCRETE if name != "titok-stage1"]


def opened(name):
    _, _, io = parity.fixture(name)
    return vistok.load(parity.FOLDER / name), io


def sequence(x):
    """``(B, C, h, w)`` -> ``(B, h * w, C)``."""
    return parity.channel_last(x).flatten(1, 2)


def copy(name, tmp_path, change=None, **model):
    """A fixture's folder, with weights and entries of ``model.vq_model`` changed."""
    parity.fixture(name)
    folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(parity.FOLDER / name, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vq_model"] |= model
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(parity.FOLDER / name / "model.safetensors")
    if change is not None:
        change(state)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", FAMILY)
def test_the_config_tells_the_form(name):
    tokenizer, io = opened(name)
    assert type(tokenizer) is FAMILY[name] and not tokenizer.training
    assert tokenizer.takes_context == ("text_guidance" in io)
    assert tokenizer.variable_length == (name == "onedpiece")


@pytest.mark.parametrize("name", DISCRETE)
@torch.no_grad()
def test_tokens_are_exact(name):
    tokenizer, io = opened(name)
    parity.assert_close(tokenizer.latents(io["image"]), sequence(io["latents"]))
    tokens = tokenizer.encode(io["image"])
    assert torch.equal(tokens.indices["image"].flatten(), io["indices"].flatten())
    parity.assert_close(tokenizer.quantizer.decode(tokens.indices["image"]), sequence(io["quantized"]))


@pytest.mark.parametrize("name", DISCRETE)
@torch.no_grad()
def test_tokens_of_the_transformers_agree(name):
    """Latent tokens before the encoder's last layer, and patch tokens before the decoder's head."""
    tokenizer, io = opened(name)
    seen = {}
    for side, part in (("enc", tokenizer.encoder), ("dec", tokenizer.decoder)):
        part.norm_out.register_forward_hook(lambda m, args, output, side=side: seen.update({side: output}))
    output = tokenizer.bottleneck(io["image"])
    tokenizer.decoder.patch_features(output.quantized, context=io.get("text_guidance"))
    parity.assert_close(seen["enc"], io["enc_tokens"])
    parity.assert_close(seen["dec"], io["dec_tokens"])


@pytest.mark.parametrize("name", DECODING)
@torch.no_grad()
def test_reconstructions_agree(name):
    tokenizer, io = opened(name)
    tokens, text = tokenizer.encode(io["image"]), io.get("text_guidance")
    decoded = tokenizer.decode(tokens, clamp=False, context=text)
    assert (decoded - io["reconstruction"]).abs().max() < 1e-4
    assert torch.equal(tokenizer(io["image"], context=text).decoded, decoded)


@pytest.mark.parametrize("name", ["titok-stage1", "titok-twostage", "onedpiece"])
@torch.no_grad()
def test_proxy_codes_agree(name):
    tokenizer, io = opened(name)
    logits = tokenizer.decoder.logits(sequence(io["quantized"]))
    parity.assert_close(logits, sequence(io["logits" if name == "titok-stage1" else "proxy_logits"]))
    if name != "titok-stage1":
        parity.assert_close(tokenizer.decoder.mixture(logits), sequence(io["soft_quantized"]))


@pytest.mark.parametrize("length", ["1", "3", "half"])
def test_one_d_piece_agrees_at_every_length(length):
    tokenizer, io = opened("onedpiece")
    tokens = tokenizer.encode(io["image"])
    number = 8 if length == "half" else int(length)
    expected = io[f"reconstruction_len_{length}"]
    assert (tokenizer.decode(tokens.truncate(number), clamp=False) - expected).abs().max() < 1e-4
    keep = (torch.arange(16) < number).expand(2, -1)
    marked = vistok.Tokens(tokens.indices, tokens.layout, {"image": keep})
    assert (tokenizer.decode(marked, clamp=False) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_the_continuous_form_agrees():
    tokenizer, io = opened("titok-singlestage-vae")
    posterior = tokenizer.posterior(io["image"])
    for name in ("mean", "logvar", "std"):
        parity.assert_close(getattr(posterior, name), sequence(io[name]))
    parity.assert_close(posterior.kl(), io["kl"])
    parity.assert_close(posterior.mean + posterior.std * sequence(io["noise"]), sequence(io["sample"]))
    output = tokenizer(io["image"])
    assert (output.decoded - io["reconstruction"]).abs().max() < 1e-4
    parity.assert_close(output.losses["kl"], io["kl"].sum() / 2)


@pytest.mark.parametrize("name", FAMILY)
def test_it_can_be_saved_as_our_own(name, tmp_path):
    tokenizer, io = opened(name)
    again = vistok.load(vistok.save(tokenizer, tmp_path / "export"))
    assert again.config == tokenizer.config
    own, other = tokenizer.state_dict(), again.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("name", FAMILY)
def test_key_maps_are_strict_in_both_directions(name, tmp_path):
    with pytest.raises(ValueError, match="not used: decoder.something"):
        load_published(copy(name, tmp_path, lambda state: state.update({"decoder.something": torch.zeros(1)})))
    published = load_file(parity.FOLDER / name / "model.safetensors") if parity.FOLDER.is_dir() else {}
    for key in list(published)[:: max(1, len(published) // 12)]:
        with pytest.raises(ValueError, match="missing: |there is no |do not match"):
            load_published(copy(name, tmp_path, lambda state, key=key: state.pop(key)))


def test_usage_of_codes_belongs_to_training_only(tmp_path):
    extra = {"quantize.embed_prob": torch.zeros(128)}
    assert isinstance(load_published(copy("tatitok-vq", tmp_path, lambda state: state.update(extra))), TATiTok)


def test_one_d_piece_is_known_by_its_relaxed_length_too(tmp_path):
    folder = copy("onedpiece", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model"].pop("type")
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(load_published(folder), OneDPiece)
    config["model"]["vq_model"].pop("strict_length_assertion")
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load_published(folder)) is TwoStageTiTok


def test_switches_that_no_model_combines_are_named(tmp_path):
    def load(name, **model):
        return load_published(copy(name, tmp_path, **model))

    with pytest.raises(ValueError, match="quantize_mode must be 'vq' or 'vae'; got 'rvq'"):
        load("titok-singlestage-vq", quantize_mode="rvq")
    with pytest.raises(ValueError, match="'vae' goes with is_legacy: false"):
        load("titok-singlestage-vae", is_legacy=True)
    with pytest.raises(ValueError, match="finetune_decoder: true goes with is_legacy: true"):
        load("titok-singlestage-vq", finetune_decoder=True)
    with pytest.raises(ValueError, match="one patch size; got 16 and 8"):
        load("titok-singlestage-vq", vit_dec_patch_size=8)
    with pytest.raises(ValueError, match="no MaskGIT decoder under 'pixel_decoder.'"):
        load("titok-stage1", finetune_decoder=True)
    with pytest.raises(ValueError, match="not used: decoder.pixel_decoder|not used: decoder.codebook"):
        load("titok-twostage", finetune_decoder=False)
    with pytest.raises(ValueError, match="there is no decoder.ffn.2.weight"):
        load("titok-singlestage-vq", is_legacy=True)


def test_other_weights_and_incomplete_configs_are_named(tmp_path):
    folder = copy("titok-singlestage-vq", tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no weights of the TiTok family.*there is no encoder.class_embedding"):
        load_published(folder)
    (folder / "config.json").write_text(json.dumps({"model": {"vq_model": {"num_latent_tokens": 4}}}))
    with pytest.raises(ValueError, match="must name .*; token_size, vit_enc_model_size"):
        load_published(folder)


@pytest.mark.parametrize("name", ["titok-twostage", "titok-singlestage-vae"])
def test_heads_are_published_or_given(name, tmp_path):
    folder = copy(name, tmp_path)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"encoder has width 48, .* encoder_size=\(48, 2, heads\)"):
        load_published(folder)
    heads = (3, 3) if name == "titok-twostage" else (4, 4)
    widths = (48, 48) if name == "titok-twostage" else (48, 64)
    sizes = [(width, 2, number) for width, number in zip(widths, heads, strict=True)]
    tokenizer, io = (
        load_published(folder, encoder_size=sizes[0], decoder_size=sizes[1]),
        load_file(folder / "io.safetensors"),
    )
    assert (tokenizer(io["image"]).decoded - io["reconstruction"]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="take the overrides"):
        load_published(folder, heads=3)
