"""Optimizer groups, schedule, moving average, objective: each against a closed form."""

import math

import pytest
import torch
from torch import nn

from vistok import VQGAN, TATiTok, TiTok, VectorQuantizer
from vistok.eval.reconstruction import psnr
from vistok.eval.tokens.codebook import codebook_statistics
from vistok.training.ema import ema_copy, ema_decay, ema_update
from vistok.training.objectives import ReconstructionObjective
from vistok.training.optimization import Optimization, parameter_groups
from vistok.training.schedules import Ramp


def titok():
    torch.manual_seed(0)
    return TiTok(VectorQuantizer(16, 4), 16, 8, 3, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2))


def vqgan():
    return VQGAN(VectorQuantizer(16, 4), 8, channels=32, channel_multipliers=(1, 1), num_blocks=1, latent_channels=8)


@pytest.mark.parametrize("make", [titok, vqgan])
def test_only_matrices_decay(make):
    module = make()
    decaying, others = parameter_groups(module, 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {id(p) for p in decaying["params"] + others["params"]} == set(names)
    assert all(p.ndim >= 2 for p in decaying["params"])
    exempt = {names[id(p)] for p in others["params"]}
    assert "quantizer.codebook" in exempt
    if make is titok:
        for name in ("encoder.latent_tokens", "encoder.position", "encoder.class_token", "decoder.mask_token"):
            assert name in exempt
        # A published recipe that excludes by substring ("embed") misses exactly these two.
        assert {"encoder.patchify.weight", "decoder.embed.weight"} <= {names[id(p)] for p in decaying["params"]}


def test_frozen_parameters_are_in_no_group():
    module = titok()
    module.encoder.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(module, 0.1) for p in group["params"]}
    assert not listed & {id(p) for p in module.encoder.parameters()}


def test_schedule_has_the_published_values():
    """TiTok stage 1: 1e-4 to 1e-5 by cosine over a million steps after 10 000 of warm-up."""
    schedule = Optimization(lr=1e-4, min_lr=1e-5, warmup_steps=10_000)
    values = [schedule.lr * schedule.factor(step, 1_000_000) for step in (0, 5_000, 10_000, 505_000, 1_000_000)]
    assert values == pytest.approx([0, 5e-5, 1e-4, 5.5e-5, 1e-5])
    assert Optimization(schedule="constant").factor(10**9, math.inf) == 1.0


def test_a_warm_up_can_start_above_zero():
    """GigaTok: from a hundredth of the peak over 5000 steps, then by cosine to a tenth of it at a million."""
    schedule = Optimization(lr=1e-4, min_lr=1e-5, warmup_steps=5_000, warmup_lr=1e-6)
    values = [schedule.lr * schedule.factor(step, 1_000_000) for step in (0, 5_000, 502_500, 1_000_000, 1_200_000)]
    assert values == pytest.approx([1e-6, 1e-4, 5.5e-5, 1e-5, 1e-5])


def test_schedule_mistakes_are_named():
    with pytest.raises(ValueError, match="'linear'"):
        Optimization(schedule="linear")
    with pytest.raises(ValueError, match="min_lr=1.0"):
        Optimization(lr=0.1, min_lr=1.0)
    with pytest.raises(ValueError, match="max_steps"):
        Optimization().build(titok(), math.inf, fused=False)


def test_average_ramps_up_and_follows_the_closed_form():
    assert [ema_decay(step, 0.999) for step in (0, 1, 2)] == [0, 2 / 11, 3 / 12]
    assert ema_decay(8_990, 0.999) == 0.999 > ema_decay(8_900, 0.999)
    model = nn.BatchNorm1d(3)
    average = ema_copy(model)
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(3))
            model.running_mean.add_(1)
            model.num_batches_tracked.add_(1)
        decay = ema_decay(step, 0.9)
        expected = decay * expected + (1 - decay) * model.weight.detach()
        ema_update(average, model, decay)
        assert torch.allclose(average.weight, expected)
        assert torch.equal(average.running_mean, model.running_mean)
        assert torch.equal(average.num_batches_tracked, model.num_batches_tracked)


