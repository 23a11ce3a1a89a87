"""The adversarial term: whose gradient goes where, the alternating loop bit for bit, start, R1, adaptive weight."""

import importlib.util
import weakref
from copy import deepcopy
from pathlib import Path

import jsonargparse
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm

from vistok.losses.adaptive_weight import adaptive_weight
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.blur_discriminator import BlurDiscriminator
from vistok.losses.diff_augment import DiffAugment
from vistok.losses.discriminator import Discriminator
from vistok.losses.patchgan import PatchGAN
from vistok.losses.stylegan_discriminator import StyleGANDiscriminator

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


class Spectral(Discriminator):
    """A discriminator with a parametrised weight."""

    def __init__(self):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(3, 1, 3))

    def score(self, images):
        return self.conv(images)


class Affine(Discriminator):
    """``a * mean(x) + b``: every derivative has a closed form."""

    def __init__(self, a=3.0, b=0.5):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def score(self, images):
        return (self.a * images.mean((1, 2, 3)) + self.b).unsqueeze(1)


DISCRIMINATORS = {
    "blur": lambda: BlurDiscriminator(32, 1),
    "patchgan": lambda: PatchGAN(4, 2),
    "stylegan": lambda: StyleGANDiscriminator(16, 128),
    "spectral": Spectral,
}


@pytest.fixture(params=list(DISCRIMINATORS))
def discriminator(request):
    torch.manual_seed(0)
    return DISCRIMINATORS[request.param]()


