"""The benchmark of training steps compares like with like, and gives each part its own cost."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vistok import VectorQuantizer
from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.blur_discriminator import BlurDiscriminator
from vistok.losses.patchgan import PatchGAN
from vistok.losses.perceptual import LPIPSLoss
from vistok.tokenizers.vqgan import VQGAN
from vistok.training.module import TokenizerTraining
from vistok.training.objectives import ReconstructionObjective, as_pixels

_path = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
_spec = importlib.util.spec_from_file_location("vistok_benchmark_train_step", _path)
benchmark = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = benchmark  # dataclasses look their module up
_spec.loader.exec_module(benchmark)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    benchmark.write_trunk("alexnet", path)
    return str(path)


def built(trunk, discriminator, freeze=(), **adversarial):
    torch.manual_seed(0)
    tokenizer = VQGAN(
        VectorQuantizer(32, 8, l2_normalize=True), 32, 32, channel_multipliers=(1, 1), num_blocks=1, latent_channels=32
    )
    objective = ReconstructionObjective(
        l2=4.0,
        perceptual=LPIPSLoss("alex", weight=0.7, trunk_weights=trunk),
        adversarial=AdversarialLoss(discriminator(), weight=0.3, discriminator_weight=0.6, **adversarial),
    )
    return TokenizerTraining(tokenizer, objective, freeze=freeze)


def norm(module):
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("discriminator", "freeze", "options"),
    [
        (lambda: PatchGAN(16, 2), (), {}),
        (lambda: BlurDiscriminator(32, 1), ("encoder", "to_quantizer", "quantizer"), {"lecam_weight": 0.01}),
    ],
)
def test_the_plain_step_has_the_losses_and_gradients_of_ours(trunk, discriminator, freeze, options):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = built(trunk, discriminator, freeze, **options).train()
    result = ours.objective(ours.tokenizer, as_pixels(images), 0)
    result.loss.backward()
    expected = result.terms | {
        "gradient": norm(ours.tokenizer),
        "discriminator gradient": norm(ours.objective.discriminator),
    }
    plain = benchmark.PlainStep(built(trunk, discriminator, freeze, **options), 1.0, benchmark.Timeline(lambda: 0.0))
    found = plain({"image": images})
    assert set(found) == set(expected) - {"logits_real", "logits_fake"}
    for name, value in found.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6), name


def test_the_plain_step_computes_in_contiguous_tensors(trunk):
    plain = benchmark.PlainStep(built(trunk, lambda: PatchGAN(16, 2)), 1.0, benchmark.Timeline(lambda: 0.0))
    layouts = {}

    def see(name):
        return lambda _, inputs, output: layouts.update({name: output.is_contiguous()})

    for network in (plain.tokenizer, plain.discriminator, plain.perceptual[0].networks[0]):
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                layer.register_forward_hook(see(f"{type(network).__name__} {name}"))
    plain({"image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)})
    assert len(layouts) > 15 and all(layouts.values()), layouts


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 32, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_timeline_divides_forward_and_backward_passes_among_the_parts():
    counter, pair = FlopCounterMode(display=False), Pair()
    timeline = benchmark.Timeline(counter.get_total_flops)
    timeline.watch(pair.first, "first")
    timeline.watch(pair.second, lambda inputs: f"second of {len(inputs)}")
    with counter:
        timeline.start()
        pair(torch.randn(4, 8)).sum().backward()
        parts = timeline.stop()
    # Of the first layer there is no gradient at the input, so it makes two products and the second one three.
    assert parts == {"first": 2 * 2 * 4 * 8 * 16, "second of 4": 3 * 2 * 4 * 16 * 32, benchmark.REST: 0}


def test_a_timeline_adds_up_to_the_whole_step():
    readings = iter(range(100))
    timeline = benchmark.Timeline(lambda: next(readings))
    timeline.start()
    for part in ("EMA", "optimizer", "EMA"):
        timeline.mark(part)
    assert timeline.stop() == {benchmark.REST: 1, "EMA": 2, "optimizer": 1}


def test_a_wrong_loss_is_found():
    sides = [benchmark.Side.__new__(benchmark.Side) for _ in range(2)]
    for side, value in zip(sides, (1.0, 1.01), strict=True):
        side.name, side.steps = "ours", [{"values": {"pixel": value, "lpips": 2.0}}]
    assert benchmark.differences(*sides) == pytest.approx(0.01)
    del sides[1].steps[0]["values"]["lpips"]
    with pytest.raises(SystemExit, match="lpips"):
        benchmark.differences(*sides)


def test_changes_of_a_configuration_leave_the_original_alone():
    config = {"model": {"compile": False}}
    assert benchmark.changed(config, {"model.compile": True, "data.batch_size": 2}) == {
        "model": {"compile": True},
        "data": {"batch_size": 2},
    }
    assert config == {"model": {"compile": False}}
