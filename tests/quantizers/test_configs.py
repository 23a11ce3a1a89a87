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
STEPS = 60


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


@pytest.mark.parametrize("make", [titok, vqgan])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_example_trains(config, make, images):
    torch.manual_seed(0)
    model = make(build(yaml.safe_load(config.read_text())))
    objective = ReconstructionObjective(l1=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    history = []
    for step in range(STEPS):
        batch = images[torch.randint(len(images), (8,))]
        result = objective(model, batch, step)
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.commit_update()
        history.append(float(result.terms["pixel"]))
    assert sum(history[-5:]) < 0.75 * sum(history[:5])
    assert tokens_alive(model, images) > 0.05


@torch.no_grad()
def tokens_alive(model, images):
    """Smallest over streams and sub-codes of: different codes in these images / as many as there could be."""
    tokens = model.eval().encode(images)
    shares = []
    for stream in tokens.layout:
        for subcode, size in enumerate(stream.codebook_sizes):
            ids = tokens.indices[stream.name][..., subcode]
            shares.append(len(ids.unique()) / min(size, ids.numel()))
    return min(shares)
