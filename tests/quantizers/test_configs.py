"""Every example in configs/quantizers trains inside a 1D and a 2D tokenizer: the loss falls, the codes stay alive."""

from pathlib import Path

import pytest
import torch
import yaml

from vistok import VQGAN, TiTok
from vistok.data.demo import DemoPhotographs
from vistok.layers.configurable import build
from vistok.training.objectives import ReconstructionObjective

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "quantizers").glob("*.yaml"))


# TiTok starts slowly: of its runs, these are in the default selection, the others run with -m slow.
QUICK = ("bernoulli", "fsq", "grouped", "lfq", "multi_scale_1d", "vq")


# As many tokens as configs/quickstart.yaml (32) and configs/tiny_imagenet_vqgan.yaml (8 x 8) have.
def titok(quantizer):
    return TiTok(quantizer, 16, 4, num_latent_tokens=32, encoder_size=(64, 1, 2), decoder_size=(64, 1, 2))


def vqgan(quantizer):
    return VQGAN(quantizer, 16, channels=32, channel_multipliers=(1, 1), num_blocks=1, latent_channels=32)


@pytest.fixture(scope="module")
def images():
    """48 crops of 16 x 16 pixels of the demo photographs, shrunk by 8."""
    source = DemoPhotographs()
    source.prepare()
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(48):
        photograph = torch.nn.functional.avg_pool2d(source.read(i % 8).image.float() / 255, 8)
        top, left = (int(torch.randint(side - 15, (), generator=generator)) for side in photograph.shape[1:])
        crops.append(photograph[:, top : top + 16, left : left + 16])
    return torch.stack(crops)


def cases():
    for config in CONFIGS:
        # A pyramid of maps needs a grid, a pyramid of sequences a sequence.
        makes = {"multi_scale": [vqgan], "multi_scale_1d": [titok]}.get(config.stem, [titok, vqgan])
        for make in makes:
            marks = [pytest.mark.slow] if make is titok and config.stem not in QUICK else []
            yield pytest.param(config, make, id=f"{config.stem}-{make.__name__}", marks=marks)


@pytest.mark.parametrize("config,make", list(cases()))
def test_example_trains(config, make, images):
    torch.manual_seed(0)
    model = make(build(yaml.safe_load(config.read_text())))
    steps, batch_size, lr = (300, 16, 1e-3) if make is titok else (100, 8, 3e-3)
    objective = ReconstructionObjective(l1=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    history = []
    for step in range(steps):
        result = objective(model, images[torch.randint(len(images), (batch_size,))], step)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.commit_update()
        history.append(result.terms["pixel"])
    # A decoder that ignores its tokens can do no better than one picture for all.
    with torch.no_grad():
        blind = objective.pixel(images.mean(0, keepdim=True).expand_as(images), images)
    assert torch.stack(history[-10:]).mean() < 0.95 * blind
    # A collapsed quantizer says the same of every image.
    assert different_sequences(model, images) >= 4


@torch.no_grad()
def different_sequences(model, images):
    """How many different sequences of tokens these images have."""
    tokens = model.eval().encode(images)
    return len(torch.cat([ids.flatten(1) for ids in tokens.indices.values()], 1).unique(dim=0))
