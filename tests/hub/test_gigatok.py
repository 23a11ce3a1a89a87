"""Released checkpoints of GigaTok give the numbers of the original implementation.

The fixtures were computed with the original at small sizes; the published sizes are checked by layout alone.
"""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok import GigaTok, GigaTok2D
from vistok.hub.catalog import CATALOG, find
from vistok.hub.load import load_with_source
from vistok.hub.published import FAMILIES, load_published

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).resolve().parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

FORMS = {"gigatok-1d": GigaTok, "gigatok-2d": GigaTok2D}
NAMES = list(FORMS)
SIZES = {"small": (512, 6), "base": (768, 12), "large": (1024, 24), "xl": (1280, 36), "xxl": (1536, 48)}


def opened(name):
    """Tokenizer, tensors, and the image in [0, 1]."""
    _, _, io = parity.fixture(name)
    return vistok.load(parity.FOLDER / name), io, (io["image"] + 1) / 2


def sequence(x):
    """``(B, C, h, w)`` -> ``(B, h * w, C)``."""
    return parity.channel_last(x).flatten(1, 2)


def copy(name, tmp_path, change=None, **arguments):
    """A fixture's folder, with weights and entries of ``model.init_args`` changed."""
    parity.fixture(name)
    folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(parity.FOLDER / name, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["init_args"] |= arguments
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(parity.FOLDER / name / "model.safetensors")
    if change is not None:
        change(state)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_config_tells_the_form(name):
    tokenizer, _, _ = opened(name)
    assert type(tokenizer) is FORMS[name] and not tokenizer.training
    assert tokenizer.image_size == (32, 32) and tokenizer.pixel_range == (-1.0, 1.0)
    (stream,) = tokenizer.layout()
    assert (stream.length, stream.codebook_sizes) == (256, (64,))
    assert stream.grid == (None if name == "gigatok-1d" else (16, 16))
    assert tokenizer.quantizer.estimator == "rotation" and tokenizer.quantizer.l2_normalize


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_are_exact(name):
    tokenizer, io, images = opened(name)
    parity.assert_close(tokenizer.latents(images), sequence(io["latents"]))
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens.indices["image"].flatten(), io["indices"])
    ids = tokens.indices["image"]
    parity.assert_close(tokenizer.quantizer.decode(ids), sequence(io["codebook_entry"]))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_reconstructions_agree(name):
    tokenizer, io, images = opened(name)
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens, clamp=False)
    assert (2 * decoded - 1 - io["reconstruction"]).abs().max() < 1e-4
    parity.assert_close(2 * decoded - 1, io["reconstruction"])
    assert torch.equal(tokenizer(images).decoded, decoded)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_stage_agrees(name):
    """From the features of the CNN to those for the CNN; the layer that is aligned with a teacher is the third."""
    tokenizer, io, images = opened(name)
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    blocks = decoder.blocks if name == "gigatok-1d" else decoder.vit.blocks
    norm = encoder.norm_out if name == "gigatok-1d" else encoder.vit.norm_out
    parts = {"spatial": encoder.grid_encoder, "vit_enc_out": encoder, "inner_feat": blocks[1], "feat": norm}
    parts |= {"rec_spatial": decoder.out} | ({"query_init": encoder.to_queries} if name == "gigatok-1d" else {})
    seen = {}
    for key, part in parts.items():
        part.register_forward_hook(lambda m, args, output, key=key: seen.update({key: output}))
    tokenizer(images)
    parity.assert_close(seen["spatial"], sequence(io["spatial"]))
    parity.assert_close(seen["vit_enc_out"], sequence(io["vit_enc_out"]))
    parity.assert_close(decoder.patch_tokens(seen["inner_feat"]), io["inner_feat"])
    parity.assert_close(seen["rec_spatial"], io["rec_spatial"])
    if name == "gigatok-1d":
        parity.assert_close(seen["query_init"], io["query_init"])
        parity.assert_close(seen["feat"], sequence(io["encoder_feat"]))


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_saved_as_our_own(name, tmp_path):
    tokenizer, _, images = opened(name)
    again = vistok.load(vistok.save(tokenizer, tmp_path / "export"))
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(images).indices["image"], tokenizer.encode(images).indices["image"])


