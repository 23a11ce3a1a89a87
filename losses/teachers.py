"""Teachers: frozen vision networks whose patch features a tokenizer is aligned with.

The default is the teacher of GigaTok (arXiv:2504.08736), DINOv2 ViT-B/14 without registers (arXiv:2304.07193): images
are normalised, resized bicubically to 224 without antialias, and give 16 x 16 patch features of width 768. Other vision
transformers of timm (CLIP, SigLIP, DINOv2 with registers, ...) differ in their name alone.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.frozen import Frozen
from .vision_transformers import vision_transformer


class Teacher(nn.Module):
    """Base class of teachers: images in, patch features out, without gradient.

    Attributes:
        dim: C, width of the features.
        grid: ``(h, w)`` of the patches, whatever the size of the images.
    """

    dim: int
    grid: tuple[int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, P, C)`` float32, raster order, of images ``(B, 3, H, W)`` in [0, 1]."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str | int | float | bool | list]:
        """What the features depend on, for caches: weights (a hash) and preprocessing."""


class TimmTeacher(Teacher):
    """A vision transformer of timm; its features are the patch tokens after the final norm.

    Args:
        model: timm's name, such as ``vit_base_patch14_dinov2.lvd142m``, ``vit_large_patch14_clip_224.openai`` or
            ``vit_so400m_patch14_siglip_gap_224.v2_webli``. Mean and std of its images come with the name.
        weights: file of the weights, safetensors or a pickle of tensors, with timm's or the authors' key names; timm's
            download (the Hugging Face Hub) if ``None``.
        image_size: side, or ``(H, W)``, that images are resized to; position embeddings are resampled to match.
        resize: interpolation of that resizing, which comes after the normalisation.
        antialias: filter before shrinking.
        precision: what the network computes in; the features are float32 either way.

    Raises:
        ValueError: for a name or options that timm does not have, or a file that is not the weights of this model.
        FileNotFoundError: if the weights are neither given nor to be downloaded.
    """

    def __init__(
        self,
        model: str = "vit_base_patch14_dinov2.lvd142m",
        weights: str | None = None,
        image_size: int | tuple[int, int] = 224,
        resize: Literal["bicubic", "bilinear", "nearest", "area"] = "bicubic",
        antialias: bool = False,
        precision: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        super().__init__()
        if resize not in ("bicubic", "bilinear", "nearest", "area"):
            raise ValueError(f"resize must be 'bicubic', 'bilinear', 'nearest' or 'area'; got {resize!r}")
        if antialias and resize not in ("bicubic", "bilinear"):
            raise ValueError(f"antialias goes with resize 'bicubic' or 'bilinear' only; got {resize!r}")
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be 'bfloat16' or 'float32'; got {precision!r}")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.model, self.resize, self.antialias, self.precision = model, resize, antialias, precision
        network = vision_transformer(model, weights, self.image_size)
        self.dim = network.num_features
        self.grid = tuple(network.patch_embed.grid_size)
        self.prefix = network.num_prefix_tokens
        self.frozen = Frozen(network)
        for name in ("mean", "std"):
            value = torch.tensor(network.pretrained_cfg[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1] as the network takes them: normalised, then resized."""
        images = (images.float() - self.mean) / self.std
        if tuple(images.shape[2:]) == self.image_size:
            return images
        options = {"align_corners": False, "antialias": self.antialias} if self.resize.startswith("bi") else {}
        return F.interpolate(images, self.image_size, mode=self.resize, **options)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.frozen.network.forward_features(self.preprocess(images))  # (B, prefix + P, C)
        return features[:, self.prefix :].float()  # (B, P, C)

    def fingerprint(self) -> dict[str, str | int | float | bool | list]:
        digest = hashlib.sha256()
        for name, value in self.frozen.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return {
            "teacher": self.model,
            "weights": digest.hexdigest()[:32],
            "image_size": list(self.image_size),
            "resize": self.resize,
            "antialias": self.antialias,
            "precision": self.precision,
        }
