"""The published two-stage recipe, made small: predict proxy codes, then train the decoder through to pixels."""

import json

import pytest
import torch

import vistok
from vistok import MaskGITVQGAN, VectorQuantizer
from vistok.training.cli import main

TINY = ["--model.tokenizer.image_size=32", "--model.tokenizer.num_latent_tokens=4"]
TINY += ["--model.tokenizer.encoder_size=[32,1,2]", "--model.tokenizer.decoder_size=[32,1,2]"]
TINY += ["--model.tokenizer.num_proxy_codes=16", "--model.tokenizer.quantizer.codebook_size=32"]
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]
HERE += ["--trainer.max_steps=3", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
HERE += ["--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=null"]
DATA = ["--data.train=vistok.data.demo.DemoPhotographs", "--data.train.num_samples=12", "--data.batch_size=4"]
DATA += ["--data.val=vistok.data.demo.DemoPhotographs", "--data.val.num_samples=4", "--data.num_workers=0"]


def proxy(folder):
    torch.manual_seed(0)
    tokenizer = MaskGITVQGAN(VectorQuantizer(16, 32), 32, 32, (1, 1, 1, 1, 1), num_blocks=1, latent_channels=32)
    return str(tokenizer.save_pretrained(folder))


@pytest.mark.parametrize("family", ["titok/s128", "one_d_piece/s256"])
def test_a_two_stage_recipe_runs_from_proxy_codes_to_pixels(family, tmp_path, capsys):
    teacher = proxy(tmp_path / "proxy")
    common = [*TINY, *HERE, *DATA]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    main(
        ["fit", "--config", f"configs/{family}_stage1.yaml", *common, "--trainer.default_root_dir", first]
        + [f"--model.objective.teacher={teacher}"]
    )
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert {"val/cross_entropy", "val/accuracy", "val/psnr"} <= set(metrics) and metrics["step"] == 3
    assert list((tmp_path / "first" / "images").glob("*.png"))
    said = capsys.readouterr().out
    assert "vistok encode" in said and "vistok decode" not in said and "next stage" in said
    stage1 = vistok.load(first)

    sources = [
        {"source": first, "parts": {part: part for part in ("encoder", "quantizer", "decoder")}},
        {"source": teacher, "parts": {"decoder.codebook": "quantizer.codebook", "decoder.pixel_decoder": "decoder"}},
    ]
    pixels = {"channels": 32, "channel_multipliers": [1, 1, 1, 1, 1], "num_blocks": 1, "in_dim": 32}
    main(
        ["fit", "--config", f"configs/{family}_stage2.yaml", *common, "--trainer.default_root_dir", second]
        + ["--model.objective.perceptual=null", "--model.objective.adversarial.start_step=1"]
        + ["--model.objective.adversarial.discriminator.channels=32"]
        + ["--model.objective.adversarial.discriminator.num_stages=1", f"--model.initialize={json.dumps(sources)}"]
        + [f"--model.tokenizer.pixel_decoder.{key}={json.dumps(value)}" for key, value in pixels.items()]
    )
    stage2, before = vistok.load(second), stage1.state_dict()
    for part, value in stage2.state_dict().items():
        if part.startswith(("encoder.", "quantizer.")):
            assert torch.equal(value, before[part]), part
    moved = (stage2.decoder.embed.weight - before["decoder.embed.weight"]).abs().max()
    assert 0 < moved < 1e-2  # it started from stage 1 and trained on
    images = torch.rand(2, 3, 32, 32)
    tokens = stage2.encode(images)
    assert torch.equal(tokens.indices["image"], stage1.encode(images).indices["image"])
    assert stage2.decode(tokens).shape == images.shape
    if stage2.variable_length:
        assert stage2.decode(tokens.truncate(1)).shape == images.shape
    assert "vistok decode" in capsys.readouterr().out
