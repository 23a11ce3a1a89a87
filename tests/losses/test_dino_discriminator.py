"""The discriminator on a frozen vision transformer: readouts, heads, virtual batches, crops, weights files."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vistok.losses.adversarial import AdversarialLoss
from vistok.losses.dino_discriminator import DINODiscriminator, VirtualBatchNorm

TINY = "test_vit"  # six blocks of width 64, 160 x 160 pixels, 100 patches


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, as timm would publish it: with a classifier."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(TINY).state_dict(), path)
    return path


@pytest.fixture
def network(weights):
    torch.manual_seed(1)
    return DINODiscriminator(TINY, str(weights), readouts=(1, 3, 5))


def images(batch=4, size=160, seed=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_readouts_are_the_tokens_of_the_transformer_plus_its_class_token(network, weights):
    trunk = timm.create_model(TINY, checkpoint_path=str(weights)).eval()
    x = images(2)
    first = []
    trunk.blocks[0].register_forward_pre_hook(lambda module, args: first.append(args[0]))
    with torch.no_grad():
        deep = trunk.forward_intermediates(
            x, indices=[1, 3, 5], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        expected = [first[0][:, 1:] + first[0][:, :1]] + [patches + prefix for patches, prefix in deep]
        features = network.features(x)
    assert len(features) == len(network.heads) == 4
    for own, other in zip(features, expected, strict=True):
        assert own.shape == (2, 100, 64)
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_logits_equal_the_heads_written_out(network):
    """Unit spectral norm, circular convolutions, batch norm over the batch of two, residual over the root of two."""
    network.eval()
    x = images(2)
    normalized = (x - network.mean) / network.std
    columns = []
    with torch.no_grad():
        for tokens, head in zip(network.features(normalized), network.heads, strict=True):

            def block(h, part):
                conv, norm = part[0], part[1]
                reach = conv.kernel_size[0] // 2
                h = F.conv1d(torch.cat([h[:, :, h.shape[2] - reach :], h, h[:, :, :reach]], 2), conv.weight, conv.bias)
                return F.leaky_relu(F.batch_norm(h, None, None, norm.weight, norm.bias, training=True), 0.2)

            h = block(tokens.transpose(1, 2), head[0])
            h = (h + block(h, head[1].body)) / 2**0.5
            columns.append(F.conv1d(h, head[2].weight, head[2].bias)[:, 0])
            for conv in (head[0][0], head[1].body[0], head[2]):
                assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.1)
        logits = network(x)
    assert logits.shape == (2, 400)
    torch.testing.assert_close(logits, torch.cat(columns, 1), rtol=1e-4, atol=1e-5)


def test_published_shape_of_a_head(network):
    """Of a ViT-S at the published sizes: width 384, kernel 9, five readouts."""
    published = sum(p.numel() for p in network.heads.parameters())
    width, kernel = 64, 9
    head = (width * width + width) + (kernel * width * width + width) + 4 * width + (width + 1)
    assert published == 4 * head
    assert network.heads[0][1].body[0].padding_mode == "circular"


@pytest.mark.parametrize(("batch", "groups"), [(16, [8, 8]), (8, [8]), (6, [6]), (12, [6, 6]), (11, [1] * 11)])
def test_virtual_batch_norm_equals_batch_norm_of_each_group(batch, groups):
    torch.manual_seed(0)
    norm, x = VirtualBatchNorm(3, 8), torch.randn(batch, 3, 5) * 2 + 1
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = [F.batch_norm(part, None, None, norm.weight, norm.bias, training=True) for part in x.split(groups)]
    torch.testing.assert_close(norm(x), torch.cat(expected))
    torch.testing.assert_close(norm.eval()(x), torch.cat(expected))


def test_only_the_heads_are_trained_and_saved(network):
    names = set(network.state_dict()) | {name for name, _ in network.named_parameters()}
    assert names and all(name.startswith("heads.") for name in names)
    term = AdversarialLoss(network, weight=0.5)
    fakes = images(2).requires_grad_()
    before = {name: value.clone() for name, value in network.trunk.network.state_dict().items()}
    term(fakes, images(2, seed=3), 0).loss.backward()
    assert fakes.grad.abs().sum() > 0  # through the transformer
    assert all(p.grad is None for p in network.trunk.network.parameters())
    assert all(p.grad is not None for p in network.parameters())
    assert not network.train().trunk.network.training
    assert all(torch.equal(value, before[name]) for name, value in network.trunk.network.state_dict().items())


def test_r1_goes_through_the_attention(network):
    term = AdversarialLoss(network, weight=1e-9, discriminator_weight=0.0, r1_weight=1.0)
    output = term(images(2).requires_grad_(), images(2, seed=3), 0)
    output.loss.backward()
    assert output.terms["r1"] > 0
    assert network.heads[0][0][0].parametrizations.weight.original.grad.abs().sum() > 0


def test_real_images_and_reconstructions_do_not_share_statistics(network):
    """A score of real images is the same whatever they are compared with."""
    real = images(3)
    term = AdversarialLoss(network.eval())
    with torch.no_grad():
        scores = [term(fakes, real, 0).terms["logits_real"] for fakes in (images(3, seed=5), torch.zeros_like(real))]
    assert torch.equal(*scores)


def test_larger_images_are_cropped_or_averaged_with_equal_chance(network):
    x = torch.arange(164.0).view(1, 1, 164, 1).expand(2, 3, 164, 164) + torch.arange(164.0) / 1024
    torch.manual_seed(0)
    tops, lefts, averaged = [], [], 0
    for _ in range(300):
        out = network.fit(x)
        assert out.shape == (2, 3, 160, 160)
        if out[0, 0, 0, 0] % 1 < 0.1:  # an average lies between two rows
            tops.append(int(out[0, 0, 0, 0]))
            lefts.append(round((out[0, 0, 0, 0] - tops[-1]).item() * 1024))
            assert torch.equal(out, x[:, :, tops[-1] : tops[-1] + 160, lefts[-1] : lefts[-1] + 160])
        else:
            averaged += 1
            torch.testing.assert_close(out, F.adaptive_avg_pool2d(x, 160))
    assert 110 < averaged < 190
    assert set(tops) == set(lefts) == set(range(5))


def test_evaluation_always_averages_and_small_images_are_enlarged(network):
    network.eval()
    x = images(1, 320)
    assert all(torch.equal(network.fit(x), F.avg_pool2d(x, 2)) for _ in range(5))
    assert network.train().fit(images(1, 64)).shape == (1, 3, 160, 160)
    same = images(1)
    assert network.fit(same) is same


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_those_of_the_file(weights, tmp_path, suffix):
    from safetensors.torch import load_file

    state = load_file(weights)
    if suffix == "pth":
        weights = tmp_path / "vit.pth"
        torch.save(state, weights)
    trunk = DINODiscriminator(TINY, str(weights), readouts=(2,)).trunk.network
    assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())


def test_missing_weights_name_the_remedy(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.safetensors'; fetch .*timm/vit_small.*as weights"):
        DINODiscriminator(weights="nowhere.safetensors")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match="no route to host.*huggingface.co/timm/vit_small_patch16_224.dino"):
        DINODiscriminator()


def test_foreign_files_backbones_and_options_are_refused(weights, tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"not a weights file")
    with pytest.raises(ValueError, match="broken.pth is not a readable weights file"):
        DINODiscriminator(TINY, str(tmp_path / "broken.pth"), readouts=(1,))
    save_file({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit 'test_vit'|lacks"):
        DINODiscriminator(TINY, str(tmp_path / "other.safetensors"), readouts=(1,))
    with pytest.raises(ValueError, match="'resnet_nothing' is not in timm"):
        DINODiscriminator("resnet_nothing", str(weights))
    with pytest.raises(ValueError, match="'test_resnet'"):
        DINODiscriminator("test_resnet", str(weights))
    with pytest.raises(ValueError, match=r"within 0 and 5 \(test_vit\); got \(2, 5, 8, 11\)"):
        DINODiscriminator(TINY, str(weights))
    with pytest.raises(ValueError, match="odd kernel_size.*got 8"):
        DINODiscriminator(TINY, str(weights), readouts=(1,), kernel_size=8)


def test_half_precision_runs_and_stays_finite(network):
    term = AdversarialLoss(network, precision="bfloat16")
    fakes = images(2).requires_grad_()
    term(fakes, images(2, seed=3), 0).loss.backward()
    assert fakes.grad.isfinite().all() and fakes.grad.abs().sum() > 0