@pytest.mark.parametrize("name", NAMES)
def test_key_maps_are_strict_in_both_directions(name, tmp_path):
    with pytest.raises(ValueError, match="not used: decoder.grid_decoder.something"):
        load_published(copy(name, tmp_path, lambda state: state.update({"decoder.something": torch.zeros(1)})))
    published = load_file(parity.FOLDER / name / "model.safetensors") if parity.FOLDER.is_dir() else {}
    needed = [key for key in published if ".distill_mlp." not in key and not key.endswith("codebook_used")]
    assert len(published) - len(needed) == (7 if name == "gigatok-1d" else 6)
    for key in needed[:: max(1, len(needed) // 12)]:
        with pytest.raises(ValueError, match="missing: |there is no |do not match|give .*_size="):
            load_published(copy(name, tmp_path, lambda state, key=key: state.pop(key)))


def test_what_belongs_to_training_may_be_absent(tmp_path):
    def strip(state):
        for key in [key for key in state if ".distill_mlp." in key or key.endswith("codebook_used")]:
            del state[key]

    tokenizer, io, images = load_published(copy("gigatok-1d", tmp_path, strip)), *opened("gigatok-1d")[1:]
    assert torch.equal(tokenizer.encode(images).indices["image"].flatten(), io["indices"])


def test_rotation_and_entropy_follow_the_config(tmp_path):
    quantizer = load_published(copy("gigatok-1d", tmp_path, rot=False, entropy_loss_ratio=0.005)).quantizer
    assert quantizer.estimator == "straight_through" and quantizer.default_loss_weights["entropy"] == 0.005
    assert (quantizer.entropy_temperature, quantizer.entropy_eps) == (0.01, 1e-5)
    assert load_published(copy("gigatok-1d", tmp_path)).quantizer.entropy_temperature is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_attn": True}, "use_attn must be False as in all published GigaTok models; got True"),
        ({"adaptive_gn": False}, "adaptive_gn must be True"),
        ({"last_level_2d_query_init": True}, "last_level_2d_query_init must be False"),
        ({"decoder_ch_mult": [1, 1]}, r"must be equal .* got \[2, 1\] and \[1, 1\]"),
        ({"transformer_layer_type": "Mamba"}, "transformer_layer_type must be one of .*; got 'Mamba'"),
        ({"z_channels": 64}, "do not match"),
    ],
)
def test_switches_that_no_model_has_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_published(copy("gigatok-1d", tmp_path, **change))


def test_dynamic_length_is_refused(tmp_path):
    folder = copy("gigatok-1d", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["causal_settings"]["causal_type"] = "per-token"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="causal_type must be None .*; got 'per-token'"):
        load_published(folder)


def test_other_weights_are_named(tmp_path):
    folder = copy("gigatok-1d", tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no weights of GigaTok.*there is no encoder.conv_in.weight"):
        load_published(folder)


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_published_or_given(name, tmp_path):
    folder = copy(name, tmp_path)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"'small' of GigaTok is \(512, 6, 8\).*width 48.*=\(48, 2, heads\)"):
        load_published(folder)
    sizes = {"encoder_size": (48, 2, 4), "decoder_size": (48, 3, 3) if name == "gigatok-1d" else (56, 3, 2)}
    tokenizer, (_, io, images) = load_published(folder, **sizes), opened(name)
    assert torch.equal(tokenizer.encode(images).indices["image"].flatten(), io["indices"])
    with pytest.raises(ValueError, match="take the overrides"):
        load_published(folder, heads=3)


# ---- the published sizes


