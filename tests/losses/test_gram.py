"""Gram loss: its definition by loops, what it ignores and what it sees, and what it keeps in memory."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torchvision import models

from vistok.losses.gram import GramLoss, gram_matrix

_spec = importlib.util.spec_from_file_location("vistok_test_trunks", Path(__file__).with_name("trunks.py"))
trunks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trunks)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(trunks.write_weights("vgg16", tmp_path_factory.mktemp("weights")))


def plain(file, x, y):
    """Torchvision's features, the layers of LPIPS, one Gram matrix per image."""
    with torch.device("meta"):
        features = models.vgg16().features
    state = {key.removeprefix("features."): value for key, value in torch.load(file, weights_only=True).items()}
    features.load_state_dict(state, assign=True)
    features.to(x.dtype)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = ((z - mean.view(3, 1, 1)) / std.view(3, 1, 1) for z in (x, y))
    total = 0
    for number, layer in enumerate(features):
        x, y = layer(x), layer(y)
        if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            for a, b in zip(x, y, strict=True):
                grams = [z.flatten(1) @ z.flatten(1).T / z.numel() for z in (a, b)]
                total = total + (grams[0] - grams[1]).square().mean() / len(x)
    return total


def test_gram_matrix_by_loops():
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for b in range(2):
        for i in range(3):
            for j in range(3):
                expected = (x[b, i] * x[b, j]).sum() / (3 * 4 * 5)
                torch.testing.assert_close(gram_matrix(x)[b, i, j], expected)


def test_value_and_gradient_are_those_of_the_plain_computation(file):
    images = trunks.photograph(64).repeat(2, 1, 1, 1)
    versions = torch.cat([trunks.distorted(images[:1])[i] for i in (5, 8)])
    loss = GramLoss(trunk_weights=file)
    torch.testing.assert_close(loss(versions, images), plain(file, versions, images), rtol=1e-4, atol=0)
    assert loss(images, images).item() == 0
    ours, theirs = (versions.double().requires_grad_() for _ in range(2))
    loss.double()(ours, images.double()).backward()
    plain(file, theirs, images.double()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6 * theirs.grad.abs().max().item())


def test_a_layer_sees_channels_together_but_not_where():
    x = torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., torch.randperm(36, generator=torch.Generator().manual_seed(1))].view_as(x)
    torch.testing.assert_close(gram_matrix(moved), gram_matrix(x))
    torch.testing.assert_close(gram_matrix(x.repeat(1, 1, 2, 2)), gram_matrix(x))
    assert not torch.allclose(gram_matrix(torch.cat([x[:, :2], moved[:, 2:]], 1)), gram_matrix(x), rtol=1e-3)


def test_is_frozen_in_eval_and_in_no_checkpoint(file):
    loss = torch.nn.ModuleList([GramLoss(trunk_weights=file)]).train()
    assert loss[0].name == "gram"
    assert not loss.state_dict() and not list(loss.parameters())
    assert not any(module.training for module in loss[0].trunk.network.modules())
    assert not any(p.requires_grad for p in loss[0].trunk.network.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keeps_no_more_than_the_trunk_and_one_matrix_per_stage(precision, file):
    loss = GramLoss(trunk_weights=file, precision=precision)
    images = torch.rand(1, 3, 128, 128)
    x = torch.rand(1, 3, 128, 128, requires_grad=True)

    def trunk_alone():
        features, kept = loss.prepare(x), []
        with loss.autocast("cpu"):
            for stage in loss.trunk.network.stages:
                features = stage(features)
                kept.append(features * features)  # what is compared has to be kept
        return kept

    alone = trunks.saved_bytes(trunk_alone)
    matrices = sum(4 * channels**2 for channels in (64, 128, 256, 512, 512))
    assert trunks.saved_bytes(lambda: loss(x, images)) <= 1.02 * (alone + matrices)


def test_bfloat16_ranks_distortions_like_float32(file):
    """Measured: Spearman 1.000, values within 3.5 %, gradient at cosine 0.96."""
    image = trunks.photograph(64)
    versions = trunks.distorted(image)
    values, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        loss = GramLoss(trunk_weights=file, precision=precision)
        with torch.no_grad():
            values[precision] = [loss(version, image).item() for version in versions]
        x = versions[6].clone().requires_grad_()
        loss(x, image).backward()
        gradients[precision] = x.grad.flatten()
    assert values["float32"] != values["bfloat16"]
    assert trunks.spearman(*values.values()) >= 0.99
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.06)
    assert torch.cosine_similarity(*gradients.values(), dim=0, eps=1e-20) > 0.9


def test_matrices_of_bfloat16_features_are_float32(file):
    loss, features = GramLoss(trunk_weights=file, precision="bfloat16"), []
    for stage in loss.trunk.network.stages:
        stage.register_forward_hook(lambda module, inputs, output: features.append(output))
    value = loss(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    assert {x.dtype for x in features} == {torch.bfloat16}
    pairs = zip(features[::2], features[1::2], strict=True)  # of the images, of the reconstructions
    grams = [[z.double().flatten(2) @ z.double().flatten(2).mT / z[0].numel() for z in pair] for pair in pairs]
    expected = sum((a - b).square().mean() for a, b in grams)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_autocast_does_not_reach_the_matrices(file):
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    loss = GramLoss(trunk_weights=file)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x, y)
    assert torch.equal(inside, loss(x, y))
