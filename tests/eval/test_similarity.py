"""DINO and CLIP similarity: timm's own forward pass, CLIP's preprocessing, and where weights come from."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from vistok.eval import similarity
from vistok.eval.metric import MetricUnavailable, Pairs
from vistok.eval.similarity import CLIPSimilarity, DINOSimilarity

_spec = importlib.util.spec_from_file_location("vistok_test_pairs", Path(__file__).with_name("pairs.py"))
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

DINO = "vit_small_patch14_dinov2.lvd142m"
CLIP = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"  # a small one with the keys and the head of the large ones


def write_weights(model, path, **options):
    """The weights file of a random network: one pool of numbers, seen by every weight, keeps it small."""
    with torch.device("meta"):
        state = timm.create_model(model, **options).state_dict()
    noise = torch.randn(max(value.numel() for value in state.values()), generator=torch.Generator().manual_seed(0))
    scales = {key for key, value in state.items() if "norm" in key and key.endswith("weight")}
    pools = {False: 0.1 * noise, True: 1 + 0.1 * noise}
    torch.save({k: pools[k in scales][: v.numel()].view(v.shape) for k, v in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    dino = write_weights(DINO, folder / "dino.pth", img_size=28)
    return {"dino": dino, "clip": write_weights(CLIP, folder / "clip.pth")}


@pytest.fixture(params=["dino", "clip"])
def make(request, files):
    if request.param == "dino":
        return lambda: DINOSimilarity(files["dino"], image_size=28)
    return lambda: CLIPSimilarity(files["clip"], CLIP)


def values(metric, images, reconstructions):
    pairs = made.pair(images, reconstructions)
    metric.update(pairs)
    return pairs.values[metric.names[0]]


def timm_cosine(network, images, worse):
    """Cosine of what timm's network puts out for images of the size it takes."""
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        x, y = (network.eval()((batch / 255 - mean) / std) for batch in (images, worse))
    return F.cosine_similarity(x, y)


def test_dino_similarity_is_the_cosine_of_the_class_tokens(files):
    network = timm.create_model(DINO, img_size=28, num_classes=0, global_pool="token")
    network.load_state_dict(torch.load(files["dino"], weights_only=True))
    images = made.photographs(3, 28, 28)
    worse = made.degraded(images)
    ours = values(DINOSimilarity(files["dino"], image_size=28), images, worse)
    torch.testing.assert_close(ours, timm_cosine(network, images, worse), atol=1e-5, rtol=0)
    assert ours.unique().numel() == 3


def test_clip_similarity_is_the_cosine_of_the_projected_embeddings(files):
    network = timm.create_model(CLIP)
    network.load_state_dict(torch.load(files["clip"], weights_only=True))
    images = made.photographs(2, 224, 224)
    worse = made.degraded(images)
    ours = values(CLIPSimilarity(files["clip"], CLIP), images, worse)
    torch.testing.assert_close(ours, timm_cosine(network, images, worse), atol=1e-5, rtol=0)
    assert ours.unique().numel() == 2


def test_the_projection_of_clips_own_file_is_read(tmp_path):
    weight = torch.randn(6, 4)
    torch.save({"visual.proj": weight}, tmp_path / "clip.pth")
    x = torch.randn(3, 6)
    torch.testing.assert_close(similarity._projection(str(tmp_path / "clip.pth"))(x), x @ weight)
    torch.save({"visual.conv1.weight": weight}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="neither 'head.weight' nor 'visual.proj'"):
        similarity._projection(str(tmp_path / "none.pth"))


def test_the_default_clip_is_openais_with_its_activation_and_projection():
    with torch.device("meta"):
        network = timm.create_model("vit_base_patch32_clip_quickgelu_224.openai")
    assert CLIPSimilarity.__init__.__defaults__[-1] == "vit_base_patch32_clip_quickgelu_224.openai"
    assert (network.head.in_features, network.head.out_features) == (768, 512)
    assert type(network.blocks[0].mlp.act).__name__ == "QuickGELU" and network.norm.eps == 1e-5


@pytest.mark.parametrize("height, width", [(300, 200), (64, 96), (256, 256)])
def test_images_are_resized_as_pil_does_and_cut_to_the_middle(height, width):
    images = made.photographs(1, height, width)
    ours = similarity._middle_square(images / 255, 112)
    shape = (round(width * 112 / min(height, width)), round(height * 112 / min(height, width)))
    resized = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize(shape, Image.Resampling.BICUBIC)
    left, top = (shape[0] - 112) // 2, (shape[1] - 112) // 2
    expected = torch.frombuffer(
        bytearray(resized.crop((left, top, left + 112, top + 112)).tobytes()), dtype=torch.uint8
    )
    difference = 255 * ours[0] - expected.view(112, 112, 3).permute(2, 0, 1)
    assert ours.shape == (1, 3, 112, 112) and difference.abs().mean() < 0.5 and difference.abs().max() < 3