def pair(batch=4, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images, fakes = (torch.rand(batch, 3, size, size, generator=generator) for _ in range(2))
    return fakes.requires_grad_(), images


def gradients(module):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def autoencoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def test_the_generators_term_has_no_gradient_at_the_discriminator(discriminator):
    term = AdversarialLoss(discriminator, weight=0.7, discriminator_weight=0.0)
    fakes, images = pair()
    term(fakes, images, 0).loss.backward()
    assert all((gradient == 0).all() for gradient in gradients(discriminator))
    assert fakes.grad.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_the_discriminators_term_has_no_gradient_at_the_reconstructions(discriminator):
    torch.manual_seed(0)
    term = AdversarialLoss(discriminator, weight=0.7, lecam_weight=0.1)
    fakes, images = pair()
    before = deepcopy(term)
    term(fakes, images, 0).loss.backward()
    expected = fakes.grad.clone()
    fakes.grad = None
    before.discriminator_weight = before.lecam_weight = 0.0
    before(fakes, images, 0).loss.backward()
    assert torch.equal(fakes.grad, expected)
    assert sum(gradient.abs().sum() for gradient in gradients(discriminator)) > 0


def test_gradients_equal_those_of_two_separate_losses(discriminator):
    """The classic recipe: each side by itself, on networks in the same state."""
    term = AdversarialLoss(discriminator, weight=0.3, discriminator_weight=0.5)
    fakes, images = pair()
    copy = deepcopy(discriminator)
    (expected,) = torch.autograd.grad(-0.3 * copy(fakes).mean(), fakes)
    real, fake = copy(images), copy(fakes.detach())
    (0.25 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    term(fakes, images, 0).loss.backward()
    torch.testing.assert_close(fakes.grad, expected)
    for own, other in zip(gradients(discriminator), gradients(copy), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    for own, other in zip(discriminator.buffers(), copy.buffers(), strict=True):
        torch.testing.assert_close(own, other)  # running statistics: fake, real, fake


def test_parameters_that_were_frozen_stay_frozen():
    network = BlurDiscriminator(32, 1)
    network.stem.requires_grad_(False)
    fakes, images = pair()
    AdversarialLoss(network)(fakes, images, 0).loss.backward()
    assert not network.stem.weight.requires_grad and network.stem.weight.grad is None
    assert network.hidden.weight.grad is not None


def alternating(network, discriminator, batches, start, groups, step_before_start):
    """The loop of the published trainers: the generator's optimizer, then the discriminator's, on the same output."""
    side_g = torch.optim.AdamW(network.parameters(), **groups[0])
    side_d = torch.optim.AdamW(discriminator.parameters(), **groups[1])
    for step, images in enumerate(batches):
        fakes = network(images)
        loss = F.mse_loss(fakes, images)
        if step >= start:
            discriminator.requires_grad_(False)
            loss = loss + 0.1 * -discriminator(fakes).mean()
            discriminator.requires_grad_(True)
        side_g.zero_grad()
        loss.backward()
        side_g.step()
        side_d.zero_grad()
        if step >= start:
            real, fake = discriminator(torch.cat([images, fakes.detach()])).chunk(2)
            (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        elif step_before_start:
            for parameter in discriminator.parameters():
                parameter.grad = torch.zeros_like(parameter)
        side_d.step()


@pytest.mark.parametrize("step_before_start", [False, True])
def test_one_optimizer_equals_the_alternating_loop_bit_for_bit(step_before_start):
    """40 AdamW steps, the discriminator starting at the 9th, with learning rates and betas of its own.

    Published trainers differ in whether the discriminator's optimizer steps (on zeros) before the start; ours does what
    the one kind does with ``drop_held_gradients``, and what the other does without.
    """
    batches = torch.rand(40, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    groups = [
        {"lr": 3e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2},
        {"lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.1},
    ]
    network, other = autoencoder(), autoencoder()
    term = AdversarialLoss(BlurDiscriminator(32, 1), weight=0.1, start_step=8)
    start = [p.detach().clone() for p in (*network.parameters(), *term.parameters())]
    twin = deepcopy(term.discriminator)
    sides = (network, term.discriminator)
    parameters = [{"params": list(m.parameters()), **g} for m, g in zip(sides, groups, strict=True)]
    optimizer = torch.optim.AdamW(parameters)
    for step, images in enumerate(batches):
        fakes = network(images)
        loss = F.mse_loss(fakes, images) + term(fakes, images, step).loss
        optimizer.zero_grad()
        loss.backward()
        if not step_before_start:
            term.drop_held_gradients(step)
        optimizer.step()
    alternating(other, twin, batches, 8, groups, step_before_start)
    ours = [*network.parameters(), *term.discriminator.parameters()]
    theirs = [*other.parameters(), *twin.parameters()]
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) == 0.0
    assert min((a - b).abs().max().item() for a, b in zip(ours, start, strict=True)) > 1e-4


def test_before_the_start_nothing_is_computed_and_nothing_moves():
    network = PatchGAN(4, 1)
    state = deepcopy(network.state_dict())
    term = AdversarialLoss(network, start_step=5, lecam_weight=0.1, adaptive=True)
    fakes, images = pair()
    output = term(fakes, images, 4)
    assert output.loss.item() == 0 and output.terms == {}
    output.loss.backward()
    assert fakes.grad is None
    assert all(p.grad is not None and (p.grad == 0).all() for p in network.parameters())
    term.drop_held_gradients(4)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert term.lecam.ema_real == 0
    term.adaptive = False
    assert term(fakes, images, 5).terms.keys() == {"generator", "discriminator", "logits_real", "logits_fake", "lecam"}


def test_gradients_are_kept_from_the_start_on():
    term, (fakes, images) = AdversarialLoss(Affine(), start_step=3), pair()
    term(fakes, images, 3).loss.backward()
    term.drop_held_gradients(3)
    assert term.discriminator.a.grad is not None


def test_plain_ddp_takes_a_discriminator_that_starts_late(tmp_path):
    """Without find_unused_parameters: every parameter has a gradient before and after the start."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.term = autoencoder(), AdversarialLoss(PatchGAN(4, 1), start_step=1)

        def forward(self, images, step):
            fakes = self.network(images)
            return F.mse_loss(fakes, images) + self.term(fakes, images, step).loss

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        step = Step()
        parallel = nn.parallel.DistributedDataParallel(step)
        for i in range(3):
            parallel(pair()[1], i).backward()
        assert all(p.grad is not None for p in step.parameters())
    finally:
        dist.destroy_process_group()


def test_terms_are_unweighted_and_detached_and_the_loss_weighs_them():
    torch.manual_seed(0)
    term = AdversarialLoss(
        Affine(),
        weight=0.3,
        loss="non_saturating",
        discriminator_weight=0.6,
        lecam_weight=0.2,
        r1_weight=10,
        r1_every=4,
    )
    fakes, images = pair()
    output = term(fakes, images, 8)
    parts = output.terms
    expected = 0.3 * parts["generator"] + 0.6 * parts["discriminator"] + 0.2 * parts["lecam"]
    torch.testing.assert_close(output.loss, expected + 0.5 * 10 * 4 * parts["r1"])
    assert not any(value.requires_grad for value in parts.values())
    real, fake = 3 * images.mean((1, 2, 3)) + 0.5, 3 * fakes.detach().mean((1, 2, 3)) + 0.5
    torch.testing.assert_close(parts["generator"], F.softplus(-fake).mean())
    torch.testing.assert_close(parts["discriminator"], (F.softplus(-real) + F.softplus(fake)).mean() / 2)
    torch.testing.assert_close(parts["logits_real"], real.mean())
    torch.testing.assert_close(parts["logits_fake"], fake.mean())


def test_r1_equals_its_closed_form_and_comes_every_so_many_steps():
    """The gradient of ``a * mean(x) + b`` is ``a / n`` everywhere: its square sums to ``a^2 / n``."""
    term = AdversarialLoss(Affine(a=3.0), weight=0.1, discriminator_weight=0.0, r1_weight=2.0, r1_every=4)
    fakes, images = pair()
    output = term(fakes, images, 4)
    pixels = images[0].numel()
    assert output.terms["r1"].item() == pytest.approx(9 / pixels, rel=1e-5)
    output.loss.backward()
    assert term.discriminator.a.grad.item() == pytest.approx(0.5 * 2 * 4 * 2 * 3 / pixels, rel=1e-5)
    assert [s for s in range(9) if "r1" in term(fakes, images, s).terms] == [0, 4, 8]


@pytest.mark.parametrize("name", ["blur", "patchgan", "stylegan"])
def test_r1_reaches_the_weights_of_every_discriminator(name):
    torch.manual_seed(0)
    network = DISCRIMINATORS[name]()
    term = AdversarialLoss(network, weight=1e-9, discriminator_weight=0.0, r1_weight=1.0, precision="bfloat16")
    fakes, images = pair()
    term(fakes, images, 0).loss.backward()
    found = gradients(network)
    assert all(g.isfinite().all() for g in found) and sum(g.abs().sum() > 0 for g in found) > len(found) // 2


def test_r1_does_not_depend_on_the_number_of_patches():
    """A convolution that repeats one logit over a grid has the penalty of the one logit."""

    class Repeated(Affine):
        def score(self, images):
            return super().score(images).expand(-1, 36)

    fakes, images = pair()
    values = [AdversarialLoss(net, r1_weight=1.0)(fakes, images, 0).terms["r1"] for net in (Affine(), Repeated())]
    torch.testing.assert_close(*values)


def test_adaptive_weight_equals_the_original():
    config, _, io = parity.fixture("losses-taming-adaptive-weight")
    for case in range(config["cases"]):
        weight = torch.zeros(io["g_grads"].shape[1:], requires_grad=True)
        reference, adversarial = ((io[name][case] * weight).sum() for name in ("nll_grads", "g_grads"))
        value = adaptive_weight(reference, adversarial, weight)
        torch.testing.assert_close(value, io["d_weight_unscaled"][case], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(config["disc_weight"] * value, io["d_weight"][case], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_adaptive_weight_balances_the_gradients_at_the_last_layer(autocast):
    network = autoencoder()
    term = AdversarialLoss(BlurDiscriminator(32, 1), weight=0.5, discriminator_weight=0.0, adaptive=True)
    images, last = pair()[1], network[-1].weight
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fakes = network(images)
        reference = 3 * F.mse_loss(fakes.float(), images)
        output = term(fakes, images, 0, reference=reference, last_layer=last)
    (of_reference,) = torch.autograd.grad(reference, last, retain_graph=True)
    (of_term,) = torch.autograd.grad(output.loss, last, retain_graph=True)
    assert 1 < output.terms["adaptive_weight"] < 1e4
    assert of_term.norm().item() == pytest.approx(0.5 * of_reference.norm().item(), rel=0.05)
    (reference + output.loss).backward()  # both graphs are still there
    assert network[0].weight.grad.abs().sum() > 0


def test_adaptive_weight_has_a_limit_and_needs_its_inputs():
    network, images = autoencoder(), pair()[1]
    term = AdversarialLoss(BlurDiscriminator(32, 1), adaptive=True, adaptive_max=0.01)
    fakes, last = network(images), network[-1].weight
    reference = F.mse_loss(fakes, images)
    output = term(fakes, images, 0, reference=reference, last_layer=last)
    assert output.terms["adaptive_weight"].item() == pytest.approx(0.01)
    with pytest.raises(ValueError, match="adaptive=True needs last_layer.*got None"):
        term(fakes, images, 0, reference=reference)
    with pytest.raises(ValueError, match="adaptive=True needs reference"):
        term(fakes, images, 0, last_layer=last)
    with pytest.raises(ValueError, match="adaptive=True needs last_layer.*got a frozen one"):
        term(fakes, images, 0, reference=reference, last_layer=nn.Parameter(last.detach(), requires_grad=False))


def test_validation_needs_no_gradient_and_changes_nothing():
    term = AdversarialLoss(
        PatchGAN(4, 1), adaptive=True, lecam_weight=0.1, r1_weight=1.0, augment=DiffAugment(probability=0.5)
    ).eval()
    state = deepcopy(term.state_dict())
    fakes, images = pair()
    with torch.no_grad():
        output = term(fakes, images, 0)
    assert output.loss.isfinite() and "r1" not in output.terms and "adaptive_weight" not in output.terms
    assert all(torch.equal(value, state[name]) for name, value in term.state_dict().items())


def test_augmentation_is_what_the_discriminator_sees_of_both_sides():
    class Grey(DiffAugment):
        def forward(self, images, generator=None):
            return images * 0 + 0.5

    fakes, images = pair()
    term = AdversarialLoss(Affine(), augment=Grey())
    output = term(fakes, images, 0)
    assert output.terms["logits_real"].item() == output.terms["logits_fake"].item() == 2.0
    assert torch.autograd.grad(output.loss, fakes)[0].abs().sum() == 0
    assert AdversarialLoss(Affine(), r1_weight=1.0, augment=Grey())(fakes, images, 0).terms["r1"] == 0
    term = AdversarialLoss(BlurDiscriminator(32, 1), augment=DiffAugment())
    assert torch.autograd.grad(term(fakes, images, 0).loss, fakes)[0].abs().sum() > 0


def test_precision_is_the_terms_own_whatever_the_step_runs_in():
    torch.manual_seed(0)
    network = BlurDiscriminator(32, 1)
    seen = []
    network.logits.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    fakes, images = pair()
    for precision in ("float32", "bfloat16"):
        term = AdversarialLoss(network, precision=precision, discriminator_weight=1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "float32"):
            output = term(fakes.to(torch.bfloat16), images, 0)
        assert output.loss.dtype == torch.float32
        output.loss.backward()
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_in_bfloat16_the_generators_term_still_has_no_gradient_at_the_discriminator():
    """Autocast keeps casts of weights that have a gradient; none of them may serve the generator's term."""
    network = BlurDiscriminator(32, 1)
    term = AdversarialLoss(network, precision="bfloat16", discriminator_weight=0.0)
    fakes, images = pair()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            term(fakes, images, 0).loss.backward()
    assert all((gradient == 0).all() for gradient in gradients(network)) and fakes.grad.abs().sum() > 0


def test_a_compiled_discriminator_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = AdversarialLoss(PatchGAN(4, 1), weight=0.5, r1_weight=1.0, r1_every=2)
    compiled = deepcopy(plain)
    compiled.discriminator.compile(backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for step in range(2):
        results = []
        for term in (plain, compiled):
            fakes, images = pair()
            term(fakes, images, step).loss.backward()
            results.append([fakes.grad, *gradients(term.discriminator), *term.discriminator.buffers()])
        for own, other in zip(*results, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_no_step_waits_for_the_device(discriminator):
    """Fake tensors have shapes and no values: whatever asks for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, images = autoencoder(), torch.rand(4, 3, 16, 16)
        term = AdversarialLoss(
            discriminator, adaptive=True, lecam_weight=0.1, r1_weight=1.0, r1_every=2, augment=DiffAugment(0.5)
        )
        for step in range(3):
            fakes = network(images)
            reference = F.mse_loss(fakes, images)
            output = term(fakes, images, step, reference=reference, last_layer=network[-1].weight)
            torch.autograd.grad(reference + output.loss, [*network.parameters(), *term.parameters()])
        with pytest.raises(DataDependentOutputException):
            output.loss.item()


def test_a_yaml_names_it():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--term", type=AdversarialLoss)
    config = {
        "class_path": "vistok.losses.adversarial.AdversarialLoss",
        "init_args": {
            "discriminator": {
                "class_path": "vistok.losses.blur_discriminator.BlurDiscriminator",
                "init_args": {"channels": 32},
            },
            "loss": "hinge",
            "lecam_weight": 0.001,
            "augment": {"class_path": "vistok.losses.diff_augment.DiffAugment", "init_args": {"probability": 0.5}},
        },
    }
    term = parser.instantiate(parser.parse_object({"term": config})).term
    assert isinstance(term.discriminator, BlurDiscriminator) and term.augment.probability == 0.5
    config["init_args"]["loss"] = "wasserstein"
    with pytest.raises(jsonargparse.ArgumentError, match="wasserstein"):
        parser.parse_object({"term": config})


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="'wasserstein'"):
        AdversarialLoss(Affine(), loss="wasserstein")
    with pytest.raises(ValueError, match="r1_weight must not be negative; got -1"):
        AdversarialLoss(Affine(), r1_weight=-1)
    with pytest.raises(ValueError, match="r1_every must be at least 1; got 0"):
        AdversarialLoss(Affine(), r1_every=0)
    fakes, images = pair()
    with pytest.raises(ValueError, match=r"same shape; got \(4, 3, 16, 16\) and \(2, 3, 16, 16\)"):
        AdversarialLoss(Affine())(fakes, images[:2], 0)


def test_the_activations_of_the_discriminators_side_are_gone_before_the_backward_pass():
    critic = BlurDiscriminator(channels=32, num_stages=1)
    term, alive = AdversarialLoss(critic), []
    critic.stem.register_forward_hook(lambda module, inputs, output: alive.append((len(output), weakref.ref(output))))
    reconstructions = torch.rand(3, 3, 16, 16, requires_grad=True)
    output = term(reconstructions, torch.rand(3, 3, 16, 16), 0)
    assert [(batch, reference() is None) for batch, reference in alive] == [(6, True), (3, False)]
    output.loss.backward()
    assert critic.stem.weight.grad is not None and reconstructions.grad is not None
