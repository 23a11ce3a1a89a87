"""Convolutional discriminators: the originals' numbers, published sizes, padding, blur, minibatch deviation."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistok.losses.blur import Blur
from vistok.losses.blur_discriminator import BlurDiscriminator
from vistok.losses.patchgan import PatchGAN
from vistok.losses.stylegan_discriminator import StyleGANDiscriminator, minibatch_deviation

_spec = importlib.util.spec_from_file_location(
    "vistok_test_parity", Path(__file__).parents[1] / "quantizers" / "parity.py"
)
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def titok_names(weights):
    """The published key names of TiTok's discriminator, as ours; the blur kernel is no weight here."""
    renamed = {}
    for name, value in weights.items():
        if name.endswith("kernel"):
            continue
        name = (
            name.replace("block_in.0.", "stem.").replace("to_logits.0.", "hidden.").replace("to_logits.2.", "logits.")
        )
        if name.startswith("blocks."):
            _, stage, layer, kind = name.split(".")
            name = f"stages.{stage}.{ {'0': 'conv', '2': 'norm'}[layer] }.{kind}"
        renamed[name] = value
    return renamed


@pytest.fixture
def titok():
    config, weights, io = parity.fixture("losses-titok-discriminator")
    network = BlurDiscriminator(config["hidden_channels"], config["num_stages"])
    network.load_state_dict(titok_names(weights))
    return network, weights, io


def test_blur_discriminator_equals_the_original(titok):
    network, weights, io = titok
    image = io["image"].requires_grad_()
    logits = network(image)
    parity.assert_close(logits, io["logits"])
    (gradient,) = torch.autograd.grad(logits, image, io["grad_out"])
    torch.testing.assert_close(gradient, io["grad_image"], rtol=0, atol=1e-4 * 0.38)
    assert all(
        torch.equal(weights[f"blocks.{i}.1.kernel"], stage.blur.kernel) for i, stage in enumerate(network.stages)
    )


def test_blur_discriminator_equals_the_original_where_pooling_windows_overlap(titok):
    network, _, io = titok
    parity.assert_close(network(io["image_large"]), io["logits_large"])


def test_patchgan_equals_the_original_in_both_modes():
    config, weights, io = parity.fixture("losses-taming-discriminator")
    network = PatchGAN(config["ndf"], config["n_layers"])
    network.load_state_dict({name.replace("main.", "layers."): value for name, value in weights.items()})
    # The original takes [-1, 1]; ours [0, 1], so gradients are twice as large.
    image, fake = ((io[name] + 1) / 2 for name in ("image_real", "image_fake"))
    image = image.requires_grad_()
    for mode in ("eval", "train"):
        network.train(mode == "train")
        logits = network(image)
        parity.assert_close(logits, io[f"logits_{mode}_real"])
        (gradient,) = torch.autograd.grad(logits, image, io["grad_out"])
        expected = 2 * io[f"grad_image_{mode}"]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    parity.assert_close(network(fake), io["logits_train_fake"])
    for name, value in network.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(value, io[f"after.{name.replace('layers.', 'main.')}"], rtol=0, atol=1e-5)


def test_published_sizes():
    assert num_parameters(BlurDiscriminator()) == 1_909_889
    assert num_parameters(PatchGAN()) == 2_765_633
    assert PatchGAN().eval()(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    with torch.device("meta"):
        assert num_parameters(StyleGANDiscriminator()) == 28_864_129
        assert num_parameters(StyleGANDiscriminator(1024)) == 29_012_513


def test_patchgan_starts_from_its_published_initialisation():
    torch.manual_seed(0)
    network = PatchGAN()
    convolutions = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.cat([w.flatten() for w in convolutions]).std().item() == pytest.approx(0.02, rel=0.01)
    assert torch.cat([m.weight.detach() for m in norms]).mean().item() == pytest.approx(1, abs=0.01)
    assert torch.cat([m.weight.detach() for m in norms]).std().item() == pytest.approx(0.02, rel=0.2)
    assert all((m.bias == 0).all() for m in norms)


@pytest.mark.parametrize("make", [lambda r: BlurDiscriminator(32, 1, r), lambda r: PatchGAN(4, 1, r).eval()])
def test_pixel_range_is_what_the_network_sees(make):
    torch.manual_seed(0)
    narrow, images = make((0.0, 1.0)), torch.rand(2, 3, 16, 16)
    wide = make((-1.0, 3.0))
    wide.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(wide((images + 1) / 4), narrow(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 5)])
