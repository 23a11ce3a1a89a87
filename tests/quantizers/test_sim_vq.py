"""SimVQ: learned transformation of a frozen codebook, against dense autograd."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers.sim_vq import SimVQ

BOTH = pytest.mark.parametrize("transform", ["linear", "mlp"])


def make(transform="linear", codes=40, dim=5, code_dim=7, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return SimVQ(codes, dim, code_dim, transform, **options).to(dtype)


def latents(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def table(quantizer):
    """The codes, as the formula says."""
    layers = list(quantizer.transform)
    codes = quantizer.frozen @ layers[0].weight.T
    if len(layers) == 2:
        codes = F.gelu(codes + layers[0].bias) @ layers[1].weight.T + layers[1].bias
    return F.normalize(codes, dim=1) if quantizer.l2_normalize else codes


@BOTH
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_codes_losses_and_gradients_equal_dense_autograd(transform, l2_normalize):
    quantizer = make(transform, l2_normalize=l2_normalize)
    z, parameters = latents(2, 30, 5).requires_grad_(), list(quantizer.parameters())
    result = quantizer(z)
    flat, codes = z.view(-1, 5), table(quantizer)
    flat = F.normalize(flat, dim=1) if l2_normalize else flat
    found = torch.cdist(flat, codes).argmin(1)
    assert torch.equal(result.indices.flatten(), found)
    assert torch.allclose(result.quantized.view(-1, 5), codes[found], atol=1e-14)
    commitment, codebook = (
        (flat - codes[found].detach()).square().mean(),
        (flat.detach() - codes[found]).square().mean(),
    )
    for name, expected, inputs in (("commitment", commitment, [z]), ("codebook", codebook, parameters)):
        assert torch.allclose(result.losses[name], expected, rtol=1e-12)
        gradients = torch.autograd.grad(result.losses[name], inputs), torch.autograd.grad(expected, inputs)
        assert all(torch.allclose(one, other, atol=1e-14) for one, other in zip(*gradients, strict=True))
    assert quantizer.default_loss_weights == {"commitment": 0.25, "codebook": 1.0}


@BOTH
def test_one_step_moves_every_code_and_no_frozen_vector(transform):
    quantizer = make(transform)
    frozen, before = quantizer.frozen.clone(), table(quantizer).detach()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    result = quantizer(latents(1, 3, 5))
    assert result.indices.unique().numel() < 4
    result.losses["codebook"].backward()
    optimizer.step()
    assert not quantizer.frozen.requires_grad and torch.equal(quantizer.frozen, frozen)
    assert ((table(quantizer) - before).abs().amax(1) > 0).all()


def test_the_task_trains_neither_codes_nor_transformation():
    quantizer, z, g = make(estimator="straight_through"), latents(2, 3, 5).requires_grad_(), latents(2, 3, 5, seed=2)
    (quantizer(z).quantized * g).sum().backward()
    assert torch.equal(z.grad, g) and all(parameter.grad is None for parameter in quantizer.parameters())


def test_estimators_differ_in_the_gradient_alone():
    z, g = latents(2, 3, 5), latents(2, 3, 5, seed=2)
    quantized, gradients = [], []
    for estimator in ("rotation", "straight_through", "none"):
        latent = z.clone().requires_grad_()
        result = make(estimator=estimator)(latent)
        quantized.append(result.quantized)
        ((result.quantized * g).sum() + 0 * latent.sum()).backward()
        gradients.append(latent.grad)
    assert torch.equal(quantized[0], quantized[1]) and torch.equal(quantized[0], quantized[2])
    ratio = quantized[0].detach().norm(dim=-1) / z.norm(dim=-1)
    assert torch.allclose(gradients[0].norm(dim=-1), ratio * g.norm(dim=-1))
    assert torch.equal(gradients[1], g) and (gradients[2] == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_returns_what_the_indices_decode_to(transform, dtype):
    quantizer = make(transform, dtype=dtype, codes=300).eval()
    z = latents(3, 50, 5, dtype=dtype)
    result = quantizer(z)
    assert result.quantized.dtype == torch.float32 == quantizer.frozen.dtype
    assert torch.equal(quantizer.decode(result.indices), result.quantized)
    assert torch.equal(quantizer.decode(result.indices[1:2, 3:8]), result.quantized[1:2, 3:8])
    assert torch.equal(quantizer.encode(z), result.indices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.decode(result.indices), result.quantized)
        assert torch.equal(quantizer(z).indices, result.indices)


def change_by_hand(quantizer):
    with torch.no_grad():
        quantizer.transform[0].weight.mul_(-1)


def change_by_optimizer(quantizer):
    optimizer = torch.optim.SGD(quantizer.parameters(), 1.0)
    quantizer(latents(1, 3, 5)).losses["codebook"].backward()
    optimizer.step()


def change_by_loading(quantizer):
    quantizer.load_state_dict({name: value + 1 for name, value in quantizer.state_dict().items()})


def change_by_casting(quantizer):
    quantizer.to(torch.bfloat16).to(torch.float64)


CHANGES = [change_by_hand, change_by_optimizer, change_by_loading, change_by_casting]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("training", [False, True])
def test_decode_uses_the_transformation_as_it_is_now(change, training):
    quantizer, indices = make().train(training), torch.arange(40).view(1, 40, 1)
    before = quantizer.decode(indices)
    change(quantizer)
    assert not torch.allclose(quantizer.decode(indices), before)
    assert torch.allclose(quantizer.decode(indices)[0], table(quantizer), atol=1e-12)
    distances = torch.cdist(table(quantizer), table(quantizer))
    assert torch.equal(quantizer.neighbours(indices, 3)[0, :, :, 0], distances.argsort(1)[:, :3])


def test_the_table_of_evaluation_is_made_once():
    quantizer = make().eval()
    with torch.no_grad():
        first = quantizer.all_codes()
        quantizer(latents(1, 3, 5))
        assert quantizer.all_codes() is first and quantizer.train().eval().all_codes() is not first


@BOTH
def test_a_mask_equals_truncation_whatever_the_padding_holds(transform):
    quantizer, z = make(transform), latents(2, 6, 5)
    z[:, 4:] = float("nan")
    outcomes = []
    for latent, mask in ((z, torch.arange(6).expand(2, 6) < 4), (z[:, :4], None)):
        latent = latent.clone().requires_grad_()
        result = quantizer(latent, mask)
        quantizer.zero_grad()
        (sum(result.losses.values()) + result.quantized.sum()).backward()
        outcomes.append([latent.grad[:, :4], *[parameter.grad for parameter in quantizer.parameters()]])
        assert (latent.grad[:, 4:] == 0).all() and (result.indices[:, 4:] == -1).all()
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(*outcomes, strict=True))
    empty = quantizer(z, torch.zeros(2, 6, dtype=torch.bool))
    assert all(loss == 0 for loss in empty.losses.values())


def test_a_latent_that_is_not_finite_leaves_the_transformation_alone():
    quantizer, z = make(), latents(1, 6, 5)
    z[0, 2] = float("inf")
    result = quantizer(z)
    assert not result.losses["commitment"].isfinite()
    expected = quantizer(z, torch.tensor([[True, True, False, True, True, True]])).losses["codebook"]
    assert torch.allclose(result.losses["codebook"], expected)


def test_copies_states_and_compilation():
    quantizer, z = make(), latents(2, 6, 5)
    quantizer.eval()(z)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other(z).quantized, quantizer(z).quantized)
    assert set(quantizer.state_dict()) == {"frozen", "transform.0.weight"}
    fresh = SimVQ(40, 5, 7).double().eval()
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(z).quantized, quantizer(z).quantized)
    compiled = torch.compile(quantizer.train(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z).indices, quantizer(z).indices)


def test_frozen_vectors_have_unit_length_on_average():
    assert 0.98 < SimVQ(2000, 16, 32).frozen.square().sum(1).mean() < 1.02


@pytest.mark.parametrize(
    "options,message",
    [
        ({"transform": "conv"}, "transform must be one of .*'linear', 'mlp'.* got 'conv'"),
        ({"estimator": "softmax"}, "estimator must be one of .* got 'softmax'"),
        ({"code_dim": 0}, "must be positive; got 8, 2 and 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(8, 2, **options)