def test_images_of_the_networks_size_are_left_alone():
    images = made.photographs(1, 64, 64) / 255
    assert torch.equal(similarity._middle_square(images, 64), images)


def test_equal_images_are_as_similar_as_can_be(make):
    images = made.photographs(2, 40, 40)
    similar = values(make(), images, images.clone())
    assert similar.min() > 1 - 1e-5 and similar.max() <= 1


def test_originals_are_looked_at_once_for_all_variants(make):
    images = made.photographs(2, 40, 40)
    metric, other = make(), make()
    assert metric.network is other.network
    seen = []
    handle = metric.network.register_forward_hook(lambda *args: seen.append(1))
    originals = made.pair(images, images).originals
    metric.update(Pairs(originals, made.degraded(images)))
    other.update(Pairs(originals, made.degraded(images, 16)))
    handle.remove()
    assert len(seen) == 3


def test_batches_are_looked_at_in_parts(make, monkeypatch):
    images = made.photographs(3, 40, 40)
    worse = made.degraded(images)
    expected = values(make(), images, worse)
    monkeypatch.setattr(similarity, "_AT_ONCE", 2)
    torch.testing.assert_close(values(make(), images, worse), expected, atol=1e-5, rtol=0)


def test_shards_merge_to_the_values_of_one_pass(make):
    images = made.photographs(5, 40, 40)
    whole, merged = made.one_pass_and_merged(make, images, made.degraded(images))
    assert whole == pytest.approx(merged, abs=1e-5)


def test_details_tell_the_spread(make):
    images = made.photographs(3, 40, 40)
    metric = make()
    similar = values(metric, images, made.degraded(images))
    assert metric.details()["standard_deviation"] == pytest.approx(similar.std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("metric, model", [(DINOSimilarity, DINO), (CLIPSimilarity, CLIP)])
def test_missing_weights_are_reported_on_one_line_with_their_address(metric, model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    address = f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors"
    for weights in (None, tmp_path / "nothing.safetensors"):
        with pytest.raises(MetricUnavailable, match=address) as caught:
            metric(weights, model, download=False)
        assert "\n" not in str(caught.value)


def test_weights_in_the_hubs_cache_are_found(files, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    folder = tmp_path / f"models--timm--{DINO}" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    save_file({k: v.clone() for k, v in torch.load(files["dino"]).items()}, folder / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    images = made.photographs(2, 28, 28)
    worse = made.degraded(images)
    ours = values(DINOSimilarity(image_size=28, download=False), images, worse)
    assert torch.equal(ours, values(DINOSimilarity(files["dino"], image_size=28), images, worse))


def test_what_is_not_the_model_is_refused(files):
    with pytest.raises(ValueError, match="nothing_like_it"):
        DINOSimilarity(files["dino"], "nothing_like_it")
    with pytest.raises(ValueError, match="no weights for 'nothing_like_it'"):
        DINOSimilarity(model="nothing_like_it")
    with pytest.raises(ValueError, match="does not fit"):
        CLIPSimilarity(files["dino"], CLIP)


def test_the_hub_is_asked_only_if_downloads_are_allowed(monkeypatch):
    asked = []

    class Empty:
        def __init__(self, repo_id, local_files_only):
            asked.append((repo_id, local_files_only))

        def fetch(self, filename):
            raise FileNotFoundError

    monkeypatch.setattr(similarity, "Repository", Empty)
    for download in (True, False):
        with pytest.raises(MetricUnavailable):
            CLIPSimilarity(download=download)
    assert asked == [("timm/vit_base_patch32_clip_224.openai", False), ("timm/vit_base_patch32_clip_224.openai", True)]


def test_other_weights_make_another_network(files, tmp_path):
    for name, make in (
        ("dino", lambda file: DINOSimilarity(file, image_size=28)),
        ("clip", lambda file: CLIPSimilarity(file, CLIP)),
    ):
        other = shutil.copy(files[name], tmp_path / f"{name}.pth")
        first, second = make(files[name]), make(other)
        assert first.network is not second.network and first._key != second._key
