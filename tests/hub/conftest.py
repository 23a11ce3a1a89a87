"""Small tokenizers with random weights, one 1D and one on a grid."""

from collections.abc import Callable

import pytest
import torch

from vistok.quantizers.vq import VectorQuantizer
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.titok import TiTok
from vistok.tokenizers.vqgan import VQGAN


def make_titok(seed: int = 0, codebook_size: int = 256) -> TiTok:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantizer = VectorQuantizer(codebook_size, 8)
        return TiTok(quantizer, 32, 8, num_latent_tokens=6, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2)).eval()


def make_vqgan(seed: int = 0) -> VQGAN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantizer = VectorQuantizer(64, 8)
        return VQGAN(quantizer, 32, channels=32, channel_multipliers=(1, 1), num_blocks=1, latent_channels=16).eval()


@pytest.fixture(params=[make_titok, make_vqgan], ids=["titok", "vqgan"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


@pytest.fixture
def titok() -> Callable[..., TiTok]:
    return make_titok


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
