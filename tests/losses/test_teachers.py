"""Teachers: the network's own patch features, from a local weights file, frozen; clear errors without one."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from vistok.losses.teachers import TimmTeacher

MODEL = "test_vit"  # patches of 16, native size 160, one class token, mean and std 0.5


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = timm.create_model(MODEL, num_classes=0).eval()
    for parameter in network.parameters():  # fresh ViTs have small weights and no biases: patches would look alike
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 200, 200, generator=torch.Generator().manual_seed(1))


def teacher(weights, **options):
    return TimmTeacher(MODEL, weights, **{"image_size": 160, "precision": "float32"} | options)


def test_features_are_the_networks_normed_patches_of_normalised_resized_images(network, weights, images):
    subject = teacher(weights)
    small = F.interpolate((images - 0.5) / 0.5, (160, 160), mode="bicubic", align_corners=False, antialias=False)
    with torch.no_grad():
        patches = network.patch_embed.proj(small).flatten(2).transpose(1, 2)
        tokens = torch.cat([network.cls_token.expand(2, -1, -1), patches], 1) + network.pos_embed
        for block in network.blocks:
            tokens = block(tokens)
        expected = network.norm(tokens)[:, 1:]
    assert subject(images).shape == (2, 100, subject.dim) and subject.grid == (10, 10)
    torch.testing.assert_close(subject(images), expected, rtol=1e-4, atol=1e-4)


def test_mean_and_std_come_with_the_name(weights, network):
    subject = teacher(weights)
    assert subject.mean.flatten().tolist() == list(network.pretrained_cfg["mean"])
    assert timm.get_pretrained_cfg("vit_base_patch14_dinov2.lvd142m").mean == (0.485, 0.456, 0.406)


def test_antialias_and_interpolation_are_options(weights, images):
    plain = teacher(weights).preprocess(images)
    expected = F.interpolate(images * 2 - 1, (160, 160), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(weights, antialias=True).preprocess(images), expected, rtol=0, atol=1e-4)
    assert (plain - expected).abs().max() > 0.05
    area = teacher(weights, resize="area").preprocess(images)
    torch.testing.assert_close(area, F.interpolate(images * 2 - 1, (160, 160), mode="area"))


def test_images_of_any_shape_have_the_same_grid(weights):
    subject = teacher(weights)
    for height, width in ((160, 160), (64, 96), (300, 170)):
        assert subject(torch.rand(1, 3, height, width)).shape == (1, 100, subject.dim)


def test_positions_are_resampled_to_another_image_size(network, weights, images):
    subject = teacher(weights, image_size=(64, 96))
    assert subject.grid == (4, 6)
    expected = resample_abs_pos_embed(network.pos_embed, (4, 6), num_prefix_tokens=1)
    assert torch.equal(subject.frozen.network.pos_embed, expected)
    assert subject(images).shape == (2, 24, subject.dim)


def test_bfloat16_features_are_near_and_float32(weights, images):
    exact, rough = teacher(weights)(images), teacher(weights, precision="bfloat16")(images)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert F.cosine_similarity(rough, exact, dim=-1).min() > 0.98
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(weights)(images), exact), "the autocast of the training step reached the teacher"


def test_is_frozen_in_no_state_dict_and_gives_no_gradient(weights):
    subject = teacher(weights).train()
    assert not subject.state_dict() and not list(subject.parameters())
    assert not subject.frozen.network.training
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not subject(images).requires_grad


def test_the_authors_own_key_names_and_heads_are_accepted(network, tmp_path, weights, images):
    state = {**network.state_dict(), "mask_token": torch.zeros(1, 64), "head.weight": torch.zeros(5, 64)}  # as DINOv2's
    torch.save({"model": state}, tmp_path / "pickle.pth")
    assert torch.equal(teacher(str(tmp_path / "pickle.pth"))(images), teacher(weights)(images))


def test_a_file_that_is_not_the_models_is_refused(network, tmp_path):
    state = network.state_dict()
    cases = {
        "lacks": ({k: v for k, v in state.items() if "blocks.1.norm1" not in k}, "lacks 'blocks.1.norm1.weight'"),
        "shape": (state | {"norm.weight": torch.ones(3)}, "does not fit 'test_vit'.*norm.weight"),
        "empty": ({"something": torch.zeros(1)}, "lacks"),
    }
    for name, (content, words) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=rf"(?s){name}.safetensors {words}.*huggingface.co/timm/test_vit"):
            teacher(str(tmp_path / f"{name}.safetensors"))
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not a weights file")
        with pytest.raises(ValueError, match=f"{name} is not a readable weights file"):
            teacher(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no file '.*nowhere.pth'.*give its path as weights"):
        teacher(str(tmp_path / "nowhere.pth"))


def test_a_pickle_that_brings_code_is_not_executed(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").write_text, ("yes",))

    torch.save({"norm.weight": Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth is not a readable weights file"):
        teacher(str(tmp_path / "code.pth"))
    assert not (tmp_path / "executed").exists()


def test_without_weights_they_are_downloaded_or_the_remedy_is_named(monkeypatch, weights):
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **options):
        asked.append(pretrained)
        if pretrained:
            raise ConnectionError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    remedy = "fetch https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors .* as weights"
    with pytest.raises(FileNotFoundError, match=f"no route to host.*{remedy}"):
        TimmTeacher(MODEL)
    with pytest.raises(FileNotFoundError, match="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14"):
        TimmTeacher()
    teacher(weights)
    assert asked == [True, True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "vit_base_patch14_dinov9"}, "'vit_base_patch14_dinov9' is not in timm .*; there are .*vit"),
        ({"model": "test_resnet"}, "test_resnet"),
        ({"resize": "lanczos"}, "resize.*'lanczos'"),
        ({"resize": "area", "antialias": True}, "antialias.*'area'"),
        ({"precision": "float16"}, "precision.*'float16'"),
    ],
)
def test_wrong_arguments_are_named(options, words, weights):
    with pytest.raises(ValueError, match=words):
        TimmTeacher(**{"model": MODEL, "weights": weights} | options)


def test_the_fingerprint_tells_weights_and_preprocessing_apart(network, weights, tmp_path):
    save_file({k: v + 1e-3 * (k == "norm.bias") for k, v in network.state_dict().items()}, tmp_path / "b.safetensors")
    subjects = [
        teacher(weights),
        teacher(str(tmp_path / "b.safetensors")),
        teacher(weights, image_size=128),
        teacher(weights, antialias=True),
        teacher(weights, precision="bfloat16"),
    ]
    assert len({str(subject.fingerprint()) for subject in subjects}) == 5
    assert teacher(weights).fingerprint() == subjects[0].fingerprint()
