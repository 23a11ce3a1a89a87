"""MaskGIT's VQGAN: sizes, the shortcut of its blocks, and the tokenizer contract."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vistok
from vistok.layers.maskgit import MaskGITBlock
from vistok.quantizers.vq import VectorQuantizer
from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN


def tiny(**kwargs):
    torch.manual_seed(0)
    arguments = {"channels": 32, "channel_multipliers": (1, 2, 1), "num_blocks": 1, "latent_channels": 8} | kwargs
    return MaskGITVQGAN(VectorQuantizer(16, 8), 16, **arguments).eval()


def images(height, width, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_size_has_the_published_parameter_counts():
    with torch.device("meta"):
        tokenizer = MaskGITVQGAN(VectorQuantizer(1024, 256))
    assert parameters(tokenizer.encoder) == 23_775_104
    assert parameters(tokenizer.decoder) == 30_478_339
    assert parameters(tokenizer) == 23_775_104 + 30_478_339 + 262_144
    assert len(tokenizer.state_dict()) == 168
    assert tokenizer.layout()[0].grid == (16, 16)


def reference_block(block, x, shortcut_of):
    """The block written out in float64, with its "same" padding made by hand."""
    state = {name: value.double() for name, value in block.state_dict().items()}
    h = x.double()
    for i in (1, 2):
        h = F.silu(F.group_norm(h, 32, state[f"norm{i}.weight"], state[f"norm{i}.bias"], 1e-6))
        h = F.conv2d(F.pad(h, (1, 1, 1, 1)), state[f"conv{i}.weight"])
    skip = x.double() if shortcut_of == "input" else h
    return h + F.conv2d(skip, state["shortcut.weight"])


@pytest.mark.parametrize("shortcut_of", ["input", "output"])
def test_the_shortcut_sees_what_it_is_said_to_see(shortcut_of):
    torch.manual_seed(0)
    block, x = MaskGITBlock(32, 64, shortcut_of), torch.randn(2, 32, 5, 5)
    assert torch.allclose(block(x).double(), reference_block(block, x, shortcut_of), atol=1e-5)
    nn.init.zeros_(block.conv2.weight)
    assert (block(x).abs().max() == 0) == (shortcut_of == "output")


@pytest.mark.parametrize("shortcut_of", ["input", "output"])
def test_a_block_that_keeps_its_channels_adds_its_input(shortcut_of):
    block, x = MaskGITBlock(32, 32, shortcut_of), torch.randn(1, 32, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)
    assert not any(name.startswith("shortcut") for name in block.state_dict())


def test_an_unknown_shortcut_is_named():
    with pytest.raises(ValueError, match="'input' or 'output'; got 'both'"):
        tiny(shortcut_of="both")


@pytest.mark.parametrize("size", [(16, 16), (8, 28)])
def test_decode_of_encode_equals_forward_bit_for_bit(size):
    tokenizer, x = tiny(), images(*size)
    output, tokens = tokenizer(x), tokenizer.encode(x)
    assert tokens.layout[0].grid == (size[0] // 4, size[1] // 4)
    assert torch.equal(output.tokens.indices["image"], tokens.indices["image"])
    assert torch.equal(tokenizer.decode(tokens, clamp=False), output.decoded)
    assert output.decoded.shape == x.shape


def test_every_parameter_gets_a_gradient():
    tokenizer = tiny().train()
    output = tokenizer(images(16, 16))
    (output.decoded.square().mean() + sum(output.losses.values())).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None]


def test_a_tokenizer_survives_saving(tmp_path):
    tokenizer, x = tiny(shortcut_of="input"), images(16, 16)
    tokenizer.save_pretrained(tmp_path / "export")
    again = vistok.load(tmp_path / "export")
    assert again.config == tokenizer.config
    assert torch.equal(again.decode(again.encode(x)), tokenizer.decode(tokenizer.encode(x)))


def test_another_codebook_dimension_is_joined_by_projections():
    tokenizer = MaskGITVQGAN(VectorQuantizer(16, 4), 16, 32, (1, 1), 1, latent_channels=8)
    assert tokenizer.to_quantizer.weight.shape == (4, 8) and tokenizer.from_quantizer.weight.shape == (8, 4)
    assert not list(tiny().to_quantizer.parameters())


def test_the_last_layer_makes_the_pixels():
    decoder = tiny().decoder
    assert decoder.last_layer is decoder.conv_out.weight and decoder.last_layer.shape[0] == 3
    cnn = vistok.VQGAN(VectorQuantizer(16, 4), 16, 32, (1, 1), 1).decoder
    assert cnn.last_layer is cnn.conv_out.weight and cnn.last_layer.shape[0] == 3
