"""The linear probe: finds what is there, finds nothing where nothing is, and takes the published steps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.probes import linear as probe_module
from vistok.eval.probes.features import PooledFeatures
from vistok.eval.probes.linear import Probe, class_numbers, lars, linear_probe, num_steps

SHORT = {"epochs": 20, "warmup_epochs": 2, "batch_size": 64}


def features(count, classes=8, dim=16, seed=0, spread=0.3, shuffled=False, labels=None):
    """Clusters around one centre per class; with ``shuffled`` the labels say nothing about them."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    if labels is None:
        labels = torch.randint(classes, (count,), generator=draws)
    rows = centres[labels] + spread * torch.randn(count, dim, generator=draws)
    if shuffled:
        labels = torch.randint(classes, (count,), generator=draws)
    return PooledFeatures("encoder", "encoder", rows.numpy(), np.arange(count), labels)


def test_classes_that_a_plane_separates_are_told_apart():
    result = linear_probe(features(800), features(300, seed=1), **SHORT)
    assert result["top1"] > 0.99 and result["top5"] == 1.0
    assert (result["num_classes"], result["num_train"], result["num_val"]) == (8, 800, 300)


def test_labels_that_say_nothing_give_chance():
    result = linear_probe(features(800, shuffled=True), features(2000, seed=1, shuffled=True), **SHORT)
    error = math.sqrt(1 / 8 * 7 / 8 / 2000)
    assert abs(result["top1"] - 1 / 8) < 4 * error
    assert abs(result["top5"] - 5 / 8) < 4 * math.sqrt(5 / 8 * 3 / 8 / 2000)


def test_the_published_trust_coefficient_alone_hardly_moves_on_few_images():
    """Why there is more than one."""
    data = features(400, spread=1.0), features(300, seed=1, spread=1.0)
    published = linear_probe(*data, **SHORT, trust_coefficients=(0.001,))
    chosen = linear_probe(*data, **SHORT)
    assert chosen["top1"] > published["top1"] + 0.1 and chosen["trust"] > 0.001
    assert published["trials"] == [] and len(chosen["trials"]) == 4


def test_the_trust_coefficient_is_chosen_by_training_images_alone():
    """Whatever the validation labels are, the choice and the held-out accuracies stay."""
    train, val = features(400, spread=1.0), features(300, seed=1, spread=1.0)
    wrong = PooledFeatures("encoder", "encoder", val.rows, val.index, (val.labels + 1) % 8)
    first, second = linear_probe(train, val, **SHORT), linear_probe(train, wrong, **SHORT)
    assert first["trust"] == second["trust"] and first["top1"] > second["top1"]
    held_out = [[trial["held_out_top1"] for trial in result["trials"]] for result in (first, second)]
    assert held_out[0] == held_out[1]
    assert first["trust"] == max(first["trials"], key=lambda trial: trial["held_out_top1"])["trust"]


def test_one_step_of_lars_is_the_closed_form():
    torch.manual_seed(0)
    heads = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    before = [(head.weight.detach().clone(), head.bias.detach().clone()) for head in heads]
    optimizer = lars(heads, 0.4, (0.001, 0.1))
    gradients = [(torch.randn(3, 5), torch.randn(3)) for _ in range(2)]
    for weight, bias in gradients:
        for head in heads:
            head.weight.grad, head.bias.grad = weight.clone(), bias.clone()
        optimizer.step()
    for head, (weight, bias), trust in zip(heads, before, (0.001, 0.1), strict=True):
        speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
        for gradient, bias_gradient in gradients:
            speed = 0.9 * speed + trust * weight.norm() / gradient.norm() * gradient
            bias_speed = 0.9 * bias_speed + bias_gradient
            weight, bias = weight - 0.4 * speed, bias - 0.4 * bias_speed
        torch.testing.assert_close(head.weight.detach(), weight)
        torch.testing.assert_close(head.bias.detach(), bias)


