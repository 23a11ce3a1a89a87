"""Semantic alignment: GigaTok's number and gradient, which layers it reaches, and how it listens to a tokenizer."""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from vistok.layers.transformer import Block
from vistok.losses.feature_cache import SampleCache
from vistok.losses.semantic import SemanticAlignment, negative_cosine
from vistok.losses.teachers import Teacher
from vistok.quantizers.vq import VectorQuantizer
from vistok.tokenizers.titok import TiTok
from vistok.tokenizers.vqgan import VQGAN
from vistok.training.ema import ema_copy

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).resolve().parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


class PatchPixels(Teacher):
    """The pixels of every patch are its features, in raster order. Counts the images that it has seen."""

    def __init__(self, grid: tuple[int, int] = (4, 4), side: int = 2, shift: float = 0.0) -> None:
        super().__init__()
        self.grid, self.side, self.shift, self.seen = grid, side, shift, 0
        self.dim = 3 * side**2

    def forward(self, images):
        self.seen += len(images)
        images = F.interpolate(images, (self.grid[0] * self.side, self.grid[1] * self.side))
        return F.unfold(images, self.side, stride=self.side).transpose(1, 2) + self.shift

    def fingerprint(self):
        return {"grid": list(self.grid), "shift": self.shift}


def titok(decoder_layers: int = 4, image_size: int | tuple[int, int] = 16) -> TiTok:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=16, dim=4)
    return TiTok(quantizer, image_size, 4, 5, (32, 1, 2), (48, decoder_layers, 2))


def term(teacher: Teacher | None = None, layer: str = "decoder.blocks.1", **options) -> SemanticAlignment:
    torch.manual_seed(1)
    return SemanticAlignment(teacher or PatchPixels(), layer, **{"precision": "float32"} | options)


def attached(tokenizer, *arguments, **options) -> SemanticAlignment:
    subject = term(*arguments, **options)
    subject.attach(tokenizer)
    return subject


def pictures(batch: int = 2, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------------------------------- the number
def test_value_and_gradient_are_gigatoks():
    config, _, io = parity.fixture("losses-gigatok-align")
    student = io["student"].clone().requires_grad_()
    loss = negative_cosine(student, io["teacher"])
    (config["proj_weight"] * loss).backward()
    torch.testing.assert_close(loss.detach(), io["proj_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(config["proj_weight"] * loss.detach(), io["weighted_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, io["grad_student"], rtol=0, atol=1e-4 * io["grad_student"].abs().max())
    assert SemanticAlignment(PatchPixels(), student_dim=8).weight == config["proj_weight"]


def test_equals_the_loop_over_images_and_patches():
    tokenizer, images = titok(), pictures()
    subject = attached(tokenizer)
    hidden = []
    tokenizer.decoder.blocks[1].register_forward_hook(lambda *call: hidden.append(call[2]))
    tokenizer(images)
    loss = subject(images)
    cosines = []
    for image, tokens in zip(images, hidden[0], strict=True):
        for row in range(4):
            for column in range(4):
                patch = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                target = F.interpolate(patch[None], (2, 2))[0].flatten()
                projected = subject.projector(tokens[1 + 4 * row + column])  # token 0 is the class token
                cosines.append(F.cosine_similarity(projected, target, dim=0))
    torch.testing.assert_close(loss, -torch.stack(cosines).mean(), rtol=1e-5, atol=1e-6)


def test_is_minus_one_for_equal_and_one_for_opposite_features():
    features = torch.randn(2, 3, 5)
    for factor, expected in ((7.0, -1.0), (-0.1, 1.0)):
        assert negative_cosine(factor * features, features).item() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(negative_cosine(torch.zeros(1, 1, 5), features[:1, :1]))


@pytest.mark.parametrize(("width", "parameters"), [(512, 6_820_608), (768, 14_162_688), (1024, 24_126_208)])
def test_the_projector_has_the_published_number_of_parameters(width, parameters):
    teacher = PatchPixels()
    teacher.dim = 768
    with torch.device("meta"):
        projector = SemanticAlignment(teacher, student_dim=width).projector
    assert sum(p.numel() for p in projector.parameters()) == parameters
    assert [type(part) for part in projector] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]


# ------------------------------------------------------------------------------------------------------------ gradients
def test_the_gradient_reaches_the_layers_up_to_the_chosen_one_only():
    tokenizer, teacher, images = titok(), PatchPixels(), pictures()
    teacher.weight = nn.Parameter(torch.ones(()))
    subject = attached(tokenizer, teacher)
    tokenizer(images)
    subject(images).backward()
    touched = {name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("encoder.blocks.0") for name in touched)
    for layer, reached in (("0", True), ("1", True), ("2", False), ("3", False)):
        assert any(name.startswith(f"decoder.blocks.{layer}.") for name in touched) == reached
    assert not {name for name in touched if "norm_out" in name and "decoder" in name or "conv_out" in name}
    assert all(p.grad.abs().sum() > 0 for p in subject.projector.parameters())
    assert teacher.weight.grad is None


def test_no_graph_is_kept_alive():
    tokenizer, images = titok(), pictures()
    subject = attached(tokenizer)
    alive = []
    tokenizer.decoder.blocks[1].register_forward_hook(lambda *call: alive.append(weakref.ref(call[2])))
    for finish in (lambda: subject(images).detach(), lambda: subject.hold().detach()):
        tokenizer(images)
        finish()
        gc.collect()
        assert alive.pop()() is None
    with pytest.raises(RuntimeError, match="'decoder.blocks.1' has not run"):
        subject(images)


def test_hold_is_zero_and_keeps_every_parameter_in_the_graph():
    tokenizer = titok()
    subject = attached(tokenizer, start_step=10)
    assert not subject.active(9) and subject.active(10)
    loss = subject.hold()
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in subject.parameters())