def linear(name, inside, outside, kernel=()):
    return {f"{name}.weight": (outside, inside, *kernel), f"{name}.bias": (outside,)}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def residual(name, inside, outside):
    shapes = norm(f"{name}.norm1", inside) | norm(f"{name}.norm2", outside)
    shapes |= linear(f"{name}.conv1", inside, outside, (3, 3)) | linear(f"{name}.conv2", outside, outside, (3, 3))
    return shapes | (linear(f"{name}.nin_shortcut", inside, outside, (1, 1)) if inside != outside else {})


def cnns():
    """Both CNNs; widths 128, 128, 256, 256, 512 from full resolution down."""
    shapes = linear("encoder.conv_in", 3, 128, (3, 3)) | linear("encoder.conv_out", 512, 256, (3, 3))
    shapes |= linear("decoder.conv_in", 256, 512, (3, 3)) | linear("decoder.conv_out", 128, 3, (3, 3))
    shapes |= norm("encoder.norm_out", 512) | norm("decoder.norm_out", 128)
    for side in ("encoder", "decoder"):
        for i in range(2):
            shapes |= residual(f"{side}.mid.{i}", 512, 512)
    inside = 128
    for level, outside in enumerate((128, 128, 256, 256, 512)):
        for block in range(2):
            shapes |= residual(f"encoder.conv_blocks.{level}.res.{block}", inside, outside)
            inside = outside
        if level < 4:
            shapes |= linear(f"encoder.conv_blocks.{level}.downsample.conv", outside, outside, (3, 3))
    for level, outside in enumerate((512, 256, 256, 128, 128)):
        shapes |= linear(f"decoder.adaptive.{level}.gamma", 256, inside)
        shapes |= linear(f"decoder.adaptive.{level}.beta", 256, inside)
        for block in range(3):
            shapes |= residual(f"decoder.conv_blocks.{level}.res.{block}", inside, outside)
            inside = outside
        if level < 4:
            shapes |= linear(f"decoder.conv_blocks.{level}.upsample.conv1", outside, 4 * outside, (3, 3))
    return shapes


def q_former(prefix, side, size, kernel):
    width, layers = SIZES[size]
    shapes = {f"{prefix}.{kind}positional_embedding": (256, 1, width) for kind in ("", "latent_token_")}
    shapes |= linear(f"{prefix}.{side}_embed", 256, width) | norm(f"{prefix}.ln_pre", 256)
    shapes |= norm(f"{prefix}.ln_post", width) | linear(f"{prefix}.conv_out", width, 256, kernel)
    for layer in range(layers):
        stem = f"{prefix}.transformer.{layer}"
        for attention in ("self_attn", "multihead_attn"):
            shapes |= {f"{stem}.{attention}.in_proj_weight": (3 * width, width)}
            shapes |= {f"{stem}.{attention}.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{stem}.{attention}.out_proj", width, width)
        shapes |= linear(f"{stem}.linear1", width, 4 * width) | linear(f"{stem}.linear2", 4 * width, width)
        for i in (1, 2, 3):
            shapes |= norm(f"{stem}.norm{i}", width)
    return shapes


def released(model):
    """Names and shapes of a released checkpoint."""
    sizes = model.config["model"]["init_args"]
    width, wide = SIZES[sizes["encoder_size"]][0], SIZES[sizes["decoder_size"]][0]
    shapes = cnns() | q_former("s2to1encoder", "encoder", sizes["encoder_size"], (1, 1))
    shapes |= linear("s2to1encoder.global_proj", width, width)
    shapes |= q_former("s1to2decoder", "decoder", sizes["decoder_size"], (3, 3))
    for place, (inside, outside) in enumerate(((wide, 4 * wide), (4 * wide, 4 * wide), (4 * wide, 768))):
        shapes |= linear(f"s1to2decoder.distill_mlp.{2 * place}", inside, outside)
    shapes |= linear("quant_conv", 256, 8, (1, 1)) | linear("post_quant_conv", 8, 256, (1, 1))
    shapes |= {"quantize.embedding.weight": (16384, 8), "quantize.codebook_used": (65536,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "keys", "total"),
    [
        ("gigatok-s-s", 538, 136_073_227),
        ("gigatok-s-b", 646, 232_399_627),
        ("gigatok-b-l", 970, 621_637_131),
        ("gigatok-b-l-dino", 970, 621_637_131),
        ("gigatok-xl-xxl", 1834, 2_893_970_443),
    ],
)
def test_a_published_size_reads_its_layout(name, keys, total):
    model = find(name)
    state = released(model)
    assert len(state) == keys
    assert sum(tensor.numel() for name, tensor in state.items() if name != "quantize.codebook_used") == total
    with torch.device("meta"):
        tokenizer, renamed = FAMILIES[model.family].read(model.config, {}, state, {})
    own = {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}
    assert own == {name: tensor.shape for name, tensor in renamed.items()}
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == model.parameters
    assert tokenizer.image_size == (256, 256) and tokenizer.layout()[0].length == model.tokens
    assert (tokenizer.quantizer.entropy_temperature is not None) == (name == "gigatok-xl-xxl")