def test_heads_that_train_side_by_side_learn_what_they_would_learn_alone():
    """The first of them, without held-out images of its own, must be the probe that trains with it alone."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randint(4, (32,))
    weights = []
    for count in (1, 3):
        probe = Probe(6, 4, count, torch.Generator().manual_seed(0))
        optimizer = lars(probe.heads, 0.5, (0.01, 0.1, 1.0)[:count])
        for _ in range(5):
            logits = probe(x)
            loss = sum(torch.nn.functional.cross_entropy(part, y) for part in logits)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(probe.heads[0].weight.detach())
    torch.testing.assert_close(*weights)


def test_scale_and_offset_of_the_features_do_not_matter():
    train, val = features(400, spread=1.0), features(200, seed=1, spread=1.0)
    moved = [
        PooledFeatures("encoder", "encoder", 1000 * part.rows + 50, part.index, part.labels) for part in (train, val)
    ]
    assert abs(linear_probe(train, val, **SHORT)["top1"] - linear_probe(*moved, **SHORT)["top1"]) < 0.02


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    train, val = features(300, spread=1.0), features(300, seed=1, spread=1.0)
    global_state = torch.get_rng_state()
    first = linear_probe(train, val, **SHORT, seed=3)
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.manual_seed(123)
    assert linear_probe(train, val, **SHORT, seed=3) == first
    assert linear_probe(train, val, **SHORT, seed=4)["trials"] != first["trials"]


def test_the_majority_is_the_commonest_training_class_among_the_validation_images():
    train = features(60, labels=torch.tensor([7] * 30 + [2] * 20 + [4] * 10))
    val = features(10, labels=torch.tensor([7, 7, 7, 2, 2, 2, 2, 2, 4, 4]))
    assert linear_probe(train, val, **SHORT)["majority"] == 0.3


def test_validation_images_of_a_class_that_was_not_trained_count_as_wrong():
    train, val = features(200, classes=4), features(100, classes=4, seed=1)
    val.labels[:50] = 77
    result = linear_probe(train, val, **SHORT)
    assert result["top1"] == 0.5 and "top5" not in result
    numbers = class_numbers(torch.tensor([1, 5, 9, 0, 6, 10]), torch.tensor([1, 5, 9]))
    assert numbers.tolist() == [0, 1, 2, -1, -1, -1]


def test_rows_are_found_by_the_number_of_their_image():
    """The rows of images that were not chosen, or not readable, are never looked at."""
    whole, val = features(400, spread=1.0), features(100, seed=1, spread=1.0)
    rows = np.full((800, 16), np.nan, dtype=np.float32)
    rows[1::2] = whole.rows
    sparse = PooledFeatures("encoder", "encoder", rows, np.arange(1, 800, 2), whole.labels)
    assert linear_probe(sparse, val, **SHORT) == linear_probe(whole, val, **SHORT)


def test_steps_are_announced_and_counted():
    seen = []
    result = linear_probe(features(205), features(20, seed=1), **SHORT, advance=seen.append)
    assert sum(seen) == result["steps"] == num_steps(205, 20, 64) == 20 * 2  # 185 images train
    assert num_steps(205, 20, 64, 1) == 20 * 3
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_what_cannot_be_probed_says_why():
    train, val = features(100), features(20, seed=1)
    with pytest.raises(MetricUnavailable, match="no labels"):
        linear_probe(train, features(20, labels=torch.arange(20) % 8 - 1))
    with pytest.raises(MetricUnavailable, match="20 training images"):
        linear_probe(features(19), val)
    with pytest.raises(MetricUnavailable, match="two classes"):
        linear_probe(features(40, labels=torch.full((40,), 3)), val)
    with pytest.raises(ValueError, match="same features"):
        linear_probe(train, PooledFeatures("decoder", "decoder.norm_out", val.rows, val.index, val.labels))
    with pytest.raises(ValueError, match="warmup_epochs"):
        linear_probe(train, val, epochs=5, warmup_epochs=6)
    with pytest.raises(ValueError, match="positive"):
        linear_probe(train, val, trust_coefficients=())


class Spy:
    """Stands in for :func:`lars`: remembers the layers, and the learning rate of every step."""

    def __init__(self, monkeypatch):
        self.heads, self.rates = None, []
        monkeypatch.setattr(probe_module, "lars", self)

    def __call__(self, heads, lr, trust_coefficients):
        self.heads, optimizer = heads, lars(heads, lr, trust_coefficients)
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.rates.append(optimizer.param_groups[-1]["lr"]))
        return optimizer


def test_the_learning_rate_rises_in_the_warm_up_and_falls_as_a_cosine(monkeypatch):
    spy = Spy(monkeypatch)
    linear_probe(features(640), features(20), epochs=10, warmup_epochs=2, batch_size=64, trust_coefficients=(0.001,))
    peak = 0.1 * 64 / 256
    rising = [peak * step / 20 for step in range(20)]
    falling = [peak * (1 + math.cos(math.pi * step / 80)) / 2 for step in range(80)]
    assert spy.rates == pytest.approx(rising + falling)


def test_how_a_layer_trains_does_not_depend_on_how_many_train_beside_it(monkeypatch):
    spy, biases = Spy(monkeypatch), []
    for coefficients in ((0.01, 0.1), (0.01, 0.1, 1.0)):
        linear_probe(features(200), features(20), **SHORT, trust_coefficients=coefficients)
        biases.append([head.bias.detach().clone() for head in spy.heads])
    torch.testing.assert_close(biases[0], biases[1][:2])


def test_the_images_that_choose_do_not_train():
    """Labels that say nothing can be learned by heart in many dimensions, but not those of other images."""
    train = features(200, dim=256, spread=3.0, shuffled=True)
    trials = linear_probe(train, train, **SHORT)["trials"]
    assert trials[-1]["top1"] > 0.75 and max(trial["held_out_top1"] for trial in trials) < 0.5


def test_an_image_is_judged_by_itself():
    """By the training images' mean and variance: a single validation image has none."""
    result = linear_probe(features(400), features(1, seed=1), **SHORT)
    assert result["top1"] == 1.0
