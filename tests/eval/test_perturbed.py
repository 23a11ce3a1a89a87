"""pFID: perturbed reconstructions through a tokenizer, the grid of cells, and what may be called pFID."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from vistok import VectorQuantizer
from vistok.eval.results import VariantResult
from vistok.eval.tokens import perturbation as token_perturbation
from vistok.eval.tokens.perturbation import TokenPerturbation
from vistok.eval.tokens.pfid import ALPHAS, PerturbedVariant, perturbed_variants, pfid_section
from vistok.eval.variants import Codes, TokenizerVariant

_spec = importlib.util.spec_from_file_location(
    "vistok_test_token_perturbation", Path(__file__).with_name("test_token_perturbation.py")
)
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)


# ---- reconstructions


def test_nothing_to_replace_is_the_plain_reconstruction_bit_for_bit(monkeypatch):
    monkeypatch.setitem(token_perturbation.DELTAS, 64, (1, 2, 64))
    codes, batch = Codes(small.titok()), small.originals(range(5))
    plain = TokenizerVariant(codes).reconstruct(batch)
    perturbation = TokenPerturbation(codes)
    for alpha, strength in ((0.0, 2), (1.0, 0)):
        pairs = PerturbedVariant(perturbation, alpha, strength).reconstruct(batch)
        assert torch.equal(pairs.reconstructions, plain.reconstructions) and torch.equal(pairs.bits, plain.bits)
    pairs = PerturbedVariant(perturbation, 1.0, 2).reconstruct(batch)
    assert (pairs.reconstructions != plain.reconstructions).any()
    assert torch.equal(pairs.reconstructions, codes.decode(pairs.tokens))


def test_reconstructions_do_not_depend_on_the_batch():
    codes = Codes(small.titok())
    for variant in perturbed_variants(codes)[:2]:
        whole = variant.reconstruct(small.originals(range(6))).tokens.indices["image"]
        parts = [variant.reconstruct(small.originals(part)).tokens.indices["image"] for part in ([4, 5], [0, 1, 2, 3])]
        assert torch.equal(whole, torch.cat([parts[1], parts[0]]))


def test_images_are_encoded_once_for_all_cells(monkeypatch):
    codes, batch, calls = Codes(small.titok(small.vq(1024))), small.originals(range(2)), []
    encode = codes.tokenizer.encode
    monkeypatch.setattr(codes.tokenizer, "encode", lambda images: (calls.append(1), encode(images))[1])
    for variant in perturbed_variants(codes):
        variant.reconstruct(batch)
    assert len(calls) == 1


# ---- the grid


def test_the_grid_is_the_published_one():
    variants = perturbed_variants(Codes(small.titok(VectorQuantizer(4096, 4))))
    assert [(v.settings["alpha"], v.settings["delta"]) for v in variants] == [
        (alpha, delta) for alpha in (0.9, 0.8, 0.7, 0.6, 0.5) for delta in (50, 70, 90)
    ]
    assert len({v.name for v in variants}) == 15 and variants[0].name == "pfid/alpha=0.9,delta=50"
    assert all(v.kind == "perturbed" and v.settings["weight"] == 1 for v in variants)
    assert variants[0].settings["published_deltas"] and json.dumps(variants[0].settings)
    (middle,) = perturbed_variants(Codes(small.titok(VectorQuantizer(4096, 4))), "mid")
    assert (middle.settings["alpha"], middle.settings["delta"]) == (0.7, 70)
    with pytest.raises(ValueError, match="grid must be 'paper' or 'mid'; got 'full'"):
        perturbed_variants(Codes(small.titok()), "full")


def test_deltas_that_coincide_are_evaluated_once():
    variants = perturbed_variants(Codes(small.titok(small.vq(64))))  # deltas 2, 2, 2
    assert [v.settings["weight"] for v in variants] == [3] * 5
    variants = perturbed_variants(Codes(small.titok(small.vq(200))))  # deltas 2, 3, 4
    assert [v.settings["delta"] for v in variants[:3]] == [2, 3, 4]
    assert sum(v.settings["weight"] for v in variants) == 15 and not variants[0].settings["published_deltas"]


def test_every_codebook_has_its_own_delta():
    quantizer = small.Residual([small.vq(1024), small.vq(4096)])
    variants = perturbed_variants(Codes(small.titok(quantizer)))
    assert variants[0].settings["delta"] == [10, 50] and variants[0].name == "pfid/alpha=0.9,delta=10+50"
    assert not variants[0].settings["published_deltas"]
    shared = perturbed_variants(Codes(small.titok(small.Grouped(small.vq(1024, 2), 2, shared=True))))
    assert shared[0].settings["delta"] == 10 and not shared[0].settings["published_deltas"]


def test_a_cell_out_of_range_is_refused():
    perturbation = TokenPerturbation(Codes(small.titok()))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]; got 1.5"):
        PerturbedVariant(perturbation, 1.5)
    with pytest.raises(ValueError, match="strength must be 0, 1 or 2; got 3"):
        PerturbedVariant(perturbation, 0.5, 3)


# ---- the section


def results(variants, value=lambda cell: {"rfid": 10 * cell["alpha"], "psnr": 20.0}):
    plain = VariantResult("reconstruction", "reconstruction", metrics={"rfid": 1.0, "psnr": 24.0, "usage": 0.5})
    return [plain] + [VariantResult(v.name, v.kind, v.settings, metrics=value(v.settings)) for v in variants]


def grid_of(size=4096, **options):
    return perturbed_variants(Codes(small.titok(VectorQuantizer(size, 4))), **options)


def test_the_section_has_the_mean_over_the_cells():
    section = pfid_section(results(grid_of()), 50_000)
    assert section["label"] == "pFID" and section["value"] == pytest.approx(7.0)
    assert section["means"]["psnr"] == 20 and section["changes"] == pytest.approx({"rfid": 6.0, "psnr": -4.0})
    assert section["plain"]["rfid"] == 1 and len(section["cells"]) == 15
    assert section["cells"][0] == {"alpha": 0.9, "delta": 50, "weight": 1, "metrics": {"rfid": 9.0, "psnr": 20.0}}
    assert json.loads(json.dumps(section)) == section


def test_cells_count_as_often_as_they_stand():
    variants = grid_of(160)  # deltas 2, 3, 4
    assert len(variants) == 15
    variants = grid_of(120)  # deltas 2, 2, 3
    assert [v.settings["weight"] for v in variants[:2]] == [2, 1]
    section = pfid_section(results(variants, lambda cell: {"psnr": float(cell["delta"])}), 50_000)
    assert section["means"]["psnr"] == pytest.approx((2 + 2 + 3) / 3) and section["value"] is None


@pytest.mark.parametrize(
    "options,size,images,label",
    [
        ({}, 4096, 1000, "pFID-like (N=1000)"),
        ({"grid": "mid"}, 4096, 50_000, "pFID-like (grid=mid)"),
        ({"neighbours": "latent"}, 4096, 50_000, "pFID-like (neighbours=latent)"),
        ({"count": "bernoulli"}, 4096, 50_000, "pFID-like (count=bernoulli)"),
        ({}, 2048, 50_000, "pFID-like (deltas not published for these codebooks)"),
        ({"grid": "mid"}, 2048, 10, "pFID-like (N=10, grid=mid, deltas not published for these codebooks)"),
    ],
)
def test_only_the_published_protocol_is_called_pfid(options, size, images, label):
    assert pfid_section(results(grid_of(size, **options)), images)["label"] == label


def test_missing_cells_are_named_and_no_cells_are_no_section():
    found = results(grid_of())
    assert pfid_section(found[:8], 50_000)["label"] == "pFID-like (7 of 15 cells)"
    assert pfid_section(found[:1], 50_000) == {}
    assert ALPHAS == (0.9, 0.8, 0.7, 0.6, 0.5)