def test_objective_is_the_weighted_sum_of_its_terms():
    tokenizer, x = titok(), torch.rand(2, 3, 16, 16)
    result = ReconstructionObjective(l1=1.0, l2=0.0, quantizer_weights={"commitment": 0.5})(tokenizer, x, step=0)
    expected = result.terms["pixel"] + 0.5 * result.terms["commitment"] + 1.0 * result.terms["codebook"]
    assert torch.allclose(result.loss.detach(), expected)
    off = ReconstructionObjective(quantizer_weights={"codebook": 0.0})(tokenizer, x, step=0)
    off.loss.backward()
    assert tokenizer.quantizer.codebook.grad is None


def test_objective_refuses_losses_nobody_computes():
    with pytest.raises(ValueError, match=r"\['entropy'\]; .*\['codebook', 'commitment'\]"):
        ReconstructionObjective(quantizer_weights={"entropy": 0.1})(titok(), torch.rand(1, 3, 16, 16), 0)


def test_psnr_equals_its_definition():
    x = torch.rand(3, 3, 8, 8)
    y = (x + 0.1 * torch.randn(3, 3, 8, 8)).clamp(0, 1)
    expected = [10 * math.log10(1 / float(((x[i] - y[i]) ** 2).mean())) for i in range(3)]
    assert psnr(y, x).tolist() == pytest.approx(expected, rel=1e-4)
    assert psnr(x + 3 * (x == 1), x).tolist() == pytest.approx([100] * 3)
    with pytest.raises(ValueError, match="one shape"):
        psnr(x, x[:2])


def test_codebook_statistics_of_known_distributions():
    uniform = codebook_statistics(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]), (8,))
    assert float(uniform["usage"]) == 0.5 and float(uniform["perplexity"]) == pytest.approx(4)
    two = codebook_statistics(torch.tensor([9, 0, 1, 1, 1, 1]), (2, 4))
    assert float(two["usage"]) == pytest.approx(5 / 6) and float(two["perplexity"]) == pytest.approx((1 + 4) / 2)
    assert float(codebook_statistics(torch.zeros(4, dtype=torch.int64), (4,))["usage"]) == 0
    assert float(two["dead_codes"]) == 1 and "usage/0" not in uniform
    assert [float(two[f"usage/{level}"]) for level in range(2)] == [0.5, 1]
    assert [float(two[f"perplexity/{level}"]) for level in range(2)] == pytest.approx([1, 4])
    with pytest.raises(ValueError, match=r"\(6,\); got \(5,\)"):
        codebook_statistics(torch.zeros(5), (2, 4))


def test_a_quantizer_weight_can_ramp_over_the_steps():
    ramp = Ramp(start=3.0, end=1.0, steps=4, begin=2)
    assert [ramp.at(step) for step in (0, 2, 3, 4, 6, 100)] == [3, 3, 2.5, 2, 1, 1]
    images, model = torch.rand(2, 3, 16, 16), titok()
    objective = ReconstructionObjective(quantizer_weights={"codebook": 0.0, "commitment": ramp})
    for step in (0, 4):
        result = objective(model, images, step)
        expected = result.terms["pixel"] + ramp.at(step) * result.terms["commitment"]
        torch.testing.assert_close(result.loss.detach(), expected)
    with pytest.raises(ValueError, match="steps=0"):
        Ramp(1, 0, 0)


class Letters(nn.Module):
    """Two features of width 4 per caption: its length, and its first letter."""

    def forward(self, texts):
        rows = [[[len(text)] * 4, [ord(text[0])] * 4] for text in texts]
        return torch.tensor(rows, dtype=torch.float32) / 100


def test_captions_reach_the_decoder_and_images_that_are_not_the_input_the_losses():
    torch.manual_seed(0)
    tokenizer = TATiTok(
        VectorQuantizer(16, 4), 16, 8, 3, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2), text_dim=4, text_length=2
    )
    objective, images = ReconstructionObjective(text_encoder=Letters()), torch.rand(2, 3, 16, 16)
    short, long = ({"text": texts} for texts in (["a cat", "a dog"], ["a cat on a mat", "some dog"]))
    losses = [float(objective(tokenizer, images, 0, batch).terms["pixel"]) for batch in (short, short, long)]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match="captions"):
        objective(tokenizer, images, 0, {})

    target = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    result = ReconstructionObjective()(titok(), images, 0, {"target": target})
    expected = (result.reconstruction - target / 255).square().mean()
    torch.testing.assert_close(result.terms["pixel"], expected)
    torch.testing.assert_close(result.target, target / 255)
