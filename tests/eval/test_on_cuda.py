"""On an accelerator: everything happens where the images are, gives what a CPU gives, and the host never waits.

There is no accelerator here: ``pretend_cuda`` stands in for one, and refuses what CUDA would refuse.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vistok import TiTok, VectorQuantizer
from vistok.eval.inception.feature_table import FeatureTable
from vistok.eval.inception.frechet import FrechetInceptionDistance
from vistok.eval.inception.kernel_distance import kernel_distances
from vistok.eval.inception.moments import Moments
from vistok.eval.inception.network import Inception
from vistok.eval.inception.precision_recall import precision_recall
from vistok.eval.inception.reference import InceptionReference
from vistok.eval.inception.score import InceptionScore
from vistok.eval.metric import Originals, Pairs
from vistok.eval.perceptual import DISTS, LPIPS
from vistok.eval.probes.features import listening
from vistok.eval.probes.token_model import TokenData, TokenModel
from vistok.eval.probes.token_slots import Slots
from vistok.eval.rate_distortion import RateMetric
from vistok.eval.reconstruction import PSNR
from vistok.eval.similarity import CLIPSimilarity, DINOSimilarity
from vistok.eval.structural import MSSSIM, SSIM
from vistok.eval.tokens.perturbation import TokenPerturbation
from vistok.eval.tokens.pfid import PerturbedVariant
from vistok.eval.tokens.store import TokenStore
from vistok.eval.tokens.usage import CodebookUsage
from vistok.eval.variants import Codes
from vistok.quantizers.lfq import LookupFreeQuantizer
from vistok.quantizers.residual import Residual
from vistok.tokenizers.base import Tokens


def helper(path):
    path = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(f"vistok_test_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made, shared, fake = helper("pairs.py"), helper("tokens.py"), helper("fake_inception.py")
pretend, similarity = helper("pretend_cuda.py"), helper("test_similarity.py")
trunks = helper("../losses/trunks.py")


def moved(pairs, device):
    """The same pairs on a device; numbers and labels stay on the host, as the runner has them."""
    originals, tokens = pairs.originals, pairs.tokens
    originals = Originals(originals.index, originals.keys, originals.labels, originals.images.to(device))
    if tokens is not None:
        tokens = Tokens({name: part.to(device) for name, part in tokens.indices.items()}, tokens.layout)
    return Pairs(originals, pairs.reconstructions.to(device), tokens, pairs.bits)


def states(make, folder, batches):
    """State of a metric that is fed batches on the CPU, and on the device, with what the host waited for there."""
    here = make("cpu")
    here.open(folder / "here", "part")
    for pairs in batches:
        here.update(pairs)
    with pretend.PretendCuda() as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        there = make("cuda")
        there.open(folder / "there", "part")
        for pairs in batches:
            pairs = moved(pairs, "cuda")
            mode.waits.clear()
            there.update(pairs)
        waits = [*mode.waits]
        return here.state_dict(), there.state_dict(), waits


def alike(found, expected):
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            alike(found[name], expected[name])
    else:
        assert found == expected


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    found = {net: trunks.write_weights(name, folder) for net, name in {"alex": "alexnet", "vgg": "vgg16"}.items()}
    found["dino"] = similarity.write_weights(similarity.DINO, folder / "dino.pth", img_size=28)
    return found | {"clip": similarity.write_weights(similarity.CLIP, folder / "clip.pth")}


IMAGES = {
    "psnr": (40, lambda files: PSNR()),
    "ssim": (40, lambda files: SSIM((40, 40))),
    "ms_ssim": (162, lambda files: MSSSIM((162, 162))),
    "lpips_alex": (40, lambda files: LPIPS("alex", weights=files["alex"])),
    "lpips_vgg": (32, lambda files: LPIPS("vgg", weights=files["vgg"])),
    "dists": (32, lambda files: DISTS(weights=files["vgg"])),
    "dino": (40, lambda files: DINOSimilarity(files["dino"], image_size=28)),
    "clip": (40, lambda files: CLIPSimilarity(files["clip"], similarity.CLIP)),
    "rate": (40, lambda files: RateMetric()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_metrics_of_images(files, tmp_path, name):
    size, make = IMAGES[name]
    images = made.photographs(3, size, size)
    pairs = made.pair(images, made.degraded(images))
    pairs.bits = torch.tensor([8.0, 16.0, 24.0], dtype=torch.float64)
    here, there, waits = states(lambda device: make(files), tmp_path, [pairs])
    alike(there, here)
    assert waits == []


def elsewhere(device):
    inception = fake.FakeInception()
    inception.device = torch.device(device)
    for name in ("weight", "spatial_weight", "_classifier", "_classifier_bias"):
        setattr(inception, name, getattr(inception, name).to(device))
    return inception


INCEPTION = {
    "rfid": lambda inception: FrechetInceptionDistance(inception, InceptionReference(inception)),
    "rsfid": lambda inception: FrechetInceptionDistance(
        inception, InceptionReference(inception, spatial=True), "spatial"
    ),
    "reference": lambda inception: InceptionReference(inception, spatial=True),
    "ris": lambda inception: InceptionScore(inception, 11),
}


@pytest.mark.parametrize("name", INCEPTION)
def test_metrics_of_inception_features(tmp_path, name):
    images, reconstructions = fake.random_images(11), fake.random_images(11, seed=1)
    batches = [fake.make_pairs(images, reconstructions, rows) for rows in (range(7), range(7, 11))]
    here, there, waits = states(lambda device: INCEPTION[name](elsewhere(device)), tmp_path, batches)
    alike(there, here)
    assert waits == []


def test_what_is_kept_on_disk_is_fetched_once_a_batch(tmp_path):
    images, reconstructions = fake.random_images(5), fake.random_images(5, seed=1)
    batch = fake.make_pairs(images, reconstructions)
    here, there, waits = states(lambda device: FeatureTable(elsewhere(device)), tmp_path, [batch])
    assert there == here and waits == ["_to_copy"]
    tokens = shared.random_tokens(shared.layout_of((16, 4), 6), 4)
    here, there, waits = states(lambda device: TokenStore(), tmp_path, [shared.pairs(tokens, range(4))])
    assert there == here and waits == ["_to_copy"]
    rows = [(tmp_path / place / "part.rows").read_bytes() for place in ("here", "there")]
    assert rows[0] == rows[1]


def test_inception(tmp_path):
    path = helper("inception_weights.py").save_random_inception(tmp_path / "inception.pth")
    images = fake.random_images(2, size=32)
    expected = Inception(path)(images)
    with pretend.PretendCuda() as mode:
        inception = Inception(path, device="cuda")
        mode.waits.clear()
        features = inception(images.to("cuda"))
        logits = inception.logits(features.pool)
        assert {part.device.type for part in (*features, logits)} == {"cuda"} and mode.waits == []
        for found, wanted in zip(features, expected, strict=True):
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_moments_turn_into_sums_on_the_device():
    features = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    whole, part, merged = Moments(4), Moments(4), Moments(4)
    whole.update(features)
    with pretend.PretendCuda() as mode:
        for rows in features[:7].to("cuda").split(3):
            part.update(rows)
        assert mode.waits == []
        part.merge(whole.state_dict() | {"count": 0, "sum": torch.zeros(4).double(), "outer": torch.zeros(4, 4)})
        merged.merge(part.state_dict())
    merged.update(features[7:])
    alike(merged.state_dict(), whole.state_dict())


@pytest.mark.parametrize("sizes, digits", [((16, 4), ()), ((16,), (2, 2, 2, 2)), ((1 << 21,), (2,) * 21)])
def test_use_of_the_codebook(tmp_path, sizes, digits):
    tokens = shared.random_tokens(shared.layout_of(sizes, 6, (2, 3)), 7, dropped=0.2)
    batches = [shared.pairs(tokens[rows], rows) for rows in torch.arange(7).split(4)]
    here, there, waits = states(lambda device: CodebookUsage(sizes, digits), tmp_path, batches)
    alike(there, here)
    assert waits == []


def titok(quantizer):
    torch.manual_seed(0)
    return TiTok(quantizer, 16, patch_size=8, num_latent_tokens=6, encoder_size=(32, 1, 2), decoder_size=(32, 1, 2))


def vq(codes=16):
    torch.manual_seed(0)
    return VectorQuantizer(codes, 4)


QUANTIZERS = {
    "vq": vq,
    "residual": lambda: Residual(vq(), depth=2),
    "binary": lambda: LookupFreeQuantizer(10),
}


@pytest.mark.parametrize("name, options", [*((name, {}) for name in QUANTIZERS), ("vq", {"neighbours": "latent"})])
@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_perturbed_tokens(monkeypatch, name, options, count):
    monkeypatch.setattr("vistok.quantizers.search.BACKEND", "torch")  # the kernel of the search needs the real thing
    images = fake.random_images(3, size=16)
    index = torch.tensor([4, 5, 9])
    found = {}
    for device in ("cpu", "cuda"):
        with pretend.PretendCuda() as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            tokenizer = titok(QUANTIZERS[name]()).eval().to(device)
            perturbation = TokenPerturbation(Codes(tokenizer), count=count, **options)
            originals = Originals(index, ["a", "b", "c"], torch.full_like(index, -1), images.to(device))
            perturbation.codes.tokens(originals)
            mode.waits.clear()
            tokens = perturbation.tokens(originals, 0.6, 1)
            waits = [*mode.waits]
            found[device] = {name: part.cpu() for name, part in tokens.indices.items()}
            PerturbedVariant(perturbation, 0.6).reconstruct(originals)
        assert waits == []
    alike(found["cuda"], found["cpu"])


def test_comparisons_of_features():
    draws = np.random.RandomState(0)
    x, y = (draws.rand(40, 8).astype(np.float32) for _ in range(2))
    kid = kernel_distances(x, y, subsets=3, subset_size=20)
    found = precision_recall(x, y)
    with pretend.PretendCuda() as mode:
        torch.testing.assert_close(kernel_distances(x, y, subsets=3, subset_size=20, device="cuda"), kid)
        assert mode.products == 3 * 3
        assert precision_recall(x, y, device="cuda") == found
        assert mode.products == 3 * 3 + 3


def test_token_model():
    layout = shared.layout_of((8, 4), 3)
    tokens, labels = shared.random_tokens(layout, 6, dropped=0.2).flatten(), torch.arange(6) % 3
    slots = Slots(layout)
    model = TokenModel(slots, 16, 1, 2, 3)
    expected = model(*TokenData(tokens, slots, labels, torch.device("cpu")).batch(torch.arange(6)))
    with pretend.PretendCuda() as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.to("cuda")
        found = model(*TokenData(tokens, slots, labels, torch.device("cuda")).batch(torch.arange(6)))
        assert mode.waits == []
        torch.testing.assert_close(found.cpu(), expected.detach())


def test_features_of_the_linear_probe(monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search.BACKEND", "torch")
    tokenizer = titok(vq()).eval()
    layers = {"encoder": "encoder", "quantized": "output of the bottleneck", "decoder": "decoder.norm_out"}
    images = fake.random_images(2, size=16).float() / 255
    with listening(tokenizer, layers) as features:
        expected = features(images)
    with pretend.PretendCuda() as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with listening(tokenizer.to("cuda"), layers) as features:
            found = features(images.to("cuda"))
        assert mode.waits == []
        for kind, rows in expected.items():
            torch.testing.assert_close(found[kind].cpu(), rows)