def test_blur_with_same_padding_equals_brute_force(size):
    torch.manual_seed(0)
    x = torch.randn(1, 2, *size)
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    out = Blur()(x)
    assert out.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))
    missing = [max((-(-s // 2) - 1) * 2 + 4 - s, 0) // 2 for s in size]
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            total = torch.zeros(2)
            for a in range(4):
                for b in range(4):
                    y, z = 2 * i - missing[0] + a, 2 * j - missing[1] + b
                    if 0 <= y < size[0] and 0 <= z < size[1]:
                        total += taps[a] * taps[b] * x[0, :, y, z]
            torch.testing.assert_close(out[0, :, i, j], total)


def test_stylegan_block_blurs_before_it_strides():
    """Against the same layers put together from plain convolutions."""
    torch.manual_seed(0)
    network = StyleGANDiscriminator(8, channels=32, minibatch_group=0, pixel_range=(0.0, 1.0))
    images, block = torch.randn(2, 3, 8, 8), network.blocks[0]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

    def equal(layer, x, **options):
        return F.conv2d(x, layer.weight / layer.weight[0].numel() ** 0.5, layer.bias, **options)

    def act(x):
        return F.leaky_relu(x, 0.2) * 2**0.5

    def blur(x):
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (2, 2, 2, 2)), kernel, groups=x.shape[1])

    x = act(equal(network.stem, images))
    h = act(equal(block.conv2, blur(act(equal(block.conv1, x, padding=1))), stride=2))
    shortcut = equal(block.shortcut, blur(x)[:, :, 1:-1, 1:-1], stride=2)
    x = act(equal(network.last, (h + shortcut) / 2**0.5, padding=1)).flatten(1)
    x = act(F.linear(x, network.hidden.weight / x.shape[1] ** 0.5, network.hidden.bias))
    expected = F.linear(x, network.logits.weight / x.shape[1] ** 0.5, network.logits.bias)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_stylegan_weights_have_unit_variance_and_outputs_keep_it():
    torch.manual_seed(0)
    network = StyleGANDiscriminator(16, channels=2048, minibatch_group=0)
    for layer in (network.blocks[0].conv1, network.last):
        assert layer.weight.std().item() == pytest.approx(1, rel=0.02) and (layer.bias == 0).all()
        assert layer(torch.randn(16, layer.in_channels, 8, 8))[:, :, 1:-1, 1:-1].std().item() == pytest.approx(
            1, rel=0.05
        )
    assert network.hidden(torch.randn(64, network.hidden.in_features)).std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (6, 4), (1, 4), (4, 1)])
def test_minibatch_deviation_equals_brute_force(batch, group):
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 2, 2)
    out = minibatch_deviation(x, group)
    members = {(8, 4): 4, (6, 4): 3, (1, 4): 1, (4, 1): 1}[batch, group]
    stride = batch // members
    assert torch.equal(out[:, :3], x)
    for i in range(batch):
        others = x[i % stride :: stride]
        expected = (others.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(out[i, 3], expected.expand(2, 2))


@pytest.mark.parametrize("make", [lambda: BlurDiscriminator(32, 2), lambda: StyleGANDiscriminator(16, 64)])
def test_batch_statistics_says_whether_images_see_each_other(make):
    torch.manual_seed(0)
    network, images = make(), torch.rand(4, 3, 16, 16)
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5) is not network.batch_statistics
    assert PatchGAN.batch_statistics and not StyleGANDiscriminator(16, 64, minibatch_group=0).batch_statistics


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of 32.*got 48"):
        BlurDiscriminator(48)
    with pytest.raises(ValueError, match="between 1 and 4; got 5"):
        BlurDiscriminator(32, 5)
    with pytest.raises(ValueError, match="must be positive; got 64 and 0"):
        PatchGAN(64, 0)
    with pytest.raises(ValueError, match="power of two from 8; got 48"):
        StyleGANDiscriminator(48)
    with pytest.raises(ValueError, match=r"16x16; got \(1, 3, 32, 32\)"):
        StyleGANDiscriminator(16, 64)(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"low < high; got \(1.0, -1.0\)"):
        PatchGAN(pixel_range=(1.0, -1.0))
