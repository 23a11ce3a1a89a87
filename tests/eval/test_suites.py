"""What the suites measure for every kind of tokenizer, and what they keep of the originals for the next evaluation."""

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vistok import (
    VQGAN,
    ContinuousTiTok,
    LookupFreeQuantizer,
    MultiScaleResidual,
    Residual,
    TailTokenDrop,
    TiTok,
    VectorQuantizer,
)
from vistok.eval import suites
from vistok.eval.evaluate import Subject, choose, evaluate, manifest
from vistok.eval.inception.reference import ReferenceStatistics, save_statistics
from vistok.eval.inception.reference_cache import ReferenceCache
from vistok.eval.metric import EvaluationError
from vistok.eval.protocol import preset
from vistok.eval.suites import Settings, images_suite, tokenizer_suite
from vistok.eval.variants import Codes
from vistok.eval.weights import FILES, Weights


def _load(name):
    spec = importlib.util.spec_from_file_location(f"vistok_test_eval_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small, fake = _load("small"), _load("fake_inception")
SIZES = {"encoder_size": (32, 1, 2), "decoder_size": (32, 1, 2)}
CNN = {"channels": 32, "channel_multipliers": (1, 1), "num_blocks": 1, "latent_channels": 16}


class Images(small.RandomImages):
    """Random images of any shape that say what they consist of."""

    def __init__(self, length=9, height=16, width=16, **options):
        super().__init__(length, **options)
        self.height, self.width = height, width

    def image(self, index):
        draws = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, self.height, self.width), generator=draws, dtype=torch.uint8)

    def manifest(self):
        return [f"{self.length} random images"]


def titok(quantizer=None, regularizers=()):
    torch.manual_seed(0)
    return TiTok(quantizer or VectorQuantizer(16, 4), 16, 8, 3, regularizers=regularizers, **SIZES).eval()


def vqgan(quantizer=None):
    torch.manual_seed(0)
    return VQGAN(quantizer or VectorQuantizer(16, 4), 16, **CNN).eval()


def continuous():
    torch.manual_seed(0)
    return ContinuousTiTok(4, 16, 8, 6, (32, 1, 2), (32, 1, 2)).eval()


@pytest.fixture(autouse=True)
def inception(monkeypatch, tmp_path):
    """A linear map in place of Inception; no other weights, and an empty cache."""
    network = fake.FakeInception(size=16)
    monkeypatch.setattr(suites, "Inception", lambda *args, **kwargs: network)
    monkeypatch.setattr(suites, "QUALITIES", {"jpeg": (10, 25, 50), "webp": (10,), "avif": ()})
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / FILES["inception"].name).write_bytes(b"a linear map")
    return network


def settings(folder, source, suite="quick", num_images=None, **options):
    weights = Weights(folder / "weights", download=False, check=False)
    plan = preset("torch-fidelity", height=source.image(0).shape[1], width=source.image(0).shape[2])
    numbers = choose(len(source), num_images)
    return Settings(suite, plan, weights, torch.device("cpu"), numbers, manifest(source), **options)


def measure(folder, tokenizer, suite="quick", source=None, num_images=None, **options):
    """Results of a suite, of a tokenizer or of no tokenizer."""
    source = source or Images()
    chosen = settings(folder, source, suite, num_images, **options)
    made = images_suite(chosen) if tokenizer is None else tokenizer_suite(chosen, Codes(tokenizer))
    out = folder / f"out {len([*folder.iterdir()])}"
    subject = Subject({"name": "it", "kind": "tokenizer"}, {"name": "random"})
    return evaluate(source, small.same, made, subject, out, num_images=num_images, batch_size=4)


def test_quick_measures_the_main_numbers_of_the_reconstruction(tmp_path):
    results = measure(tmp_path, titok())
    assert [variant.name for variant in results.variants] == ["reconstruction"]
    assert {"psnr", "ssim", "rfid", "usage", "perplexity"} <= results.main.metrics.keys()
    assert results.skipped.keys() == {"lpips_alex"}
    assert results.main.bits_per_pixel == 3 * 4 / 16**2
    assert (results.evaluated, results.expected, results.partial) == (9, 9, "")
    assert (results.protocol.dataset, results.protocol.num_images) != ("", 0)


