"""One optimizer with a discriminator equals the alternating loop of two, bit for bit, whatever Lightning adds."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.blur_discriminator import BlurDiscriminator
from vistok.losses.gan import discriminator_loss, generator_loss
from vistok.losses.lecam import LeCam
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import ReconstructionObjective
from vistok.training.optimization import DiscriminatorOptimization, Optimization

_spec = importlib.util.spec_from_file_location("vistok_test_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

START, WEIGHT = 4, 0.3
LR, LR_D, CLIP = 2e-3, 5e-4, 0.05


def discriminator():
    torch.manual_seed(1)
    return BlurDiscriminator(channels=32, num_stages=1)


def training(**adversarial):
    options = {"weight": WEIGHT, "start_step": START, **adversarial}
    objective = ReconstructionObjective(adversarial=AdversarialLoss(discriminator(), **options))
    optimizer = Optimization(
        lr=LR,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        schedule="constant",
        discriminator=DiscriminatorOptimization(lr=LR_D, betas=(0.5, 0.9), weight_decay=0.05),
    )
    return TokenizerTraining(small.titok(), objective, optimizer, ema_decay=None)


def decaying(model, weight_decay):
    """What the optimizer of a well-kept loop is given: matrices decay, the rest does not."""
    matrices = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    others = [p for p in model.parameters() if all(p is not weight for weight in matrices)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def in_groups(optimizer):
    """Its parameters in the order that a norm over them is summed in."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def alternating(steps, accumulate=1, clip=None, lecam_weight=0.0):
    """The classic loop: step the tokenizer on the generator's loss, then the discriminator on the same images."""
    tokenizer, critic, lecam = small.titok().train(), discriminator().train(), LeCam()
    first = torch.optim.AdamW(decaying(tokenizer, 0.1), lr=LR, betas=(0.9, 0.99), fused=True)
    second = torch.optim.AdamW(decaying(critic, 0.05), lr=LR_D, betas=(0.5, 0.9), fused=True)
    batches = iter(torch.utils.data.DataLoader(small.Noise(), 4))
    for step in range(steps):
        kept = []
        for _ in range(accumulate):
            images = next(batches)["image"].float() / 255
            output = tokenizer(images)
            loss = (output.decoded - images).square().mean()
            loss = loss + 0.25 * output.losses["commitment"] + output.losses["codebook"]
            if step >= START:
                critic.requires_grad_(False)
                loss = loss + WEIGHT * generator_loss(critic(output.decoded))
                critic.requires_grad_(True)
            (loss / accumulate).backward()
            kept.append((images, output.decoded.detach()))
        if clip:
            torch.nn.utils.clip_grad_norm_(in_groups(first), clip)
        first.step()
        first.zero_grad()
        tokenizer.commit_update()
        if step < START:
            continue
        for images, reconstructions in kept:
            real, fake = critic(torch.cat([images, reconstructions])).chunk(2)
            loss = discriminator_loss(real, fake)
            if lecam_weight:
                loss = loss + lecam_weight * lecam(real, fake, step)
            (loss / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(in_groups(second), clip)
        second.step()
        second.zero_grad()
    return tokenizer.state_dict(), critic.state_dict()


@pytest.mark.parametrize(("accumulate", "clip", "lecam_weight"), [(1, None, 0.0), (1, CLIP, 0.001), (2, CLIP, 0.0)])
def test_one_optimizer_equals_the_alternating_loop_bit_for_bit(accumulate, clip, lecam_weight):
    steps = 12 if accumulate == 1 else 8
    model = training(lecam_weight=lecam_weight)
    trainer = small.fit(model, steps, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    assert trainer.global_step == steps
    tokenizer, critic = alternating(steps, accumulate, clip, lecam_weight)
    for name, value in model.tokenizer.state_dict().items():
        assert torch.equal(value, tokenizer[name]), name
    for name, value in model.objective.adversarial.discriminator.state_dict().items():
        assert torch.equal(value, critic[name]), name


def test_a_discriminator_that_has_not_started_is_not_stepped():
    model = training()
    before = copy.deepcopy(model.objective.discriminator.state_dict())
    trainer = small.fit(model, START)
    assert all(torch.equal(value, before[n]) for n, value in model.objective.discriminator.state_dict().items())
    stepped = {id(parameter) for parameter in trainer.optimizers[0].state}
    assert not stepped & {id(parameter) for parameter in model.objective.discriminator.parameters()}


def test_the_generator_term_is_absent_before_the_start_and_there_from_then_on():
    model, images = training(), torch.rand(2, 3, 16, 16)
    plain = ReconstructionObjective()
    for step in (START - 1, START):
        model.tokenizer.train()
        values = [
            float(objective(model.tokenizer, images, step).loss.detach()) for objective in (model.objective, plain)
        ]
        assert (values[0] == values[1]) == (step < START)


def test_the_discriminator_has_its_own_schedule():
    settings = Optimization(
        lr=1e-4,
        min_lr=1e-5,
        warmup_steps=10,
        discriminator=DiscriminatorOptimization(lr=4e-4, warmup_steps=0),
    )
    model = training()
    optimizer, scheduler = settings.build(model, 100, False, model.objective.discriminator, START)
    rates = {role: [] for role in ("tokenizer", "discriminator")}
    for _ in range(101):
        for group in optimizer.param_groups:
            rates[group["role"]].append(group["lr"])
        optimizer.step()
        scheduler.step()
    tokenizer, critic = rates["tokenizer"][::2], rates["discriminator"][::2]
    assert tokenizer[0] == 0 and tokenizer[10] == pytest.approx(1e-4) and tokenizer[100] == pytest.approx(1e-5)
    assert critic[0] == critic[START] == pytest.approx(4e-4) and critic[START + 48] == pytest.approx((4e-4 + 1e-5) / 2)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(1 for _ in model.parameters())


def test_validation_runs_no_discriminator():
    model = training(start_step=0)
    model.objective.discriminator.forward = None
    model.eval()
    with torch.no_grad():
        result = model.objective(model.tokenizer, torch.rand(2, 3, 16, 16), 10)
    assert set(result.terms) == {"pixel", "commitment", "codebook"}
