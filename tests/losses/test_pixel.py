"""Pixel losses: closed forms, the logit-Laplace density, its gradient on and beyond the edge of the pixel range."""

import math

import pytest
import torch

from vistok.losses.pixel import PixelLoss, logit_laplace_nll


def squashed(pixels):
    return 0.8 * pixels + 0.1


def test_terms_add_up_with_their_weights():
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    l1, l2 = (x - y).abs().mean(), ((x - y) ** 2).mean()
    nll = logit_laplace_nll(x, y, 0.5)
    torch.testing.assert_close(PixelLoss(0.2, 3.0)(x, y), 0.2 * l1 + 3.0 * l2)
    torch.testing.assert_close(PixelLoss(0.2, 3.0, 0.4, 0.5)(x, y), 0.2 * l1 + 3.0 * l2 + 0.4 * nll)
    torch.testing.assert_close(PixelLoss(l2=0, logit_laplace=1)(x, y), logit_laplace_nll(x, y))


def test_default_is_the_mean_squared_error():
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(PixelLoss()(x, y), torch.nn.functional.mse_loss(x, y))


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("centre", [0.0, 0.37, 1.0, 1.2, -0.1])
def test_logit_laplace_is_the_density_of_a_laplace_logit(centre, scale):
    """Its integral over the pixel range is what the Laplace distribution gives the interval of logits."""
    pixels = torch.linspace(0, 1, 2001, dtype=torch.float64)
    reconstruction = torch.tensor(centre, dtype=torch.float64)
    density = torch.stack([(-logit_laplace_nll(reconstruction, p, scale)).exp() for p in pixels])
    mass = torch.trapezoid(density, squashed(pixels)).item()
    if 0 <= centre <= 1:
        location = math.log(squashed(centre) / (1 - squashed(centre)))
    else:
        edge = round(centre)
        location = math.log(squashed(edge) / (1 - squashed(edge))) + (centre - edge) * 0.8 / 0.09
    laplace = torch.distributions.Laplace(location, scale)
    bounds = torch.tensor([math.log(1 / 9), math.log(9)])
    expected = (laplace.cdf(bounds[1]) - laplace.cdf(bounds[0])).item()
    assert mass == pytest.approx(expected, abs=5e-4)


def test_logit_laplace_gradient_neither_vanishes_nor_explodes_outside_the_range():
    """At every reconstruction it is sign / b times the slope of the logit at the nearest legal pixel."""
    x = torch.tensor([-3.0, -0.2, -0.125, -1e-3, 0.0, 0.5, 1.0, 1.125, 4.0], dtype=torch.float64, requires_grad=True)
    y = torch.full_like(x, 0.25).detach()
    logit_laplace_nll(x, y, 0.5).mul(x.numel()).backward()
    p = squashed(x.detach().clamp(0, 1))
    expected = (x.detach() - y).sign() / 0.5 * 0.8 / (p * (1 - p))
    torch.testing.assert_close(x.grad, expected)


def test_logit_laplace_continues_smoothly_over_the_edge():
    y = torch.tensor(0.5, dtype=torch.float64)
    for edge in (0.0, 1.0):
        x = torch.tensor([edge - 1e-6, edge, edge + 1e-6], dtype=torch.float64)
        low, middle, high = (logit_laplace_nll(value, y).item() for value in x)
        assert high - middle == pytest.approx(middle - low, rel=1e-3)


def test_images_beyond_the_range_stay_finite():
    images = torch.tensor([-0.5, 0.0, 1.0, 1.125, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    loss = PixelLoss(l2=0, logit_laplace=1)
    assert loss(images.flip(-1), images).isfinite()
    torch.testing.assert_close(loss(images.clamp(0, 1), images), loss(images.clamp(0, 1), images.clamp(0, 1)))


@pytest.mark.parametrize("arguments", [{"l1": 1.0, "l2": 0.0}, {}, {"l2": 0.0, "logit_laplace": 1.0}])
def test_computed_in_float32_whatever_comes_in(arguments):
    loss = PixelLoss(**arguments)
    x, y = torch.rand(2, 3, 8, 8).bfloat16(), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(x.float(), y))


def test_wrong_arguments_are_named():
    for wrong in ({"l1": -1.0}, {"l2": -0.1}, {"logit_laplace": -1.0}, {"l2": 0.0}):
        with pytest.raises(ValueError, match="l1, l2 and logit_laplace must not be negative, nor all 0; got"):
            PixelLoss(**wrong)
    with pytest.raises(ValueError, match="laplace_scale must be positive; got 0"):
        PixelLoss(laplace_scale=0.0)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        PixelLoss()(torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"must both be \(B, 3, H, W\)"):
        PixelLoss()(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4))