def test_standard_adds_codecs_and_the_language_of_the_tokens(tmp_path):
    results = measure(tmp_path, titok(), "standard")
    assert [variant.name for variant in results.variants] == [
        "reconstruction",
        *("jpeg/q=10", "jpeg/q=50", "webp/q=10", "webp/q=10/scale=0.25"),
    ]
    assert {"rsfid", "ris", "precision", "unigram_entropy"} <= results.main.metrics.keys()
    assert {"kid", "ms_ssim", "lpips_vgg"} <= results.skipped.keys()
    assert "rfid" not in results.variants[1].metrics and "rate_distortion" in results.sections


def test_full_judges_codecs_and_perturbed_tokens_by_rfid_too(tmp_path):
    results = measure(tmp_path, titok(), "full")
    kinds = [variant.kind for variant in results.variants]
    assert kinds.count("codec") == 3 * 4 and kinds.count("perturbed") > 0
    assert all("rfid" in variant.metrics for variant in results.variants)
    assert results.sections["pfid"]["num_images"] == 9
    assert {"dists", "dino_similarity", "clip_similarity"} <= results.skipped.keys()


@pytest.mark.parametrize("suite", ["quick", "standard", "full"])
def test_a_tokenizer_without_tokens_is_measured_by_its_pixels(tmp_path, suite):
    results = measure(tmp_path, continuous(), suite)
    assert {"psnr", "ssim", "rfid"} <= results.main.metrics.keys()
    assert results.main.bits_per_pixel is None and "usage" not in results.main.metrics
    assert not {"rate", "codebook", "tokens"} & results.skipped.keys()
    assert not [variant for variant in results.variants if variant.kind in ("length", "perturbed")]


@pytest.mark.parametrize("suite", ["quick", "standard", "full"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: vqgan(Residual(VectorQuantizer(16, 4), 3)),
        lambda: vqgan(MultiScaleResidual(VectorQuantizer(16, 4), (1, 2, 4, 8), phi_sharing=1)),
        lambda: titok(LookupFreeQuantizer(21)),
    ],
    ids=["sub-codes", "streams", "huge codebook"],
)
def test_tokens_of_every_structure_pass_through_every_suite(tmp_path, make, suite):
    tokenizer = make()
    results = measure(tmp_path, tokenizer, suite)
    assert results.main.metrics["psnr"] > 0 and results.main.bits_per_pixel > 0
    assert "usage" in results.main.metrics and "codebook" not in results.skipped
    assert ("unigram_entropy" in results.main.metrics) == (suite != "quick")
    assert ("digit_entropy" in results.main.metrics) == isinstance(tokenizer.quantizer, LookupFreeQuantizer)


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_a_tokenizer_of_any_size_takes_images_that_are_not_square(tmp_path, suite, monkeypatch):
    monkeypatch.setattr(suites, "Inception", lambda *args, **kwargs: fake.FakeInception(size=24))
    source = Images(5, height=32, width=18)  # as many pixels as 24 x 24
    results = measure(tmp_path, vqgan(), suite, source)
    assert results.main.bits_per_pixel == 16 * 9 * 4 / (32 * 18)
    assert (results.protocol.height, results.protocol.width) == (32, 18)


def test_lengths_are_decoded_where_asked_for_or_by_default(tmp_path):
    def lengths(results):
        return [variant.settings["num_tokens"] for variant in results.variants if variant.kind == "length"]

    of_prefixes = titok(regularizers=[TailTokenDrop()])
    assert lengths(measure(tmp_path, of_prefixes)) == []
    results = measure(tmp_path, of_prefixes, lengths=(3, 1))
    assert lengths(results) == [1, 3]
    assert "adaptive_length" in results.sections and "rate_distortion" in results.sections
    assert results.variants[2].metrics["psnr"] == results.main.metrics["psnr"]
    assert lengths(measure(tmp_path, of_prefixes, "standard")) == [1, 2, 3]
    with pytest.raises(ValueError, match="fixed length"):
        measure(tmp_path, titok(), lengths=(1,))


@pytest.mark.parametrize("suite", ["quick", "standard", "full"])
def test_reconstructions_of_others_have_no_tokens(tmp_path, suite):
    class Given(Images):
        def read(self, index):
            sample = super().read(index)
            return sample._replace(target=255 - sample.image)

    results = measure(tmp_path, None, suite, Given())
    assert {"psnr", "rfid"} <= results.main.metrics.keys() and "usage" not in results.main.metrics
    assert results.main.bits_per_pixel is None and "rate" not in results.skipped


