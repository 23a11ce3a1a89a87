"""GAN losses against the numbers of the originals, closed forms, and the sign of their gradients."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from vistok.losses.gan import discriminator_loss, generator_loss

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def both_gradients(real, fake, loss):
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    value = discriminator_loss(real, fake, loss)
    return (value, *torch.autograd.grad(value, (real, fake)))


@pytest.mark.parametrize("fixture", ["losses-taming-gan", "losses-gigatok-gan"])
@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
def test_discriminator_losses_equal_the_originals(fixture, loss):
    _, _, io = parity.fixture(fixture)
    value, grad_real, grad_fake = both_gradients(io["logits_real"], io["logits_fake"], loss)
    torch.testing.assert_close(value, io[f"{loss}_d_loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(grad_real, io[f"grad_real_of_{loss}_d_loss"], rtol=0, atol=1e-8)
    torch.testing.assert_close(grad_fake, io[f"grad_fake_of_{loss}_d_loss"], rtol=0, atol=1e-8)


def test_hinge_generator_loss_equals_the_original():
    _, _, io = parity.fixture("losses-gigatok-gan")
    fake = io["logits_fake"].requires_grad_()
    value = generator_loss(fake, "hinge")
    torch.testing.assert_close(value, io["hinge_gen_loss"], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(value, fake)
    torch.testing.assert_close(gradient, io["grad_fake_of_hinge_gen_loss"], rtol=0, atol=1e-8)


def test_non_saturating_equals_its_closed_form():
    """Minus the mean log-likelihood of the right answers; the generator's that of the wrong one."""
    torch.manual_seed(0)
    real, fake = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    value, grad_real, grad_fake = both_gradients(real, fake, "non_saturating")
    expected = -0.5 * (torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad_real, -0.5 * (1 - torch.sigmoid(real)) / real.numel())
    torch.testing.assert_close(grad_fake, 0.5 * torch.sigmoid(fake) / fake.numel())
    fake = fake.requires_grad_()
    value = generator_loss(fake, "non_saturating")
    torch.testing.assert_close(value, -torch.sigmoid(fake).log().mean())
    (gradient,) = torch.autograd.grad(value, fake)
    torch.testing.assert_close(gradient, -(1 - torch.sigmoid(fake)) / fake.numel())


def test_non_saturating_is_not_the_published_slip():
    """GigaTok's code swaps input and target: its discriminator learns nothing from reconstructions."""
    _, _, io = parity.fixture("losses-gigatok-gan")
    value, _, grad_fake = both_gradients(io["logits_real"], io["logits_fake"], "non_saturating")
    assert (io["grad_fake_of_non_saturating_d_loss"] == 0).all()
    assert (grad_fake > 0).all()
    assert abs(value - io["non_saturating_d_loss"]) > 0.01
    assert abs(generator_loss(io["logits_fake"], "non_saturating") - io["non_saturating_gen_loss"]) > 0.01


@pytest.mark.parametrize("loss", ["hinge", "vanilla", "non_saturating"])
def test_the_two_sides_pull_in_opposite_directions(loss):
    logits = torch.linspace(-0.9, 0.9, 7)
    _, grad_real, grad_fake = both_gradients(logits, logits, loss)
    logits = logits.clone().requires_grad_()
    (generator,) = torch.autograd.grad(generator_loss(logits, loss), logits)
    assert (grad_real < 0).all() and (grad_fake > 0).all() and (generator < 0).all()


def test_an_undecided_discriminator_costs_one_or_log_two():
    zeros = torch.zeros(2, 3)
    assert discriminator_loss(zeros, zeros, "hinge").item() == pytest.approx(1)
    assert discriminator_loss(zeros, zeros, "vanilla").item() == pytest.approx(math.log(2))
    assert discriminator_loss(zeros, zeros, "non_saturating").item() == pytest.approx(math.log(2))
    assert generator_loss(zeros, "non_saturating").item() == pytest.approx(math.log(2))


def test_extreme_logits_stay_finite():
    big = torch.tensor([-1e4, 1e4])
    for loss in ("hinge", "vanilla", "non_saturating"):
        assert discriminator_loss(big, big, loss).isfinite() and generator_loss(big, loss).isfinite()


def test_unknown_losses_are_refused():
    with pytest.raises(ValueError, match=r"'hinge', 'vanilla', 'non_saturating'\]; got 'wasserstein'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wasserstein")
    with pytest.raises(ValueError, match="'wasserstein'"):
        generator_loss(torch.zeros(1), "wasserstein")