def test_training_it_alone_aligns_the_layer():
    tokenizer, images = titok(), pictures(4)
    subject = attached(tokenizer)
    optimizer = torch.optim.AdamW([*tokenizer.parameters(), *subject.parameters()], 2e-3)
    losses = []
    for _ in range(30):
        tokenizer(images)
        loss = subject(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > -0.4 and losses[-1] < -0.8


# ------------------------------------------------------------------------------------------------------------ listening
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_compiled_in_place_change_nothing(backend):
    images = pictures()

    def gradients(compiled: bool) -> list[torch.Tensor]:
        tokenizer = titok(decoder_layers=3)
        average = ema_copy(tokenizer)
        subject = attached(tokenizer)
        subject.attach(average)
        if compiled:
            for block in [*tokenizer.modules(), *average.modules()]:
                if isinstance(block, Block):
                    block.compile(backend=backend)
        results = []
        for _ in range(2):
            tokenizer.zero_grad()
            tokenizer(images)
            loss = subject(images)
            loss.backward()
            with torch.no_grad():
                average(images + 0.1)
                results += [loss.detach(), subject(images)]
        return results + [p.grad for p in tokenizer.parameters() if p.grad is not None]

    for plain, compiled in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


def test_the_tokenizer_that_ran_last_counts():
    images, other = pictures(), pictures().flip(-1)
    tokenizer = titok()
    average = ema_copy(tokenizer)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(0.05)
    subject = attached(tokenizer)
    subject.attach(average)
    losses = {}
    for name, model, inputs in (("raw", tokenizer, images), ("ema", average, images), ("other", tokenizer, other)):
        model(inputs)
        losses[name] = subject(images).item()
    assert len(set(losses.values())) == 3
    average(images), tokenizer(images)
    assert subject(images).item() == losses["raw"]


def test_a_copied_tokenizer_does_not_copy_the_loss():
    tokenizer, images = titok(), pictures()
    subject = attached(tokenizer)
    copied = copy.deepcopy(tokenizer)
    copied(images)
    subject(images)
    assert set(copied.state_dict()) == set(titok().state_dict())
    pickle.loads(pickle.dumps(tokenizer))(images)  # as strategies that spawn processes do


def test_nothing_but_the_projector_is_trained_or_saved():
    tokenizer = titok()
    subject = attached(tokenizer)
    assert {name.split(".")[0] for name in subject.state_dict()} == {"projector"}
    assert {name.split(".")[0] for name, _ in subject.named_parameters()} == {"projector"}
    again = attached(titok())
    again.load_state_dict(subject.state_dict())


# ------------------------------------------------------------------------------------------------------- maps and grids
def test_layers_of_a_convolutional_decoder_are_maps_in_raster_order():
    torch.manual_seed(0)
    tokenizer = VQGAN(VectorQuantizer(codebook_size=8, dim=4), 16, 32, (1, 2), 1, 8, attention_levels=())
    subject = attached(tokenizer, PatchPixels((8, 8)), "decoder.middle", projector_layers=1)
    maps = []
    tokenizer.decoder.middle.register_forward_hook(lambda *call: maps.append(call[2]))
    images = pictures()
    tokenizer(images)
    loss = subject(images)
    projected = F.conv2d(maps[0], subject.projector[0].weight[..., None, None], subject.projector[0].bias)
    target = subject.teacher(images).transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(loss, -F.cosine_similarity(projected, target, dim=1).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_differing_grids_are_resampled_on_the_chosen_side(side):
    tokenizer, images = titok(image_size=(16, 24)), pictures(2, (16, 24))  # 4 x 6 patches
    teacher = PatchPixels((2, 4))
    subject = attached(tokenizer, teacher, resample=side)
    hidden = []
    tokenizer.decoder.blocks[1].register_forward_hook(lambda *call: hidden.append(call[2]))
    tokenizer(images)
    loss = subject(images)
    student = hidden[0][:, 1:25].transpose(1, 2).unflatten(2, (4, 6))
    target = teacher(images).transpose(1, 2).unflatten(2, (2, 4))
    if side == "student":
        student = F.interpolate(student, (2, 4), mode="bilinear", align_corners=False)
    else:
        target = F.interpolate(target, (4, 6), mode="bilinear", align_corners=False)
    projected = subject.projector(student.flatten(2).transpose(1, 2))
    expected = -F.cosine_similarity(projected, target.flatten(2).transpose(1, 2), dim=-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_projector_is_near_and_the_loss_float32():
    tokenizer, images = titok(), pictures()
    subject = attached(tokenizer)
    tokenizer(images)
    exact = subject(images)
    subject.precision = "bfloat16"
    for hidden in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=hidden == torch.bfloat16):
            tokenizer(images)
            rough = subject(images)
        assert rough.dtype == torch.float32 and rough.item() != exact.item()
        assert rough.item() == pytest.approx(exact.item(), abs=0.03)
    subject.precision = "float32"
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer(images)
        assert subject(images).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------- cache
def test_a_cached_teacher_sees_every_training_sample_once(tmp_path):
    tokenizer, images = titok(), pictures(3)
    teacher = PatchPixels()
    cached = attached(tokenizer, teacher, cache=SampleCache(str(tmp_path), 10, "float32"))
    plain = attached(tokenizer)

    def both(rows: list[int]) -> None:
        tokenizer(images[rows])
        expected = plain(images[rows])
        tokenizer(images[rows])
        assert torch.equal(cached(images[rows], torch.tensor(rows) + 4), expected)

    for rows, seen in (([0, 1], 2), ([1, 0], 2), ([0, 2], 3), ([2, 1, 0], 3)):
        both(rows)
        assert teacher.seen == seen
    cached.eval()
    tokenizer(images)
    cached(images, torch.tensor([4, 5, 6]))  # another dataset's samples
    assert teacher.seen == 6
    with pytest.raises(ValueError, match="cache needs the indices"):
        tokenizer(images)
        cached.train()(images)


def test_the_cache_of_another_teacher_or_image_size_is_refused(tmp_path):
    tokenizer = titok()

    def run(teacher: Teacher, size: int = 16) -> None:
        subject = attached(tokenizer, teacher, cache=SampleCache(str(tmp_path), 4))
        tokenizer(pictures())
        subject(pictures(2, (size, size)), torch.tensor([0, 1]))

    run(PatchPixels())
    with pytest.raises(ValueError, match=r"fingerprint.shift is 0.0 there, 1.0 here"):
        run(PatchPixels(shift=1.0))
    with pytest.raises(ValueError, match=r"fingerprint.images is \[16, 16\] there, \[32, 32\] here"):
        run(PatchPixels(), 32)


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_layer_that_does_not_exist_is_named_with_its_neighbours():
    for layer, words in (
        ("decoder.blocks.9", "'decoder.blocks' has 0, 1, 2, 3"),
        ("decoder.layers.1", "'decoder' has .*blocks"),
        ("dekoder", "this TiTok has encoder, .*decoder"),
        ("decoder.norm_out.x", "'decoder.norm_out' has no layers"),
    ):
        with pytest.raises(ValueError, match=f"layer '{layer}' does not exist; {words}"):
            attached(titok(), None, layer)


def test_a_layer_that_does_not_suit_says_what_would():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pair = nn.Linear(4, 6), nn.Identity()

    bare = Bare()
    subject = attached(bare, None, "layer")
    with pytest.raises(ValueError, match="no module that holds it has patch_tokens"):
        bare.layer(torch.zeros(2, 16, 4))
        subject(pictures())
    with pytest.raises(ValueError, match=r"must put out .* got shape \(2, 6\)"):
        bare.layer(torch.zeros(2, 4))
        subject(pictures())
    with pytest.raises(ValueError, match="Identity of unknown width; give student_dim"):
        attached(bare, None, "pair")
    subject = attached(bare, None, "pair", student_dim=6)
    with pytest.raises(ValueError, match="got tuple"):
        bare.pair((torch.zeros(1), 1))
        subject(pictures())
    tokenizer = titok()
    for options, batch in (({"student_dim": 47}, 2), ({}, 3)):
        subject = attached(tokenizer, **options)
        tokenizer(pictures())
        with pytest.raises(ValueError, match=rf"put out \(2, 16, 48\) .* expected \({batch}, 16, 4[78]\)"):
            subject(pictures(batch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projector_layers": 0}, "projector_layers.*0"),
        ({"resample": "both"}, "resample.*'both'"),
        ({"weight": -1.0}, "weight.*-1"),
        ({"precision": "float16"}, "precision.*'float16'"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        term(**options)


def test_it_can_be_written_in_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--term", type=SemanticAlignment)
    path = "vistok.losses"
    arguments = {
        "teacher": {"class_path": f"{path}.teachers.TimmTeacher", "init_args": {"image_size": [224, 224]}},
        "cache": {"class_path": f"{path}.feature_cache.SampleCache", "init_args": {"folder": "x", "num_samples": 5}},
        "resample": "teacher",
    }
    config = {"term": {"class_path": f"{path}.semantic.SemanticAlignment", "init_args": arguments}}
    parsed = parser.parse_object(config)  # checks every argument against the hints; builds nothing
    assert parsed.term.init_args.teacher.init_args.antialias is False
    assert parsed.term.init_args.cache.init_args.dtype == "float16"
