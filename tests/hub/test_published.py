"""Released checkpoints of other projects load and give the numbers of the original implementations.

The fixtures were computed with the originals at small sizes: ``config.json``, ``model.safetensors`` with the published
names, ``io.safetensors`` with inputs and expected outputs. They lie where ``VISTOK_PARITY`` says, by default in
``../shared/parity``; without them the parity tests have nothing to run on, and say so.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok import VectorQuantizer
from vistok.hub.published import load_published

ROOT = Path(os.environ.get("VISTOK_PARITY", Path(__file__).resolve().parents[2] / ".." / "shared" / "parity"))
TOKENIZERS = ("titok-singlestage-vq", "llamagen-vq16", "taming-vqgan-f16")
QUANTIZERS = ("losses-titok-vq-plain", "losses-titok-vq-l2", "losses-taming-vq")


def found(names):
    present = [name for name in names if (ROOT / name).is_dir()]
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"no fixtures in {ROOT} (set VISTOK_PARITY)"))
    return present or [missing]


def pixels(tokenizer, native):
    low, high = tokenizer.pixel_range
    return (native - low) / (high - low)


@pytest.mark.parametrize("name", found(TOKENIZERS))
def test_tokens_are_exact_and_reconstructions_agree(name):
    tokenizer, io = vistok.load(ROOT / name), load_file(ROOT / name / "io.safetensors")
    assert not tokenizer.training
    images = pixels(tokenizer, io["image"])
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens.indices["image"].flatten(), io["indices"].flatten())
    expected = pixels(tokenizer, io["reconstruction"])
    assert (tokenizer.decode(tokens, clamp=False) - expected).abs().max() < 1e-4
    assert (tokenizer(images).decoded - expected).abs().max() < 1e-4
    latents = io["latents"].flatten(2).transpose(1, 2)
    assert (tokenizer.latents(images) - latents).abs().max() < 1e-5 * max(1, latents.abs().max())


@pytest.mark.parametrize("name", found(TOKENIZERS))
def test_a_published_checkpoint_can_be_saved_as_our_own(name, tmp_path):
    tokenizer, io = vistok.load(ROOT / name), load_file(ROOT / name / "io.safetensors")
    tokenizer.save_pretrained(tmp_path / "export")
    images = pixels(tokenizer, io["image"])
    again = vistok.load(tmp_path / "export")
    assert again.config == tokenizer.config
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))


@pytest.mark.parametrize("name", found(TOKENIZERS))
def test_key_maps_are_strict_in_both_directions(name, tmp_path):
    state = load_file(ROOT / name / "model.safetensors")

    def load(change):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(ROOT / name, folder)
        changed = dict(state)
        change(changed)
        save_file(changed, folder / "model.safetensors")
        return load_published(folder)

    load(lambda state: None)
    with pytest.raises(ValueError, match="not used: encoder.surplus"):
        load(lambda state: state.update({"encoder.surplus": torch.zeros(1)}))
    with pytest.raises(ValueError, match="missing: decoder.conv_out.bias"):
        load(lambda state: state.pop("decoder.conv_out.bias"))
    with pytest.raises(ValueError, match=r"decoder.conv_out.bias: \(4,\) in the file, \(3,\) in the model"):
        load(lambda state: state.update({"decoder.conv_out.bias": torch.zeros(4)}))


@pytest.mark.parametrize("name", found(["taming-vqgan-f16"]))
def test_tensors_of_training_are_left_out(name, tmp_path):
    shutil.copytree(ROOT / name, tmp_path / "copy")
    state = load_file(ROOT / name / "model.safetensors") | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    (tmp_path / "copy" / "model.safetensors").unlink()
    torch.save({"state_dict": state}, tmp_path / "copy" / "model.ckpt")
    assert load_published(tmp_path / "copy").layout()[0].grid == (4, 4)


@pytest.mark.parametrize("name", found(["titok-singlestage-vq"]))
def test_titok_heads_are_published_or_given(name, tmp_path):
    shutil.copytree(ROOT / name, tmp_path / "copy")
    (tmp_path / "copy" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"decoder has width 48, .* decoder_size=\(48, 3, heads\)"):
        load_published(tmp_path / "copy")
    io = load_file(ROOT / name / "io.safetensors")
    tokenizer = vistok.load(tmp_path / "copy", encoder_size=(64, 2, 4), decoder_size=(48, 3, 2))
    assert torch.equal(tokenizer.encode(io["image"]).indices["image"].flatten(), io["indices"].flatten())
    with pytest.raises(ValueError, match="take the overrides"):
        vistok.load(tmp_path / "copy", heads=3)


def test_unknown_families_missing_weights_and_short_configs_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"anything": 1}))
    with pytest.raises(ValueError, match=r"known family .*TiTok.*anything"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"vq_model": {"num_latent_tokens": 32}}}))
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_published(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="vit_enc_model_size"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"params": {"ddconfig": {}}}}))
    with pytest.raises(ValueError, match="model.safetensors: config or weights lack what this family has: KeyError"):
        load_published(tmp_path)


@pytest.mark.parametrize("name", found(QUANTIZERS))
def test_vector_quantizer_losses_and_gradients_agree(name):
    config = json.loads((ROOT / name / "config.json").read_text())
    io, state = load_file(ROOT / name / "io.safetensors"), load_file(ROOT / name / "model.safetensors")
    codebook = state["embedding.weight"]
    quantizer = VectorQuantizer(*codebook.shape, l2_normalize=config.get("use_l2_norm", False))
    quantizer.load_state_dict({"codebook": codebook})
    beta = config.get("commitment_cost", config.get("beta"))

    def channels_first(x):
        return x.movedim(-1, 1)

    def run(weights):
        z = io["z"].clone().requires_grad_()
        quantizer.zero_grad()
        result = quantizer(z.movedim(1, -1))
        loss = sum(weights[key] * value for key, value in result.losses.items())
        loss.backward()
        return result, loss.detach(), z.grad, quantizer.codebook.grad.clone()

    def close(ours, theirs):
        return (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))

    if name == "losses-taming-vq":
        cases = {
            "loss_legacy": {"commitment": 1.0, "codebook": beta},
            "loss_fixed": {"commitment": beta, "codebook": 1},
        }
    else:
        cases = {"quantizer_loss": {"commitment": beta, "codebook": 1.0}}
    for key, weights in cases.items():
        result, loss, grad_z, grad_codebook = run(weights)
        assert torch.equal(result.indices.flatten(), io["indices"].flatten())
        assert close(channels_first(result.quantized), io["z_quantized"])
        assert close(loss, io[key])
        assert close(grad_z, io[f"grad_z_of_{key}"])
        assert close(grad_codebook, io[f"grad_codebook_of_{key}"])
    z = io["z"].clone().requires_grad_()
    (quantizer(z.movedim(1, -1)).quantized * io["grad_out"].movedim(1, -1)).sum().backward()
    assert close(z.grad, io["grad_z_of_output"])
