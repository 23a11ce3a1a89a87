"""LeCam: values, gradients and moving averages of the original over three steps; when the averages move."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.losses.gan import discriminator_loss, generator_loss
from vistok.losses.lecam import LeCam

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def test_three_steps_equal_the_original():
    config, _, io = parity.fixture("losses-titok-gan-lecam")
    lecam, weight = LeCam(config["lecam_ema_decay"]), config["lecam_regularization_weight"]
    for step in range(config["steps"]):
        real = io["logits_real"][step].clone().requires_grad_()
        fake = io["logits_fake"][step].clone().requires_grad_()
        penalty = lecam(real, fake, step)
        torch.testing.assert_close(penalty, io["lecam_raw"][step], rtol=1e-6, atol=0)
        torch.testing.assert_close(lecam.ema_real, io["ema_real_after"][step], rtol=1e-5, atol=0)
        torch.testing.assert_close(lecam.ema_fake, io["ema_fake_after"][step], rtol=1e-5, atol=0)
        total = discriminator_loss(real, fake, "hinge") + weight * penalty
        torch.testing.assert_close(total, io["discriminator_loss"][step], rtol=1e-6, atol=0)
        grad_real, grad_fake = torch.autograd.grad(total, (real, fake))
        torch.testing.assert_close(grad_real, io["grad_real_of_discriminator_loss"][step], rtol=0, atol=1e-8)
        torch.testing.assert_close(grad_fake, io["grad_fake_of_discriminator_loss"][step], rtol=0, atol=1e-8)
        generator = generator_loss(fake, "hinge")
        torch.testing.assert_close(generator, io["generator_loss"][step], rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(generator, fake)
        torch.testing.assert_close(gradient, io["grad_fake_of_generator_loss"][step], rtol=0, atol=1e-8)


def test_each_side_is_held_near_the_average_of_the_other():
    lecam = LeCam().eval()
    lecam.ema_real.fill_(2.0)
    lecam.ema_fake.fill_(-1.0)
    value = lecam(torch.full((3,), 4.0), torch.full((3,), -3.0), 0)
    assert value.item() == pytest.approx((4 - -1) ** 2 + (2 - -3) ** 2)
    inside = lecam(torch.full((3,), -2.0), torch.full((3,), 3.0), 0)
    assert inside.item() == 0


def test_averages_move_once_per_optimizer_step():
    lecam = LeCam(0.5)
    for _ in range(3):  # micro-batches of one step
        lecam(torch.ones(2), -torch.ones(2), 7)
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (0.5, -0.5)
    lecam(torch.ones(2), -torch.ones(2), 8)
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (0.75, -0.75)


def test_validation_does_not_move_the_averages():
    lecam = LeCam(0.5)
    with torch.no_grad():
        lecam(torch.ones(2), torch.ones(2), 0)
    lecam.eval()
    lecam(torch.ones(2), torch.ones(2), 1)
    assert lecam.ema_real.item() == lecam.ema_fake.item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_averages(bad):
    lecam = LeCam(0.5)
    lecam(torch.tensor([1.0, bad]), torch.ones(2), 0)
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (0, 0.5)


def test_averages_are_in_checkpoints():
    lecam, other = LeCam(0.5), LeCam(0.5)
    lecam(torch.ones(2), -torch.ones(2), 0)
    other.load_state_dict(lecam.state_dict())
    assert (other.ema_real.item(), other.ema_fake.item()) == (0.5, -0.5)


def test_averages_are_float32_whatever_the_logits():
    lecam = LeCam(0.999)
    lecam(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), 0)
    assert lecam.ema_real.item() == pytest.approx(0.001, rel=1e-6)


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\); got 1.0"):
        LeCam(1.0)
