"""LPIPS: trunk weights from a local file, frozen, in no checkpoint; a clear remedy when they are nowhere."""

import urllib.error

import pytest
import torch
import torchvision

from vistok.losses.perceptual import LPIPSLoss


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A torchvision file of random AlexNet weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    features = torchvision.models.alexnet(weights=None).features
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


def test_equals_the_lpips_definition(trunk):
    """Unit-normalised features of five layers, squared differences, learned weights, mean over space."""
    loss = LPIPSLoss("alex", trunk_weights=str(trunk))
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    features = torchvision.models.alexnet(weights=None).features.eval()
    features.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(trunk).items()})
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    heads = [getattr(loss._network[0], f"lin{i}").model[1].weight for i in range(5)]
    a, b, total, taps = ((2 * x - 1) - shift) / scale, ((2 * y - 1) - shift) / scale, 0, iter(heads)
    with torch.no_grad():
        for layer in features:
            a, b = layer(a), layer(b)
            if isinstance(layer, torch.nn.ReLU):
                unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b)]
                total = total + ((unit[0] - unit[1]).square() * next(taps).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    assert torch.allclose(loss(x, y), total.mean(), rtol=1e-4)
    assert loss(x, x).item() == pytest.approx(0, abs=1e-7)


def test_is_frozen_and_in_no_checkpoint(trunk):
    loss = LPIPSLoss("alex", trunk_weights=str(trunk)).train()
    assert not loss.state_dict() and not list(loss.parameters())
    assert not loss._network[0].training
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    loss(x, torch.rand(1, 3, 64, 64)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss._network[0].parameters())


def test_follows_its_parent_to_another_device_or_dtype(trunk):
    loss = torch.nn.ModuleList([LPIPSLoss("alex", trunk_weights=str(trunk))]).double()
    assert {p.dtype for p in loss[0]._network[0].parameters()} == {torch.float64}


def test_autocast_does_not_reach_it(trunk):
    loss, x, y = LPIPSLoss("alex", trunk_weights=str(trunk)), torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(x, y), LPIPSLoss("alex", trunk_weights=str(trunk))(x, y))


def test_missing_weights_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*vgg16-397923af\.pth.*trunk_weights"):
        LPIPSLoss("vgg")
    with pytest.raises(FileNotFoundError, match="no file '.*nowhere.pth'.*trunk_weights"):
        LPIPSLoss("vgg", trunk_weights=str(tmp_path / "nowhere.pth"))


def test_the_hub_cache_is_used_before_a_download(tmp_path, monkeypatch, trunk):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(trunk.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloaded"))
    LPIPSLoss("alex")


def test_foreign_files_and_names_are_refused(tmp_path, trunk):
    with pytest.raises(ValueError, match="not torchvision's vgg: slice1.0.weight"):
        LPIPSLoss("vgg", trunk_weights=str(trunk))
    (tmp_path / "broken.pth").write_bytes(b"not a weights file")
    with pytest.raises(ValueError, match="broken.pth is not a readable weights file"):
        LPIPSLoss("alex", trunk_weights=str(tmp_path / "broken.pth"))
    with pytest.raises(ValueError, match="'squeeze'"):
        LPIPSLoss("squeeze")
