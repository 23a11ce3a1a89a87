"""LPIPS: the values of the ``lpips`` package, frozen, in no checkpoint, cheap; and where trunk weights come from."""

import copy
import importlib.util
import urllib.error
from pathlib import Path

import pytest
import torch

from vistok.losses.perceptual import LPIPSLoss, _WeightedUnitDistance
from vistok.losses.term import LossTerm

_spec = importlib.util.spec_from_file_location("vistok_test_trunks", Path(__file__).with_name("trunks.py"))
trunks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trunks)

NETS = {"alex": "alexnet", "vgg": "vgg16"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {net: str(trunks.write_weights(name, folder)) for net, name in NETS.items()}


@pytest.fixture
def alex(files):
    return lambda **kwargs: LPIPSLoss("alex", trunk_weights=files["alex"], **kwargs)


@pytest.mark.parametrize("net", NETS)
def test_value_and_gradient_are_those_of_the_lpips_package(net, files):
    loss, reference = LPIPSLoss(net, trunk_weights=files[net]), trunks.package_lpips(net, files[net])
    images = trunks.photograph(64).expand(2, -1, -1, -1)
    versions = torch.cat([trunks.distorted(images[:1])[i] for i in (6, 8)])
    ours, theirs = versions.clone().requires_grad_(), versions.clone().requires_grad_()
    value, expected = loss(ours, images), reference(theirs, images, normalize=True).mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-5)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())
    assert loss(images, images).item() == 0


def test_distance_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(0)
    a, b, w = (torch.rand(s, generator=generator).double() for s in ((2, 5, 3, 4), (2, 5, 3, 4), (1, 5, 1, 1)))
    assert torch.autograd.gradcheck(lambda x: 0.7 * _WeightedUnitDistance.apply(x, b, w), a.requires_grad_())


def test_dead_features_have_a_finite_gradient():
    a, b = torch.rand(1, 4, 2, 2), torch.rand(1, 4, 2, 2)
    a[..., 0, 0] = b[..., 1, 1] = 0
    a.requires_grad_()
    _WeightedUnitDistance.apply(a, b, torch.ones(1, 4, 1, 1)).backward()
    assert a.grad.isfinite().all()


def test_a_whole_loss_has_the_gradient_of_finite_differences(alex):
    loss = alex().double()
    image = trunks.photograph(64).double()
    x = trunks.distorted(trunks.photograph(64))[1].double().requires_grad_()
    loss(x, image).backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        slope = (loss(x + 1e-7 * direction, image) - loss(x - 1e-7 * direction, image)) / 2e-7
    assert (x.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_it_is_a_term_with_the_arguments_of_one(alex):
    term = alex(weight=0.5, start_step=7, precision="bfloat16")
    assert isinstance(term, LossTerm)
    assert (term.name, term.weight, term.start_step, term.precision) == ("lpips", 0.5, 7, "bfloat16")
    assert not term.active(6) and term.active(7)
    x, y = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    assert torch.equal(alex(weight=9.0)(x, y), alex(weight=1.0)(x, y)), "forward returns the unweighted value"


def test_is_frozen_in_eval_and_in_no_checkpoint(alex):
    loss = torch.nn.ModuleList([alex()]).train()
    assert not loss.state_dict() and not list(loss.parameters()) and not list(loss.buffers())
    network = loss[0].trunk.network
    assert not any(module.training for module in network.modules())
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    loss[0](x, torch.rand(1, 3, 64, 64)).backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in loss[0].heads.network.parameters())


def test_images_get_no_gradient_even_if_they_ask_for_one(alex):
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert not alex()(torch.rand(1, 3, 64, 64), images).requires_grad


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keeps_no_more_than_the_trunk_and_one_gradient_per_stage(precision, files):
    """Nothing of the images, no float32 copies of bfloat16 features, no differences."""
    loss = LPIPSLoss("vgg", trunk_weights=files["vgg"], precision=precision)
    images = torch.rand(1, 3, 64, 64)
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    taps = []

    def trunk_alone():
        features = loss.prepare(x)
        with loss.autocast("cpu"):
            for stage in loss.trunk.network.stages:
                features = stage(features)
                taps.append(features.nbytes)
        return features

    alone = trunks.saved_bytes(trunk_alone)
    assert trunks.saved_bytes(lambda: loss(x, images)) <= 1.02 * (alone + sum(taps))


