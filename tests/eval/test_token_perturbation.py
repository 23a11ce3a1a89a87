"""Perturbed tokens: which, how many, to what; the same whatever the batch; and the deltas of a codebook."""

import math

import pytest
import torch

from vistok import TiTok, VectorQuantizer
from vistok.decoders.cnn import CNNDecoder
from vistok.encoders.cnn import CNNEncoder
from vistok.eval.metric import MetricUnavailable, Originals
from vistok.eval.tokens import code_neighbours
from vistok.eval.tokens import perturbation as token_perturbation
from vistok.eval.tokens.counter_draws import counter_draws
from vistok.eval.tokens.perturbation import TokenPerturbation, deltas_for
from vistok.eval.variants import Codes
from vistok.quantizers.bernoulli import BernoulliQuantizer
from vistok.quantizers.factorized import Factorized
from vistok.quantizers.fsq import FiniteScalarQuantizer
from vistok.quantizers.grouped import Grouped
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.multi_scale import MultiScaleResidual
from vistok.quantizers.perturbation import LatentPerturbation
from vistok.quantizers.product import Product
from vistok.quantizers.residual import Residual
from vistok.quantizers.scalar import ScalarQuantizer
from vistok.tokenizers.autoencoder import AutoencoderTokenizer
from vistok.tokenizers.base import Tokens


def vq(codes=64, dim=4, **kwargs):
    inner = VectorQuantizer(codes, dim, **kwargs)
    with torch.no_grad():
        inner.codebook.normal_()
    return inner


def titok(quantizer=None, tokens=20):
    torch.manual_seed(0)
    quantizer = quantizer or vq()
    return TiTok(
        quantizer, 16, patch_size=8, num_latent_tokens=tokens, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2)
    ).eval()


