"""Gaussian bottlenecks: the divergence, the draws, and what a tokenizer without tokens can do."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import vistok
from vistok import ContinuousTiTok, GaussianTokenizer
from vistok.decoders.cnn import CNNDecoder
from vistok.encoders.cnn import CNNEncoder
from vistok.layers.gaussian import Gaussian

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).resolve().parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def titok():
    torch.manual_seed(0)
    return ContinuousTiTok(4, 16, 8, 6, (32, 1, 2), (32, 1, 2)).eval()


def grid():
    torch.manual_seed(0)
    encoder, decoder = CNNEncoder(32, (1, 1), 1, out_dim=8), CNNDecoder(32, (1, 1), 1, in_dim=4)
    return GaussianTokenizer(encoder, decoder, 16, (-1.0, 1.0)).eval()


def sequence(x):
    """``(B, C, 1, N)`` of the fixtures -> ``(B, N, C)``."""
    return parity.channel_last(x).flatten(1, 2)


def test_the_divergence_agrees_with_the_original():
    _, _, io = parity.fixture("losses-titok-vae-kl")
    posterior = Gaussian.from_parameters(sequence(io["parameters"]))
    parity.assert_close(posterior.mean, sequence(io["mean"]))
    parity.assert_close(posterior.logvar, sequence(io["logvar"]))
    parity.assert_close(posterior.kl().log1p(), io["log1p_kl"])


def test_the_gradient_of_the_divergence_agrees_with_the_original():
    _, _, io = parity.fixture("losses-titok-vae-kl")
    mean, logvar = sequence(io["parameters"]).chunk(2, -1)
    parameters = torch.cat([mean, logvar.clamp(-4, 4)], -1).requires_grad_()
    kl = Gaussian.from_parameters(parameters).kl()
    parity.assert_close(kl.detach(), io["kl_tame"])
    loss = kl.sum() / len(kl)
    parity.assert_close(loss.detach(), io["kl_loss_tame"])
    loss.backward()
    parity.assert_close(parameters.grad, sequence(io["grad_parameters_of_kl_loss_tame"]))


def test_clamped_variances_get_no_gradient():
    _, _, io = parity.fixture("losses-titok-vae-kl")
    parameters = sequence(io["parameters"]).requires_grad_()
    Gaussian.from_parameters(parameters).kl().sum().backward()
    assert torch.equal(parameters.grad.chunk(2, -1)[1] == 0, sequence(io["grad_clamped_mask"]).bool())


def test_the_divergence_is_that_of_normal_distributions():
    parameters = torch.randn(2, 5, 6, dtype=torch.float64)
    posterior = Gaussian.from_parameters(parameters)
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(posterior.kl(), expected, atol=1e-12)
    assert posterior.kl().shape == (2, 5)


def test_draws_have_the_mean_and_the_variance():
    torch.manual_seed(0)
    posterior = Gaussian(torch.full((1, 1, 40_000), 3.0), torch.full((1, 1, 40_000), 4.0).log())
    draw = posterior.sample()
    assert abs(draw.mean() - 3) < 0.05 and abs(draw.std() - 2) < 0.05
    a, b = (posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, draw)


def test_a_draw_is_mean_plus_noise_times_deviation():
    mean, logvar = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    draw = Gaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(draw, mean + (logvar / 2).exp() * noise)
    grad_mean, grad_logvar = torch.autograd.grad(draw.sum(), (mean, logvar))
    assert torch.equal(grad_mean, torch.ones_like(mean))
    assert torch.allclose(grad_logvar, 0.5 * (logvar / 2).exp() * noise)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(B, N, 2 \* D\); got \(2, 3, 5\)"):
        Gaussian.from_parameters(torch.zeros(2, 3, 5))


@pytest.mark.parametrize("make", [titok, grid])
def test_training_decodes_a_draw_and_evaluation_the_mean(make):
    tokenizer, images = make(), torch.rand(2, 3, 16, 16)
    output = tokenizer(images)
    assert output.tokens is None and output.decoded.shape == images.shape
    assert torch.equal(output.quantized, tokenizer.encode_latents(images))
    assert torch.equal(output.latents, output.quantized)
    tokenizer.train()
    drawn = tokenizer(images, generator=torch.Generator().manual_seed(0))
    again = tokenizer(images, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.decoded, again.decoded)
    assert torch.equal(drawn.quantized, tokenizer.posterior(images).sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn.quantized, tokenizer(images).quantized)
    assert torch.equal(drawn.losses["kl"], output.losses["kl"])
    parity.assert_close(output.losses["kl"].detach(), tokenizer.posterior(images).kl().sum(1).mean().detach())


def test_every_parameter_gets_a_gradient():
    tokenizer = titok().train()
    output = tokenizer(torch.rand(2, 3, 16, 16))
    (output.decoded.square().mean() + 1e-6 * output.losses["kl"]).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None]
    assert tokenizer.default_loss_weights == {"kl": 1e-6}


def test_the_divergence_is_computed_in_float32_under_autocast():
    tokenizer, images = titok(), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
    assert output.losses["kl"].dtype == torch.float32 and output.latents.dtype == torch.float32


@pytest.mark.parametrize("make", [titok, grid])
def test_it_has_latents_in_place_of_tokens(make):
    tokenizer, images = make(), torch.rand(2, 3, 16, 16)
    size = (16, 16)
    latents = tokenizer.encode_latents(images)
    assert latents.shape == (2, tokenizer.encoder.num_tokens(size), 4)
    decoded = tokenizer.decode_latents(latents, tokenizer.encoder.grid(size))
    assert torch.equal(decoded, tokenizer(images).decoded)
    assert tokenizer.layout() == () and tokenizer.codebook_sizes == ()
    with pytest.raises(TypeError, match="continuous and has no tokens; use posterior"):
        tokenizer.encode(images)
    with pytest.raises(TypeError, match="decodes no tokens; use decode_latents"):
        tokenizer.decode(None)


def test_it_survives_saving_and_loading(tmp_path):
    tokenizer, images = titok(), torch.rand(2, 3, 16, 16)
    again = vistok.load(vistok.save(tokenizer, tmp_path / "export"))
    assert again.config == tokenizer.config
    assert torch.equal(again(images).decoded, tokenizer(images).decoded)


def test_encoder_and_decoder_must_fit():
    with pytest.raises(ValueError, match="decoder's 4 dimensions; its out_dim is 6"):
        GaussianTokenizer(CNNEncoder(32, (1, 1), 1, out_dim=6), CNNDecoder(32, (1, 1), 1, in_dim=4), 16)
    with pytest.raises(ValueError, match="image_size is needed"):
        GaussianTokenizer(CNNEncoder(32, (1, 1), 1, out_dim=8), CNNDecoder(32, (1, 1), 1, in_dim=4))
