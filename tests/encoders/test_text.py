"""CLIP's text tower: the features of open_clip's own model before pooling; a clear error without the package."""

from __future__ import annotations

import builtins

import pytest
import torch

from vistok.encoders.text import OpenCLIPText

TEXTS = ["A photo of a cat.", "", "very " * 200 + "long"]
SIZE = {"width": 32, "layers": 2, "heads": 4}


@pytest.fixture(scope="module")
def clip():
    """open_clip's complete CLIP, with a text half of the right kind and a tiny size."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (pip install open_clip_torch)")
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, **SIZE}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    model = open_clip.CLIP(24, vision, text, quick_gelu=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def weights(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(clip.state_dict(), path)
    return str(path)


def test_pooled_and_projected_they_are_the_features_of_the_complete_model(clip, weights):
    import open_clip

    tower = OpenCLIPText(weights, **SIZE)
    features, ids = tower(TEXTS), open_clip.tokenize(TEXTS)
    assert features.shape == (3, 77, 32) and features.dtype == torch.float32
    assert (tower.num_tokens, tower.dim) == (77, 32)
    with torch.no_grad():
        pooled = features[torch.arange(3), ids.argmax(-1)] @ clip.text_projection
        torch.testing.assert_close(pooled, clip.encode_text(ids), rtol=1e-4, atol=1e-4)


def test_tokens_are_start_caption_end_and_zeros(weights):
    ids = OpenCLIPText(weights, **SIZE).tokenize(TEXTS)
    assert ids.shape == (3, 77) and ids.dtype == torch.int64
    assert ids[1].tolist() == [49406, 49407] + [0] * 75
    assert ids[2, -1] == 49407, "a caption that is too long must still end"


def test_a_feature_depends_on_the_words_before_it_only(weights):
    tower = OpenCLIPText(weights, **SIZE)
    one, two = tower(["a red car"]), tower(["a red dog"])
    assert torch.equal(one[:, :3], two[:, :3]) and not torch.allclose(one[:, 3], two[:, 3])


def test_is_frozen_and_in_no_state_dict(weights):
    tower = OpenCLIPText(weights, **SIZE).train()
    assert not tower.state_dict() and not list(tower.parameters()) and not tower.frozen.network.training
    assert not tower(TEXTS).requires_grad
    assert OpenCLIPText(weights, **SIZE, precision="bfloat16")(TEXTS).dtype == torch.float32


def test_key_names_of_a_clip_with_a_text_module_are_accepted(clip, weights, tmp_path):
    torch.save({f"text.{name}": value for name, value in clip.state_dict().items()}, tmp_path / "custom.pt")
    assert torch.equal(OpenCLIPText(str(tmp_path / "custom.pt"), **SIZE)(TEXTS), OpenCLIPText(weights, **SIZE)(TEXTS))


def test_weights_that_do_not_fit_or_are_not_there_are_named(clip, weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="clip.pt is not this CLIP's: 'positional_embedding'.*huggingface.co/timm"):
        OpenCLIPText(weights, width=64, layers=2, heads=4)
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken.safetensors is not a readable weights file"):
        OpenCLIPText(str(tmp_path / "broken.safetensors"), **SIZE)
    with pytest.raises(FileNotFoundError, match="no file '.*nowhere.pt'.*give its path as weights"):
        OpenCLIPText(str(tmp_path / "nowhere.pt"), **SIZE)

    def offline(*arguments):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="no route to host.*open_clip_model.safetensors.*as weights"):
        OpenCLIPText(**SIZE)


def test_without_open_clip_the_package_to_install_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "open_clip":
            raise ImportError("No module named 'open_clip'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install .*open_clip_torch"):
        OpenCLIPText()
    with pytest.raises(ValueError, match="precision.*'float16'"):
        OpenCLIPText(precision="float16")
