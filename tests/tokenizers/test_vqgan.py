"""The published sizes of VQGAN: LlamaGen (arXiv:2406.06525) and taming-transformers (arXiv:2012.09841)."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

import vistok
from vistok.quantizers.vq import VectorQuantizer
from vistok.tokenizers.vqgan import VQGAN

LLAMAGEN, TAMING = (16384, 8, True), (1024, 256)
SIZES = {
    "llamagen-vq16": (LLAMAGEN, (1, 1, 2, 2, 4), 16, 71_883_403),
    "llamagen-vq8": (LLAMAGEN, (1, 2, 2, 4), 8, 70_109_835),
    "taming-f16-1024": (TAMING, (1, 1, 2, 2, 4), 16, 72_141_699),
    "taming-f16-16384": ((16384, 256), (1, 1, 2, 2, 4), 16, 76_073_859),
}


def convolution(inside, outside, kernel=3):
    return inside * outside * kernel**2 + outside


def residual(inside, outside):
    shortcut = 0 if inside == outside else convolution(inside, outside, 1)
    return 2 * inside + convolution(inside, outside) + 2 * outside + convolution(outside, outside) + shortcut


def closed_form(codebook, multipliers, channels=128, latent=256):
    """Parameters of the published architecture, counted by hand: 2 blocks per level, 3 in the decoder."""

    def attention(width):
        return 2 * width + 4 * convolution(width, width, 1)

    def column(widths, blocks):
        total = 0
        for i, (inside, outside) in enumerate(itertools.pairwise(widths)):
            total += residual(inside, outside) + (blocks - 1) * residual(outside, outside)
            total += convolution(outside, outside) if i < len(widths) - 2 else blocks * attention(outside)
        return total

    widths = [channels] + [channels * m for m in multipliers]
    low = widths[-1]
    middle = 2 * residual(low, low) + attention(low)
    encoder = convolution(3, channels) + column(widths, 2) + middle + 2 * low + convolution(low, latent)
    # The decoder's widths run the other way; its attention is at the first level and its last has no resampling.
    levels = [low] + [channels * m for m in reversed(multipliers)]
    decoder = convolution(latent, low) + middle + 3 * attention(low)
    for i, (inside, outside) in enumerate(itertools.pairwise(levels)):
        decoder += residual(inside, outside) + 2 * residual(outside, outside)
        decoder += convolution(outside, outside) if i < len(multipliers) - 1 else 0
    decoder += 2 * channels + convolution(channels, 3)
    size, dim = codebook[:2]
    return encoder + decoder + size * dim + convolution(latent, dim, 1) + convolution(dim, latent, 1)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_parameter_counts(name):
    codebook, multipliers, stride, parameters = SIZES[name]
    with torch.device("meta"):
        tokenizer = VQGAN(VectorQuantizer(*codebook), channel_multipliers=multipliers)
    assert sum(p.numel() for p in tokenizer.parameters()) == parameters == closed_form(codebook, multipliers)
    assert tokenizer.layout()[0].grid == (256 // stride, 256 // stride)


@pytest.mark.parametrize("name", ["quantize.embed.weight", "quant_conv.weight"])
def test_autoencoders_without_a_plain_codebook_are_refused(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"params": {"ddconfig": {"resolution": 256}}}}))
    save_file({name: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no VQGAN with a plain codebook .* nothing for quantizer.codebook"):
        vistok.load(tmp_path)