@pytest.mark.parametrize("net", NETS)
def test_bfloat16_ranks_distortions_like_float32(net, files):
    """Measured: Spearman 1.000 (vgg) and 0.997 (alex), values within 1.2 %, gradients at cosine 0.986 and 0.995."""
    image = trunks.photograph(64)
    versions = trunks.distorted(image)
    values, gradients = {}, {}
    for precision in ("float32", "bfloat16"):
        loss = LPIPSLoss(net, trunk_weights=files[net], precision=precision)
        with torch.no_grad():
            values[precision] = [loss(version, image).item() for version in versions]
        x = versions[6].clone().requires_grad_()
        value = loss(x, image)
        assert value.dtype == torch.float32
        value.backward()
        gradients[precision] = x.grad.flatten()
    assert values["float32"] != values["bfloat16"]
    assert trunks.spearman(*values.values()) >= 0.99
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.03)
    assert torch.cosine_similarity(*gradients.values(), dim=0, eps=1e-20) > 0.97


def test_bfloat16_is_the_trunks_alone(alex):
    loss, seen = alex(precision="bfloat16"), []
    for stage in loss.trunk.network.stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert loss.prepare(torch.rand(1, 3, 64, 64).bfloat16()).dtype == torch.float32
    loss(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    assert seen == [torch.bfloat16] * 10


def test_float32_is_out_of_reach_of_autocast(alex):
    x, y = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alex()(x, y), alex()(x, y))
        inside = alex()(x, y)
    assert torch.equal(inside, alex()(x, y))


def test_follows_its_owner_to_another_type_and_is_copied_with_it(alex):
    owner = torch.nn.ModuleList([alex()])
    for dtype in (torch.float64, torch.bfloat16):
        moved = copy.deepcopy(owner).to(dtype)
        assert {p.dtype for p in moved[0].trunk.network.parameters()} == {dtype}
        value = moved[0](torch.rand(1, 3, 64, 64, dtype=dtype), torch.rand(1, 3, 64, 64, dtype=dtype))
        assert value.dtype == torch.promote_types(dtype, torch.float32)


def test_works_channels_last(alex):
    weights = [p for p in alex().trunk.network.parameters() if p.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    seen = []
    loss = alex()
    loss.trunk.network.stages[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_pairs_that_do_not_match_are_refused(alex):
    with pytest.raises(ValueError, match=r"got \(2, 3, 64, 64\) and \(1, 3, 64, 64\)"):
        alex()(torch.rand(2, 3, 64, 64), torch.rand(1, 3, 64, 64))


def test_missing_weights_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*vgg16-397923af\.pth.*trunk_weights"):
        LPIPSLoss("vgg")
    with pytest.raises(FileNotFoundError, match="no file '.*nowhere.pth'.*trunk_weights"):
        LPIPSLoss("vgg", trunk_weights=str(tmp_path / "nowhere.pth"))


def test_a_download_is_checked_and_not_executed(monkeypatch, tmp_path, files):
    asked = {}

    def download(url, **kwargs):
        asked.update(kwargs, url=url)
        return torch.load(files["alex"], weights_only=True)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    LPIPSLoss("alex")
    assert asked["url"] == "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    assert asked["weights_only"] and asked["check_hash"]


def test_the_hub_cache_is_used_before_a_download(tmp_path, monkeypatch, files):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(Path(files["alex"]).read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloaded"))
    LPIPSLoss("alex")


def test_file_names_are_those_of_torchvision():
    from torchvision import models

    from vistok.losses.trunks import _FILES, _HOST

    enums = {"vgg16": "VGG16_Weights", "alexnet": "AlexNet_Weights", "convnext_small": "ConvNeXt_Small_Weights"}
    assert {name: _HOST + file for name, file in _FILES.items()} == {
        name: getattr(models, enum).IMAGENET1K_V1.url for name, enum in enums.items()
    }


def test_foreign_files_and_names_are_refused(tmp_path, files):
    with pytest.raises(ValueError, match="not torchvision's vgg16: features.0.weight"):
        LPIPSLoss("vgg", trunk_weights=files["alex"])
    (tmp_path / "broken.pth").write_bytes(b"not a weights file")
    with pytest.raises(ValueError, match="broken.pth is not a readable weights file"):
        LPIPSLoss("alex", trunk_weights=str(tmp_path / "broken.pth"))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list, not a dict of weights"):
        LPIPSLoss("alex", trunk_weights=str(tmp_path / "list.pth"))
    with pytest.raises(ValueError, match="net must be one of .*'squeeze'"):
        LPIPSLoss("squeeze")
