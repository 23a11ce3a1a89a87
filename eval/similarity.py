"""Similarity of what an image shows: the cosine of its embedding before and after, by DINOv2 or CLIP.

DINOv2 (arXiv:2304.07193) embeds by its class token, CLIP (arXiv:2103.00020) by the image side of the space that it
shares with text; the cosine of ``openai/clip-vit-base-patch32`` is what One-D-Piece (arXiv:2501.10064) reports. Images
are resized so that the shorter side has the network's size (bicubic, with antialias), cut to the middle square, and
normalised: CLIP's own preprocessing, on float pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hub.repository import Repository
from ..layers.weights_file import read_weights_file
from ..losses.vision_transformers import vision_transformer
from .metric import Pairs, PerImageMetric
from .networks import judging, shared_network

_AT_ONCE = 64  # images that a network sees


class _EmbeddingSimilarity(PerImageMetric):
    """Base class: the cosine of the embeddings of original and reconstruction."""

    def __init__(self, name: str, network: nn.Module, key: tuple) -> None:
        super().__init__()
        self.names = (name,)
        self.network = network
        self._key = key

    def values(self, pairs: Pairs) -> dict[str, Tensor]:
        with judging(self.network, pairs.reconstructions):
            originals = pairs.originals.once(self._key, lambda: self._embed(pairs.originals.images))
            cosine = (originals * self._embed(pairs.reconstructions)).sum(1)
        return {self.names[0]: cosine.clamp(-1, 1)}

    def details(self) -> dict[str, Any]:
        """``standard_deviation`` over the images."""
        return {"standard_deviation": float(self.table()[1].double().std(correction=0))}

    def _embed(self, images: Tensor) -> Tensor:
        """Embeddings ``(B, D)`` of length one of uint8 ``(B, 3, H, W)``."""
        return torch.cat([F.normalize(self.network(part.float() / 255), dim=1) for part in images.split(_AT_ONCE)])


class DINOSimilarity(_EmbeddingSimilarity):
    """Cosine of the class tokens of a DINOv2 network, mean over the images; at most 1.

    Args:
        weights: file of the weights, with timm's or the authors' key names; through the Hugging Face Hub's client and
            its cache if ``None``.
        model: timm's name.
        image_size: side that the network sees; its position embeddings are resampled.
        download: ask the network for what is not in the cache.

    Raises:
        MetricUnavailable: if the weights are neither given nor to be had; says how to get them.
        ValueError: for a name that timm does not have, or a file that is not the weights of this model.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        model: str = "vit_small_patch14_dinov2.lvd142m",
        image_size: int = 224,
        *,
        download: bool = True,
    ) -> None:
        key = ("dino", model, str(weights), image_size)

        def load() -> nn.Module:
            network = vision_transformer(model, _weights_file(model, weights, download), (image_size, image_size))
            return _Embedder(network, nn.Identity())

        super().__init__("dino_similarity", shared_network(key, load), key)


class CLIPSimilarity(_EmbeddingSimilarity):
    """Cosine of the image embeddings of a CLIP network, mean over the images; at most 1.

    Args:
        weights: file of the weights with timm's key names, or CLIP's (``visual.*``); through the Hugging Face Hub's
            client and its cache if ``None``.
        model: timm's name; the default is OpenAI's ViT-B/32, with the activation that it was trained with.
        download: ask the network for what is not in the cache.

    Raises:
        MetricUnavailable: if the weights are neither given nor to be had; says how to get them.
        ValueError: for a name that timm does not have, or a file that is not the weights of this model.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        model: str = "vit_base_patch32_clip_quickgelu_224.openai",
        *,
        download: bool = True,
    ) -> None:
        key = ("clip", model, str(weights))

        def load() -> nn.Module:
            file = _weights_file(model, weights, download)
            return _Embedder(vision_transformer(model, file), _projection(file))

        super().__init__("clip_similarity", shared_network(key, load), key)


class _Embedder(nn.Module):
    """Images ``(B, 3, H, W)`` in [0, 1] to the projected class token ``(B, D)``."""

    def __init__(self, network: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.projection = projection
        self.size = network.patch_embed.img_size[0]
        for name in ("mean", "std"):
            value = torch.tensor(network.pretrained_cfg[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = (_middle_square(images, self.size) - self.mean) / self.std
        return self.projection(self.network.forward_features(images)[:, 0])


def _middle_square(images: Tensor, size: int) -> Tensor:
    """The middle of images ``(B, 3, H, W)`` in [0, 1] whose shorter side is resized to ``size``."""
    height, width = images.shape[2:]
    if min(height, width) != size:
        shape = [round(side * size / min(height, width)) for side in (height, width)]
        images = F.interpolate(images, shape, mode="bicubic", align_corners=False, antialias=True)
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size].clamp(0, 1)


def _weights_file(model: str, weights: str | Path | None, download: bool) -> str:
    """The path that is given, or that of timm's own file in the Hub's cache.

    Raises:
        FileNotFoundError: if it is not given and not to be had.
        ValueError: for a name that timm knows no file of.
    """
    import timm

    if weights is not None:
        return str(weights)
    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if config is None or not config.hf_hub_id:
        raise ValueError(
            f"timm {timm.__version__} publishes no weights for {model!r}; give the path of a file as weights"
        )
    try:
        folder = Repository(config.hf_hub_id, local_files_only=not download).fetch("model.safetensors")
    except FileNotFoundError as error:
        address = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
        raise FileNotFoundError(
            f"no weights of {model}: fetch {address} on a machine with internet access and give its path as weights"
        ) from error
    return str(folder / "model.safetensors")


def _projection(path: str) -> nn.Module:
    """The linear map into the space of CLIP, which timm keeps as the classifier of its network."""
    remedy = "give a file of the image side of CLIP with its projection"
    state = read_weights_file(path, remedy)
    if "visual.proj" in state:
        weight, bias = state["visual.proj"].T, None  # (D, C)
    elif "head.weight" in state:
        weight, bias = state["head.weight"], state.get("head.bias")
    else:
        raise ValueError(f"weights: {path} holds neither 'head.weight' nor 'visual.proj'; {remedy}")
    projection = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        projection.weight.copy_(weight)
        projection.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return projection
