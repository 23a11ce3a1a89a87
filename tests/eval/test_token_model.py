"""The language model of tokens: its bits bound the entropy from above, and come close where it is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vistok.eval.metric import MetricUnavailable
from vistok.eval.probes import token_model
from vistok.eval.probes.token_model import TokenModel, token_model_probe
from vistok.eval.probes.token_slots import Slots
from vistok.tokenizers.base import Stream

PLAIN = (Stream("image", 8, (6,)),)
SMALL = {"width": 32, "layers": 1, "heads": 2, "batch_tokens": 512, "lr": 1e-2}
DISTRIBUTION = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125])
ENTROPY = 1.9375  # bits
VARIANCE = float((DISTRIBUTION * (-DISTRIBUTION.log2() - ENTROPY) ** 2).sum())


def draw(count, length, distribution=DISTRIBUTION, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return distribution.multinomial(count * length, True, generator=draws).view(count, length)


def markov(count=600, length=8, size=6, branches=2, seed=0):
    """The next code is the last one plus 0 or 1: one bit per token, and ``log2(size)`` for the first."""
    draws = torch.Generator().manual_seed(seed)
    steps = torch.randint(branches, (count, length), generator=draws)
    steps[:, 0] = torch.randint(size, (count,), generator=draws)
    return steps.cumsum(1) % size


def test_independent_tokens_cost_their_entropy_and_not_less():
    result = token_model_probe(draw(2000, 8), PLAIN, 64, steps=40, **SMALL)
    error = math.sqrt(VARIANCE / (result["num_test"] * 8))  # of the mean over the held-out tokens
    assert ENTROPY - 4 * error < result["bits_per_token"] < ENTROPY + 4 * error + 0.03
    assert result["unigram_bits_per_token"] == pytest.approx(result["bits_per_token"], abs=0.03)
    start = result["validation_curve"][0]
    assert start["step"] == 0 and start["bits_per_image"] == pytest.approx(8 * ENTROPY, abs=0.8)
    assert result["fixed_bits_per_token"] == pytest.approx(math.log2(6))
    assert result["bits_per_image_error"] == pytest.approx(math.sqrt(8 * VARIANCE / result["num_test"]), rel=0.2)


def test_tokens_that_follow_from_the_ones_before_cost_what_is_left():
    result = token_model_probe(markov(), PLAIN, 64, steps=120, **SMALL)
    entropy = math.log2(6) + 7
    assert entropy - 0.01 < result["bits_per_image"] < entropy + 0.7
    assert result["unigram_bits_per_image"] > 8 * math.log2(6) - 0.2


def test_a_constant_pattern_costs_nothing():
    pattern = torch.tensor([3, 1, 4, 1, 5, 2, 0, 5]).repeat(100, 1)
    result = token_model_probe(pattern, PLAIN, 64, steps=60, **SMALL)
    assert 0 <= result["bits_per_image"] < 0.3 and result["unigram_bits_per_image"] > 8 * 2


def test_too_many_steps_on_too_few_images_do_not_end_above_the_unigram():
    """Noise can be learned by heart: the weights that are judged are from before that."""
    noise = torch.randint(6, (60, 8), generator=torch.Generator().manual_seed(1))
    result = token_model_probe(noise, PLAIN, 64, steps=80, **SMALL)
    last = result["validation_curve"][-1]
    assert last["bits_per_image"] > result["unigram_bits_per_image"] + 2 and result["best_step"] < last["step"]
    assert result["bits_per_image"] < result["unigram_bits_per_image"] + 1


def test_the_model_starts_as_the_unigram_distribution():
    layout = (Stream("a", 3, (4, 5)), Stream("b", 2, (300,)))
    slots = Slots(layout, largest=20)
    counts = torch.randint(50, (slots.vocab_size,), generator=torch.Generator().manual_seed(0))
    model = TokenModel(slots, 16, 1, 2)
    model.start_as(counts)
    codes = torch.randint(4, (5, slots.length), generator=torch.Generator().manual_seed(1))
    ids = codes + torch.cat([torch.full((n,), first) for first, n in places(slots)])
    costs = model(ids, torch.zeros(5, dtype=torch.int64)).detach()
    torch.testing.assert_close(costs, -slots.log_unigram(counts).float()[ids])


def places(slots):
    """First id of every position, as ``(first, 1)`` in order."""
    first = torch.empty(slots.length, dtype=torch.int64)
    for start, _, positions in slots.groups:
        first[positions] = start
    return [(int(value), 1) for value in first]


def test_no_position_sees_itself_or_later_ones():
    torch.manual_seed(0)
    model = TokenModel(Slots(PLAIN), 16, 2, 2)
    torch.nn.init.normal_(model.head)
    ids, classes = draw(2, 8), torch.zeros(2, dtype=torch.int64)
    before = model(ids, classes)
    for place in range(8):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 6
        after = model(changed, classes)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert (after[:, place:] != before[:, place:]).all()


def test_costs_are_a_distribution_over_the_codes_of_the_position():
    torch.manual_seed(0)
    layout = (Stream("a", 2, (3, 4)),)
    model = TokenModel(Slots(layout), 16, 1, 2)
    torch.nn.init.normal_(model.head)
    grid = torch.cartesian_prod(*(torch.arange(k) + low for k, low in ((3, 0), (4, 3), (3, 0), (4, 3))))
    total = (-model(grid, torch.zeros(len(grid), dtype=torch.int64)).sum(1)).exp().sum()
    assert float(total.detach()) == pytest.approx(1, abs=1e-5)  # of all sequences there are


def test_a_position_trains_its_own_codes_alone():
    torch.manual_seed(0)
    model = TokenModel(Slots((Stream("a", 2, (3, 4)),)), 16, 1, 2)
    ids, classes = torch.tensor([[2, 3, 0, 6]]), torch.zeros(1, dtype=torch.int64)
    for place, rows in ((0, range(3)), (3, range(3, 7))):
        model.zero_grad()
        model(ids, classes)[0, place].backward()
        assert model.head.grad.norm(dim=1).nonzero()[:, 0].tolist() == list(rows)
        assert model.bias.grad.nonzero()[:, 0].tolist() == list(rows)


def test_the_order_of_the_tokens_before_matters():
    torch.manual_seed(0)
    model = TokenModel(Slots(PLAIN), 16, 1, 2)  # one layer alone cannot tell by what the tokens saw before
    torch.nn.init.normal_(model.head)
    ids = torch.tensor([[1, 2, 3, 4, 5, 0, 1, 2], [2, 1, 3, 4, 5, 0, 1, 2]])
    first, second = model(ids, torch.zeros(2, dtype=torch.int64)).detach()[:, 3:]
    assert ((first - second).abs() > 1e-4).all()


def test_a_dropped_token_costs_nothing_whatever_the_model_thinks():
    torch.manual_seed(0)
    model = TokenModel(Slots(PLAIN), 16, 1, 2)
    torch.nn.init.normal_(model.head)
    ids = draw(2, 8)
    ids[0, 5:] = ids[1, 2] = -1
    costs = model(ids, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(costs == 0, ids < 0) and costs.isfinite().all()


def test_dropped_tokens_cost_nothing_and_do_not_count():
    tokens = draw(400, 8)
    lengths = torch.randint(1, 9, (400,), generator=torch.Generator().manual_seed(2))
    tokens[torch.arange(8) >= lengths[:, None]] = -1
    result = token_model_probe(tokens, PLAIN, 64, steps=30, **SMALL)
    kept = result["fixed_bits_per_image"] / math.log2(6)
    assert 3 < kept < 6
    assert result["fixed_bits_per_token"] == pytest.approx(math.log2(6))
    assert result["bits_per_image"] == pytest.approx(kept * result["bits_per_token"])
    assert result["bits_per_token"] == pytest.approx(ENTROPY, abs=0.25)


def test_a_token_is_all_its_sub_codes():
    layout = (Stream("image", 4, (6, 6)),)
    tokens = draw(2000, 8) + torch.tensor([0, 6] * 4)
    result = token_model_probe(tokens, layout, 64, steps=20, **SMALL)
    assert result["bits_per_token"] == pytest.approx(2 * ENTROPY, abs=0.15)
    assert result["bits_per_image"] == pytest.approx(4 * result["bits_per_token"])
    assert result["bits_per_pixel_ar"] == pytest.approx(result["bits_per_image"] / 64)
    assert result["fixed_bits_per_image"] == pytest.approx(8 * math.log2(6))


def test_digits_of_a_large_codebook_cost_what_its_codes_cost(monkeypatch):
    layout = (Stream("image", 3, (64,)),)
    tokens = markov(600, 3, 64, branches=4)
    plain = token_model_probe(tokens, layout, 64, steps=80, **SMALL)
    monkeypatch.setattr(token_model, "Slots", lambda layout: Slots(layout, largest=8))
    digits = token_model_probe(tokens, layout, 64, steps=80, **SMALL)
    assert digits["sequence_length"] == 6 and plain["sequence_length"] == 3
    assert digits["fixed_bits_per_image"] == plain["fixed_bits_per_image"] == 18
    for result in (plain, digits):
        assert 10 < result["bits_per_image"] + 0.3 < 13


def test_classes_that_decide_the_tokens_save_their_bits():
    labels = torch.arange(400) % 4
    tokens = labels[:, None].repeat(1, 8)
    free = token_model_probe(tokens, PLAIN, 64, steps=60, **SMALL)
    told = token_model_probe(tokens, PLAIN, 64, labels=labels, steps=60, **SMALL)
    assert free["bits_per_image"] > 1.9 and told["bits_per_image"] < 0.3
    assert told["class_conditional"] and not free["class_conditional"]
    unknown = token_model_probe(tokens, PLAIN, 64, labels=torch.full((400,), -1), steps=60, **SMALL)
    assert unknown["bits_per_image"] == free["bits_per_image"] and not unknown["class_conditional"]


def test_the_same_seed_gives_the_same_result_in_memory_or_from_a_file(tmp_path):
    tokens = markov(100)
    mapped = np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=(100, 8))
    mapped[:] = tokens.numpy()
    state = torch.get_rng_state()
    first = token_model_probe(tokens, PLAIN, 64, steps=20, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert token_model_probe(mapped, PLAIN, 64, steps=20, **SMALL) == first
    assert token_model_probe(tokens, PLAIN, 64, steps=20, seed=1, **SMALL) != first
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_less_memory_gives_the_same_model(monkeypatch):
    """Batches that do not fit at once are computed in parts, and their gradients add up."""
    whole = token_model_probe(markov(100), PLAIN, 64, steps=20, **SMALL)
    monkeypatch.setattr(token_model, "_LOGITS", 6 * 8 * 3)
    parts = token_model_probe(markov(100), PLAIN, 64, steps=20, **SMALL)
    assert parts["bits_per_image"] == pytest.approx(whole["bits_per_image"], rel=1e-3)


def test_images_train_or_choose_or_judge():
    parts = token_model._split(1000, torch.Generator().manual_seed(0))
    assert [len(part) for part in parts] == [100, 50, 850]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))


def test_steps_are_announced():
    seen = []
    token_model_probe(draw(40, 8), PLAIN, 64, steps=13, **SMALL, advance=seen.append)
    assert seen == [1] * 13


def test_what_cannot_be_modelled_says_why():
    with pytest.raises(MetricUnavailable, match="at least 40 images; got 39"):
        token_model_probe(draw(39, 8), PLAIN, 64)
    with pytest.raises(MetricUnavailable, match="no tokens"):
        token_model_probe(draw(50, 8), (), 64)
    with pytest.raises(ValueError, match=r"shape \(N, 8\)"):
        token_model_probe(draw(50, 7), PLAIN, 64)
    with pytest.raises(ValueError, match="holds 0 to 5"):
        token_model_probe(draw(50, 8) + 1, PLAIN, 64)
    with pytest.raises(ValueError, match="labels"):
        token_model_probe(draw(50, 8), PLAIN, 64, labels=torch.zeros(49, dtype=torch.int64))
    for name in ("steps", "pixels", "width"):
        with pytest.raises(ValueError, match=name):
            token_model_probe(draw(50, 8), PLAIN, **{"pixels": 64, name: 0})


def test_nobody_elses_random_numbers_change(monkeypatch):
    tokens = torch.randint(8, (40, 4))
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    token_model_probe(tokens, (Stream("image", 4, (8,), None),), 64, steps=10, width=8, layers=1, heads=1)
    assert torch.equal(torch.get_rng_state(), before) and not seeded