def test_missing_weights_leave_out_what_needs_them_and_nothing_else(tmp_path):
    (tmp_path / "weights" / FILES["inception"].name).unlink()
    results = measure(tmp_path, titok(), "full")
    needing = {"rfid", "rsfid", "ris", "kid", "precision_recall"}
    needing |= {"lpips_alex", "lpips_vgg", "dists", "dino_similarity", "clip_similarity"}
    assert needing <= results.skipped.keys()
    assert "inception" in results.skipped["rfid"] and "vgg16" in results.skipped["dists"]
    assert results.protocol.extractor_sha256 == "" and "psnr" in results.main.metrics


def test_small_images_leave_out_what_cannot_be_seen_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "Inception", lambda *args, **kwargs: fake.FakeInception(size=8))
    results = measure(tmp_path, continuous_of_any_size(), "standard", Images(4, 8, 8))
    assert "11 x 11" in results.skipped["ssim"] and "161 x 161" in results.skipped["ms_ssim"]
    assert "psnr" in results.main.metrics


def continuous_of_any_size():
    from vistok import GaussianTokenizer
    from vistok.decoders.cnn import CNNDecoder
    from vistok.encoders.cnn import CNNEncoder

    encoder, decoder = CNNEncoder(32, (1, 1), 1, out_dim=8), CNNDecoder(32, (1, 1), 1, in_dim=4)
    return GaussianTokenizer(encoder, decoder, 16, (-1.0, 1.0)).eval()


def test_weights_that_were_not_published_stand_in_the_protocol(tmp_path, monkeypatch):
    assert measure(tmp_path, titok()).protocol.other_weights.startswith("inception:")
    changed = replace(FILES["inception"], sha256=Weights().sha256(tmp_path / "weights" / FILES["inception"].name)[:8])
    monkeypatch.setitem(FILES, "inception", changed)
    protocol = measure(tmp_path, titok()).protocol
    assert protocol.other_weights == "" and protocol.extractor_sha256.startswith(changed.sha256)


def entry(folder):
    """What is kept of the originals: the only entry of the cache."""
    (path,) = (folder / "cache" / "references").iterdir()
    return ReferenceCache(path.parent), path.name


def test_the_originals_are_looked_at_once_for_all_evaluations(tmp_path, inception):
    first = measure(tmp_path, titok())
    calls = inception.calls
    second = measure(tmp_path, titok())
    assert inception.calls - calls == calls / 2 == 3  # three batches of reconstructions
    assert second.main.metrics["rfid"] == pytest.approx(first.main.metrics["rfid"], rel=1e-9)
    assert second.protocol == first.protocol


def test_what_quick_kept_is_replaced_by_what_standard_needs(tmp_path, inception):
    measure(tmp_path, titok())
    cache, key = entry(tmp_path)
    assert cache.load(key) is not None and cache.load(key, spatial=True, features=True) is None
    gathered = measure(tmp_path, titok(), "standard")
    kept = cache.load(key, spatial=True, features=True)
    assert kept.count == 9 and kept.features.shape == (9, 2048)
    calls = inception.calls
    loaded = measure(tmp_path, titok(), "standard")
    assert inception.calls - calls == 3
    assert loaded.main.metrics == pytest.approx(gathered.main.metrics, rel=1e-9, nan_ok=True)
    measure(tmp_path, titok())  # less than what is there will do, and stays
    assert inception.calls - calls == 6 and cache.load(key, spatial=True, features=True) is not None


def test_other_images_and_other_protocols_have_other_statistics(tmp_path, inception):
    tokenizer = vqgan()
    measure(tmp_path, tokenizer)
    measure(tmp_path, tokenizer, num_images=5)
    measure(tmp_path, tokenizer, source=Images(7))
    assert len([*(tmp_path / "cache" / "references").iterdir()]) == 3
    base = settings(tmp_path, Images())
    keys = {suites._cache_key(base, base.protocol)}
    changes = {"height": 8, "width": 8, "crop": "center", "extractor": "x", "extractor_sha256": "x"}
    changes |= {"resize": "clean", "extractor_dtype": "float64"}
    for name, value in changes.items():
        keys.add(suites._cache_key(base, replace(base.protocol, **{name: value})))
    keys.add(suites._cache_key(replace(base, manifest="x"), base.protocol))
    keys.add(suites._cache_key(replace(base, numbers=np.arange(8)), base.protocol))
    assert len(keys) == 1 + len(changes) + 2
    same = replace(base.protocol, rounding="truncate", seed=3, precision="bf16", dataset="x")
    assert suites._cache_key(base, same) in keys  # does not matter for originals


