"""Gradient estimators against the matrices they stand for."""

import pytest
import torch

from vistok.quantizers.estimators import rotation, straight_through


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def through(estimator, z, codes, g):
    """Gradient of ``sum(g * estimator(z, codes))`` with respect to the latents."""
    z = z.clone().requires_grad_()
    (estimator(z, codes) * g).sum().backward()
    return z.grad


def rotation_matrix(z, code):
    """The rotation, in the plane of the two, that takes the direction of ``z`` to that of ``code``."""
    u, v = z / z.norm(), code / code.norm()
    across = v - (u @ v) * u
    sine, cosine = across.norm(), u @ v
    e = across / sine
    plane = torch.stack([u, e], 1)  # (D, 2)
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return torch.eye(len(z), dtype=z.dtype) - plane @ plane.T + plane @ turn @ plane.T


@pytest.mark.parametrize("estimator", [straight_through, rotation])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_value_is_the_code_bit_for_bit(estimator, dtype):
    z, codes = rows(4, 7, 5, dtype=dtype) * 100, rows(4, 7, 5, seed=1, dtype=torch.float32)
    assert torch.equal(estimator(z.requires_grad_(), codes), codes)


def test_straight_through_passes_the_gradient_bit_for_bit():
    g = rows(4, 7, 5, seed=2)
    assert torch.equal(through(straight_through, rows(4, 7, 5), rows(4, 7, 5, seed=1), g), g)


def test_rotation_is_the_transposed_rotation_and_scaling_of_latent_to_code():
    z, codes, g = rows(30, 5), 3 * rows(30, 5, seed=1), rows(30, 5, seed=2)
    found = through(rotation, z, codes, g)
    for row in range(30):
        matrix = codes[row].norm() / z[row].norm() * rotation_matrix(z[row], codes[row])
        assert torch.allclose(matrix @ z[row], codes[row], atol=1e-12)
        assert torch.allclose(found[row], matrix.T @ g[row], atol=1e-12)


def test_rotation_keeps_length_ratio_and_angle():
    z, codes, g = rows(30, 5), 3 * rows(30, 5, seed=1), rows(30, 5, seed=2)
    found = through(rotation, z, codes, g)
    scale = codes.norm(dim=1) / z.norm(dim=1)
    assert torch.allclose(found.norm(dim=1), scale * g.norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(found, z), torch.cosine_similarity(g, codes), atol=1e-12)


def test_rotation_of_parallel_vectors_only_scales():
    z, g = rows(10, 5), rows(10, 5, seed=2)
    assert torch.allclose(through(rotation, z, 2.5 * z, g), 2.5 * g, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "z,code",
    [
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, -2.0], [-3.0, 6.0]),
        ([1.0, 0.0], [-1.0, 1e-12]),
    ],
)
def test_rotation_passes_straight_through_where_it_is_undefined(z, code, dtype):
    g = torch.tensor([[3.0, -5.0]], dtype=dtype)
    found = through(rotation, torch.tensor([z], dtype=dtype), torch.tensor([code], dtype=dtype), g)
    assert torch.equal(found, g)


@pytest.mark.parametrize("tiny", [1e-30, 1e-20, 1e-10])
def test_rotation_of_tiny_latents_is_finite(tiny):
    z, codes, g = tiny * rows(20, 4, dtype=torch.float32), rows(20, 4, seed=1).float(), rows(20, 4, seed=2).float()
    assert through(rotation, z, codes, g).isfinite().all()


@pytest.mark.parametrize("estimator", [straight_through, rotation])
def test_gradients_have_the_dtype_of_the_latents_and_codes_get_their_own(estimator):
    z, codes, g = rows(6, 4, dtype=torch.bfloat16).requires_grad_(), rows(6, 4, seed=1).float(), rows(6, 4, seed=2)
    codes.requires_grad_()
    (estimator(z, codes) * g.float()).sum().backward()
    assert z.grad.dtype == torch.bfloat16 and torch.equal(codes.grad, g.float())
