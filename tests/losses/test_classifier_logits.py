"""ConvNeXt-S logits: torchvision's classifier at 224 pixels, and TiTok's weight algebra with LPIPS."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from vistok.losses import classifier_logits
from vistok.losses.classifier_logits import ClassifierLogitsLoss
from vistok.losses.perceptual import LPIPSLoss

_spec = importlib.util.spec_from_file_location("vistok_test_trunks", Path(__file__).with_name("trunks.py"))
trunks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trunks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def file(folder):
    return str(trunks.write_weights("convnext_small", folder))


@pytest.fixture
def small(monkeypatch):
    """At 64 pixels a pass takes a twelfth of the time."""
    monkeypatch.setattr(classifier_logits, "_SIZE", 64)


def logits(file, images, size=224):
    """Torchvision's own network after a resize, by hand."""
    with torch.device("meta"):
        network = models.convnext_small()
    network.load_state_dict(torch.load(file, weights_only=True), assign=True)
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return network.eval()((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_equals_the_mean_squared_difference_of_torchvisions_logits_at_224(file):
    image = F.interpolate(trunks.photograph(300), (300, 260), mode="bilinear")
    version = (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    with torch.no_grad():
        expected = (logits(file, version) - logits(file, image)).square().mean()
        assert ClassifierLogitsLoss(trunk_weights=file)(version, image).item() == pytest.approx(
            expected.item(), rel=1e-4
        )


def test_gradient_is_that_of_the_plain_computation(file, small):
    image = trunks.photograph(80)
    ours, theirs = (trunks.distorted(image)[5].clone().requires_grad_() for _ in range(2))
    ClassifierLogitsLoss(trunk_weights=file)(ours, image).backward()
    (logits(file, theirs, 64) - logits(file, image, 64).detach()).square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())


def test_with_lpips_it_is_titoks_weighted_average(file, folder, small):
    """`lpips-convnext_s-1.0-0.1` with weight 1.1: the average divides by 1.0 + 0.1, the weight multiplies it back."""
    lpips = LPIPSLoss("vgg", trunk_weights=str(trunks.write_weights("vgg16", folder)))
    convnext = ClassifierLogitsLoss(trunk_weights=file)
    image = trunks.photograph(64)
    version = trunks.distorted(image)[8]
    with torch.no_grad():
        average = (1.0 * lpips(version, image) + 0.1 * convnext(version, image)) / (1.0 + 0.1)
        total = sum(term.weight * term(version, image) for term in (lpips, convnext))
    assert (lpips.weight, convnext.weight) == (1.0, 0.1)
    torch.testing.assert_close(total, 1.1 * average)


def test_stays_deterministic_and_out_of_checkpoints_when_its_owner_trains(file, small):
    """Stochastic depth is on in train mode."""
    loss = torch.nn.ModuleList([ClassifierLogitsLoss(trunk_weights=file)]).train()
    image = trunks.photograph(64)
    version = trunks.distorted(image)[8]
    with torch.no_grad():
        assert torch.equal(loss[0](version, image), loss[0](version, image))
        assert loss[0](image, image) == 0
    frozen = (loss[0].trunk.network, loss[0].classifier.network)
    assert not any(module.training for network in frozen for module in network.modules())
    assert not any(p.requires_grad for network in frozen for p in network.parameters())
    assert not loss.state_dict() and not list(loss.parameters())


def test_bfloat16_ranks_distortions_like_float32(file, small):
    """Measured: Spearman 0.997, values within 1.3 %, gradient at cosine 0.997."""
    image = trunks.photograph(64)
    versions = trunks.distorted(image)
    values, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        loss = ClassifierLogitsLoss(trunk_weights=file, precision=precision)
        with torch.no_grad():
            values[precision] = [loss(version, image).item() for version in versions]
        x = versions[6].clone().requires_grad_()
        loss(x, image).backward()
        gradients[precision] = x.grad.flatten()
    assert values["float32"] != values["bfloat16"]
    assert trunks.spearman(*values.values()) >= 0.99
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.03)
    assert torch.cosine_similarity(*gradients.values(), dim=0, eps=1e-20) > 0.98


def test_logits_of_bfloat16_features_are_float32(file, small):
    loss, logits = ClassifierLogitsLoss(trunk_weights=file, precision="bfloat16"), []
    loss.classifier.network.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with torch.no_grad():
        value = loss(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    assert [x.dtype for x in logits] == [torch.float32] * 2
    assert not torch.equal(logits[0], logits[0].bfloat16().float())
    torch.testing.assert_close(value, (logits[0] - logits[1]).square().mean())


def test_follows_its_owner_to_another_type(file, small):
    loss = torch.nn.ModuleList([ClassifierLogitsLoss(trunk_weights=file)]).bfloat16()[0]
    with torch.no_grad():
        assert loss(torch.rand(1, 3, 64, 64).bfloat16(), torch.rand(1, 3, 64, 64)).dtype == torch.float32


def test_the_weights_of_another_network_are_refused(folder):
    other = trunks.write_weights("alexnet", folder)
    with pytest.raises(ValueError, match="not torchvision's convnext_small: features.0.0.weight does not fit"):
        ClassifierLogitsLoss(trunk_weights=str(other))


def test_missing_weights_name_their_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"convnext_small-0c510722\.pth .*trunk_weights"):
        ClassifierLogitsLoss(trunk_weights=str(tmp_path / "nowhere.pth"))