def test_statistics_of_other_pixels_are_refused(tmp_path):
    class Others(Images):
        def image(self, index):
            return 255 - super().image(index)

    measure(tmp_path, titok())
    with pytest.raises(EvaluationError, match="the originals are not those whose statistics are kept in .*delete"):
        measure(tmp_path, titok(), source=Others())


def test_nothing_is_kept_of_a_dataset_with_unreadable_images(tmp_path):
    results = measure(tmp_path, titok(), source=Images(damaged=(2,)))
    assert results.partial == "1 of 9 images could not be read" and "rfid" in results.main.metrics
    assert not (tmp_path / "cache").exists()


def test_nothing_is_kept_of_a_dataset_without_a_manifest(tmp_path):
    class Nameless(Images):
        def manifest(self):
            return None

    assert "rfid" in measure(tmp_path, titok(), source=Nameless()).main.metrics
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_a_single_image_is_measured_as_far_as_possible(tmp_path, suite, caplog):
    results = measure(tmp_path, titok(), suite, num_images=1)
    assert results.evaluated == 1 and results.partial == "a subset: 1 of 9 images"
    assert "at least 2 images" in results.skipped["rfid"] and "psnr" in results.main.metrics


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING):
        results = measure(tmp_path, titok())
    assert "rfid" in results.main.metrics
    assert "statistics of the originals are not kept for the next evaluation" in caplog.text


def test_a_file_of_statistics_takes_the_place_of_the_originals(tmp_path, inception):
    measure(tmp_path, titok(), source=Images(5))
    cache, key = entry(tmp_path)
    kept = cache.load(key)
    save_statistics(tmp_path / "reference.npz", ReferenceStatistics(kept.pool, count=5))
    calls = inception.calls
    results = measure(tmp_path, titok(), "standard", reference=tmp_path / "reference.npz")
    assert inception.calls - calls == 3  # no originals
    assert results.protocol.reference.startswith("reference.npz:") and "rfid" in results.main.metrics
    assert "mu_s" in results.skipped["rsfid"] and "single images" in results.skipped["kid"]
    assert [path.name for path in cache.folder.iterdir()] == [key]
    with pytest.raises(FileNotFoundError):
        measure(tmp_path, titok(), reference=tmp_path / "none.npz")


def test_previews_are_spread_over_the_images_that_are_evaluated(tmp_path):
    suite = tokenizer_suite(settings(tmp_path, Images(40), num_images=20, previews=4), Codes(titok()))
    gallery = suite.build()[1].metrics["gallery"]
    assert gallery.previews == [0, 10, 20, 30]


def test_the_seed_of_the_protocol_is_that_of_the_draws(tmp_path):
    base = settings(tmp_path, Images(), "full")
    suite = tokenizer_suite(replace(base, protocol=replace(base.protocol, seed=7)), Codes(titok()))
    perturbed = [e.variant.settings["seed"] for e in suite.build() if e.variant.kind == "perturbed"]
    assert perturbed and set(perturbed) == {7}


def test_the_convention_of_the_protocol_is_that_of_the_inception_score(tmp_path):
    base = settings(tmp_path, Images(), "standard")
    for convention in ("torch-fidelity", "adm", "one-split"):
        changed = replace(base, protocol=replace(base.protocol, inception_score=convention))
        assert tokenizer_suite(changed, Codes(titok())).build()[1].metrics["ris"].convention == convention


def test_the_plan_names_every_metric_of_every_variant(tmp_path):
    suite = tokenizer_suite(settings(tmp_path, Images(), "full"), Codes(titok()))
    plan = suite.plan
    assert plan["originals"] == ["reference"] and plan["reconstruction"][:3] == ["psnr", "ssim", "rfid"]
    assert plan["reconstruction"][-1] == "gallery"  # shows what others have judged
    assert len(plan) == len(suite.build()) and suite.manifest == manifest(Images())
