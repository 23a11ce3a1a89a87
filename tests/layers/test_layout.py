"""Convolutional networks run in the layout of their device: contiguous here, channels-last on an accelerator."""

import pytest
import torch
from torch import nn

import vistok
from vistok import VQGAN, MaskGITVQGAN, TwoStageTiTok, VectorQuantizer
from vistok.decoders.maskgit import MaskGITDecoder
from vistok.layers import layout

FORMATS = (torch.contiguous_format, torch.channels_last)


def two_stage():
    pixels = MaskGITDecoder(32, (1, 1), 1, in_dim=8)
    quantizer = VectorQuantizer(16, 4)
    return TwoStageTiTok(quantizer, 16, 2, 4, (32, 1, 2), (32, 1, 2), num_proxy_codes=8, pixel_decoder=pixels)


MAKE = {
    "vqgan": lambda: VQGAN(VectorQuantizer(16, 4), 16, 32, (1, 1), 1, latent_channels=32),
    "maskgit": lambda: MaskGITVQGAN(VectorQuantizer(16, 4), 16, 32, (1, 1), 1, latent_channels=32),
    "two_stage": two_stage,
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_weights_and_activations_follow_the_layout_of_the_device(name, memory_format, monkeypatch, tmp_path):
    torch.manual_seed(0)
    tokenizer, images = MAKE[name]().eval(), torch.rand(2, 3, 16, 16)
    expected = tokenizer(images).decoded
    vistok.save(tokenizer, tmp_path / "export")
    monkeypatch.setattr(layout, "device_layout", lambda device: memory_format)
    for model in (tokenizer.to("cpu"), vistok.load(tmp_path / "export").to("cpu")):
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert convolutions
        assert all(m.weight.is_contiguous(memory_format=memory_format) for m in convolutions)
        outputs = []
        for m in convolutions:
            m.register_forward_hook(lambda module, inputs, output, to=outputs: to.append(output))
        torch.testing.assert_close(model(images).decoded, expected, rtol=0, atol=1e-4)
        assert outputs and all(output.is_contiguous(memory_format=memory_format) for output in outputs)


def test_cpu_and_meta_are_contiguous_and_accelerators_channels_last():
    devices = {name: layout.device_layout(torch.device(name)) for name in ("cpu", "meta", "cuda")}
    assert devices == {"cpu": FORMATS[0], "meta": FORMATS[0], "cuda": FORMATS[1]}


def test_an_optimizer_keeps_the_weights_it_was_given():
    model = MAKE["vqgan"]()
    before = [id(parameter) for parameter in model.parameters()]
    model.to("cpu")
    assert before == [id(parameter) for parameter in model.parameters()]