def test_the_2d_form_whose_layers_read_their_input_reads_its_layout():
    """Its weights were not released: config, counts and names are those of the training code's smallest 2D model."""
    shapes = cnns() | linear("quant_conv", 256, 8, (1, 1)) | linear("post_quant_conv", 8, 256, (1, 1))
    shapes |= q_former("s2dencoder", "encoder", "small", (1, 1)) | q_former("s2ddecoder", "decoder", "small", (3, 3))
    for place, (inside, outside) in enumerate(((512, 2048), (2048, 2048), (2048, 768))):
        shapes |= linear(f"s2ddecoder.distill_mlp.{2 * place}", inside, outside)
    shapes |= {"quantize.embedding.weight": (16384, 8), "quantize.codebook_used": (65536,)}
    shapes = {name: shape for name, shape in shapes.items() if "latent_token" not in name}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(state) == 534 and sum(tensor.numel() for tensor in state.values()) - 65536 == 135_548_427
    arguments = find("gigatok-s-s").config["model"]["init_args"]
    config = {"model": {"model_cls": "VQVitModel2DPlus", "init_args": arguments}}
    with torch.device("meta"):
        tokenizer, renamed = FAMILIES["GigaTok"].read(config, {}, state, {})
    assert {name: t.shape for name, t in tokenizer.state_dict().items()} == {n: t.shape for n, t in renamed.items()}
    assert tokenizer.layout()[0].grid == (16, 16) and tokenizer.encoder.vit.reads_input


def test_every_entry_is_checked_above():
    entries = {model.name for model in CATALOG if model.family == "GigaTok"}
    assert entries == {"gigatok-s-s", "gigatok-s-b", "gigatok-b-l", "gigatok-b-l-dino", "gigatok-xl-xxl"}


def test_a_training_checkpoint_is_read_from_a_local_file(tmp_path):
    """Averaged weights count where there are any; the rest of the file, with its command line, is ignored."""
    _, state, io = parity.fixture("gigatok-1d")
    content = {"ema": state, "model": {name: torch.zeros_like(tensor) for name, tensor in state.items()}}
    content |= {"optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "VQ_SB256_e200.pt")
    (tmp_path / "config.json").write_text((parity.FOLDER / "gigatok-1d" / "config.json").read_text())
    sizes = {"encoder_size": (48, 2, 4), "decoder_size": (48, 3, 3)}
    loaded = load_with_source(tmp_path / "VQ_SB256_e200.pt", **sizes)
    assert loaded.crop == "adm" and loaded.metadata["published_model"] == "gigatok-s-b"
    tokens = loaded.tokenizer.encode((io["image"] + 1) / 2)
    assert torch.equal(tokens.indices["image"].flatten(), io["indices"])


def test_a_name_says_where_to_get_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path))
    place = tmp_path / "downloads" / "VQ_BL256_e200.pt"
    with pytest.raises(FileNotFoundError, match=f"by hand: get VQ_BL256_e200.pt from https://drive.*put it at {place}"):
        vistok.load("gigatok-b-l")