def grid(quantizer):
    """A tokenizer with a 4x4 grid of latents, for quantizers that need one."""
    torch.manual_seed(0)
    parts = {"channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1, "middle_attention": False}
    encoder, decoder = CNNEncoder(**parts, out_dim=quantizer.dim), CNNDecoder(**parts, in_dim=quantizer.dim)
    return AutoencoderTokenizer(encoder, quantizer, decoder, image_size=8).eval()


def originals(numbers, side=16):
    images = [
        torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        for n in numbers
    ]
    index = torch.tensor(numbers)
    return Originals(index, [str(n) for n in numbers], torch.full_like(index, -1), torch.stack(images))


def flat(tokens):
    return torch.cat([tokens.indices[stream.name].flatten(1) for stream in tokens.layout], 1)


def perturb(tokenizer, numbers, alpha=0.5, strength=1, side=16, **options):
    batch = originals(numbers, side)
    perturbation = TokenPerturbation(Codes(tokenizer), **options)
    return perturbation.codes.tokens(batch), perturbation.tokens(batch, alpha, strength)


# ---- draws


def test_draws_are_those_of_splitmix64():
    def mix(state):
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        return state ^ (state >> 31)

    for seed in (0, 7, -3):
        found = counter_draws(seed, torch.tensor([0, 5, 49_999]), 4)
        for row, index in zip(found.tolist(), (0, 5, 49_999), strict=True):
            start = mix((mix(seed % 2**64) + index) % 2**64)
            expected = [mix((start + step * 0x9E3779B97F4A7C15) % 2**64) >> 33 for step in range(1, 5)]
            assert row == expected


def test_draws_are_uniform_and_do_not_depend_on_their_number():
    draws = counter_draws(1, torch.arange(400), 100)
    counts = torch.bincount(draws.flatten() >> 27, minlength=16).double()  # sixteen equal bins
    assert ((counts - 2500).square() / 2500).sum() < 45  # chi squared, 15 degrees of freedom
    assert torch.equal(counter_draws(1, torch.arange(400), 30), draws[:, :30])
    assert abs(torch.corrcoef(draws[:, :2].double().t())[0, 1]) < 0.2


# ---- how many tokens, which ones, to what


@pytest.mark.parametrize("alpha", [0.0, 0.33, 0.5, 0.9, 1.0])
def test_exactly_the_rounded_share_is_offered_to_change(alpha, monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (64, 64, 64))
    before, after = perturb(titok(tokens=200), range(6), alpha)
    changed = (flat(before) != flat(after)).sum(1)
    chosen = math.floor(200 * alpha + 0.5)
    assert (changed <= chosen).all()  # a token may draw its own code, one time in 64
    assert changed.double().mean() == pytest.approx(chosen * 63 / 64, abs=3)
    if alpha == 1:
        assert (changed > 150).all()


@pytest.mark.parametrize("alpha,number", [(0.5, 4), (0.6, 4), (0.7, 5), (0.9, 6), (0.0, 0), (1.0, 7)])
def test_numbers_of_tokens_are_rounded_half_up(alpha, number):
    batch, perturbation = originals(range(9)), TokenPerturbation(Codes(titok(tokens=7)))
    draws, _ = perturbation._prepare(batch, perturbation.codes.tokens(batch))
    assert (perturbation._chosen(draws, alpha).sum(1) == number).all()


def test_single_draws_give_the_share_only_on_average():
    tokenizer = titok(tokens=100)
    batch = originals(range(40))
    for count, spread in (("exact", 0.0), ("bernoulli", 5.0)):
        perturbation = TokenPerturbation(Codes(tokenizer), count=count)
        draws, _ = perturbation._prepare(batch, perturbation.codes.tokens(batch))
        numbers = perturbation._chosen(draws, 0.5).sum(1).double()
        assert float(numbers.mean()) == pytest.approx(50, abs=2.5)
        assert float(numbers.std()) == pytest.approx(spread, abs=1.5)


def test_replaced_tokens_are_uniform_among_the_nearest_codes(monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (2, 5, 9))
    tokenizer = titok(tokens=50)
    before, after = perturb(tokenizer, range(40), alpha=1.0, strength=1)
    book = tokenizer.quantizer.codebook.detach()
    order = (book.unsqueeze(1) - book).square().sum(2).argsort(1)  # (64, 64), own code first
    rank = (order[flat(before)] == flat(after).unsqueeze(2)).float().argmax(2)
    counts = torch.bincount(rank.flatten(), minlength=64).double()
    assert counts[5:].sum() == 0
    assert ((counts[:5] - 400).square() / 400).sum() < 20  # chi squared, 4 degrees of freedom


def test_cells_share_their_draws():
    tokenizer, batch = titok(tokens=60), originals(range(8))
    perturbation = TokenPerturbation(Codes(tokenizer))
    clean = flat(perturbation.codes.tokens(batch))
    changed = [flat(perturbation.tokens(batch, alpha, 2)) != clean for alpha in (0.5, 0.7, 0.9)]
    assert (changed[0] <= changed[1]).all() and (changed[1] <= changed[2]).all()
    draws, others = perturbation._prepare(batch, perturbation.codes.tokens(batch))
    assert torch.equal(others, perturbation._prepare(batch, perturbation.codes.tokens(batch))[1])


@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_a_token_does_not_depend_on_its_batch(count):
    tokenizer = titok()
    _, together = perturb(tokenizer, [3, 8, 11, 12], count=count)
    _, alone = perturb(tokenizer, [11], count=count)
    _, reordered = perturb(tokenizer, [12, 3], count=count)
    assert torch.equal(flat(together)[2:3], flat(alone))
    assert torch.equal(flat(together)[[3, 0]], flat(reordered))
    _, other_seed = perturb(tokenizer, [11], count=count, seed=1)
    assert not torch.equal(flat(other_seed), flat(alone))


def test_one_neighbour_is_no_change(monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (1, 2, 3))
    before, after = perturb(titok(), range(4), alpha=1.0, strength=0)
    assert torch.equal(flat(before), flat(after))
    before, after = perturb(titok(), range(4), alpha=1.0, strength=1)
    assert not torch.equal(flat(before), flat(after))


def test_dropped_tokens_stay_dropped_and_do_not_count(monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (64, 64, 64))
    tokenizer, batch = titok(tokens=100), originals(range(4))
    codes = Codes(tokenizer)
    clean = codes.tokens(batch)
    keep = torch.arange(100).expand(4, -1) < torch.tensor([[100], [60], [10], [0]])
    dropped = Tokens(clean.indices, clean.layout, {"image": keep})
    codes.tokens = lambda originals: dropped
    after = TokenPerturbation(codes).tokens(batch, 0.5, 1)
    assert torch.equal(flat(after) < 0, ~keep) and after.mask is dropped.mask
    changed = (flat(after) != flat(dropped)).sum(1)
    assert (changed <= torch.tensor([50, 30, 5, 0])).all() and changed[0] > 40 and changed[1] > 22


# ---- neighbours of latents


def test_neighbours_of_latents_are_those_of_training(monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (1, 4, 6))
    for quantizer in (vq(l2_normalize=True), LatentPerturbation(vq(), num_neighbours=3), Factorized(vq(), 6)):
        tokenizer = titok(quantizer, tokens=50)
        inner = getattr(quantizer, "quantizer", quantizer)
        project = quantizer.project_in if isinstance(quantizer, Factorized) else torch.nn.Identity()
        batch = originals(range(30))
        perturbation = TokenPerturbation(Codes(tokenizer), "latent")
        z = tokenizer.latents(batch.images.float() / 255)
        latents, book = inner(project(z)).latents.detach(), inner.decode(torch.arange(64).unsqueeze(1)).detach()
        order = torch.cdist(latents.flatten(0, 1), book).argsort(1)  # (n, 64)
        for strength, delta in enumerate((1, 4, 6)):
            after = flat(perturbation.tokens(batch, 1.0, strength)).flatten()
            rank = (order == after.unsqueeze(1)).float().argmax(1)
            assert rank.max() == delta - 1
        assert len(rank.unique()) == 6


@pytest.mark.parametrize("quantizer", [Residual(vq(), 2), ScalarQuantizer(2)], ids=["residual", "scalar"])
def test_neighbours_of_latents_need_one_index_per_token(quantizer):
    with pytest.raises(MetricUnavailable, match="one index per token"):
        TokenPerturbation(Codes(titok(quantizer)), "latent")
    with pytest.raises(MetricUnavailable, match="at most 1048576 codes"):
        TokenPerturbation(Codes(titok(FiniteScalarQuantizer([16] * 6))), "latent")


# ---- every kind of codebook


CASES = {
    "fsq": (lambda: titok(FiniteScalarQuantizer([5, 4, 3])), [60]),
    "lfq": (lambda: titok(LookupFreeQuantizer(10)), [1024]),
    "lfq-subcodes": (lambda: titok(LookupFreeQuantizer(12, subcode_bits=6)), [64, 64]),
    "bernoulli": (lambda: titok(BernoulliQuantizer(6)), [2] * 6),
    "scalar": (lambda: titok(ScalarQuantizer(3, 4)), [16] * 3),
    "residual": (lambda: titok(Residual([vq(32), vq(16)])), [32, 16]),
    "grouped": (lambda: titok(Grouped(vq(32, 2), 2, shared=True)), [32, 32]),
    "factorized": (lambda: titok(Factorized(vq(32), 6)), [32]),
    "split-index": (lambda: titok(Factorized(FiniteScalarQuantizer([4, 4, 4]), subcode_sizes=[8, 8])), [8, 8]),
    "channels": (lambda: titok(Product([vq(32, 2), vq(16, 2)])), [32, 16]),
    "ranges": (lambda: titok(Product([vq(32), Residual(vq(16), 2)], lengths=[8, 12])), None),
    "scales": (lambda: grid(MultiScaleResidual(vq(32), scales=(1, 2, 4))), None),
}


@pytest.mark.parametrize("case", CASES)
def test_every_subcode_moves_within_its_codebook(case, monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (9, 9, 9))
    make, sizes = CASES[case]
    tokenizer, side = make(), 8 if case == "scales" else 16
    before, after = perturb(tokenizer, range(12), alpha=1.0, strength=2, side=side)
    after.validate()
    assert after.layout == before.layout
    if sizes is not None:
        assert list(before.layout[0].codebook_sizes) == sizes
    for stream in before.layout:
        moved = (before.indices[stream.name] != after.indices[stream.name]).flatten(0, 1).double().mean(0)
        assert (moved > 0.2).all()
    _, alone = perturb(tokenizer, [7], alpha=1.0, strength=2, side=side)
    assert torch.equal(flat(alone), flat(after)[7:8])
    unchanged = perturb(tokenizer, range(3), alpha=0.0, side=side)
    assert torch.equal(flat(unchanged[0]), flat(unchanged[1]))
    images = tokenizer.decode(after)
    assert images.shape[0] == 12 and images.isfinite().all()


def test_subcodes_of_a_binary_code_move_to_the_fewest_bits():
    before, after = perturb(titok(LookupFreeQuantizer(12, subcode_bits=6)), range(10), 1.0, 2)  # delta 2 of 64
    difference = (flat(before) ^ flat(after)).flatten()
    bits = sum((difference >> place) & 1 for place in range(6))
    assert bits.max() == 1 and bits.double().mean() == pytest.approx(0.5, abs=0.1)


def test_a_split_index_moves_as_one(monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (2, 2, 2))
    quantizer = Factorized(FiniteScalarQuantizer([4, 4, 4]), subcode_sizes=[8, 8])
    before, after = perturb(titok(quantizer, tokens=100), range(6), 1.0, 0)
    found = quantizer.neighbours(before.indices["image"], 2)  # (B, N, 2, 2)
    assert (found == after.indices["image"].unsqueeze(2)).all(3).any(2).all()


def test_tables_and_lookups_agree(monkeypatch):
    for quantizer in (FiniteScalarQuantizer([8, 8, 8]), vq(64), LookupFreeQuantizer(9)):
        tokenizer = titok(quantizer)
        with monkeypatch.context() as patch:
            _, table = perturb(tokenizer, range(4), 1.0, 2)
            patch.setattr(code_neighbours, "TABLE_LIMIT", 0)
            patch.setattr(code_neighbours, "_BLOCK", 50)
            _, looked_up = perturb(tokenizer, range(4), 1.0, 2)
        assert torch.equal(flat(table), flat(looked_up))


# ---- deltas, errors


def test_deltas_are_published_or_scaled():
    assert deltas_for(16384) == (200, 280, 360) and deltas_for(8192) == (100, 140, 180)
    assert deltas_for(4096) == (50, 70, 90) and deltas_for(1024) == (10, 15, 20)
    assert deltas_for(65536) == (800, 1120, 1440) and deltas_for(2048) == (25, 35, 45)
    assert deltas_for(512) == (6, 9, 11) and deltas_for(64) == (2, 2, 2) and deltas_for(1) == (1, 1, 1)


def test_tokenizers_without_neighbours_say_so():
    class Continuous:
        def layout(self):
            return ()

    class Foreign:
        def layout(self):
            return titok().layout()

    with pytest.raises(MetricUnavailable, match="Continuous has continuous latents"):
        TokenPerturbation(Codes(Continuous()))
    with pytest.raises(MetricUnavailable, match=r"Foreign has no \.quantizer"):
        TokenPerturbation(Codes(Foreign()))
    with pytest.raises(ValueError, match="neighbours must be 'code' or 'latent'; got 'token'"):
        TokenPerturbation(Codes(titok()), "token")
    with pytest.raises(ValueError, match="count must be 'exact' or 'bernoulli'; got 'some'"):
        TokenPerturbation(Codes(titok()), count="some")
