"""StyleGAN-T's discriminator (arXiv:2301.09515): small trained heads on a frozen DINO vision transformer.

GigaTok (arXiv:2504.08736) replaces its PatchGAN by it (rFID 0.81 to 0.51). Tokens are read out after the patch
embedding and after four blocks spread over the depth; the class token is added to every patch token. One head per
readout, a 1D convolution network over the raster sequence, gives a logit per patch. The heads have spectral norm
(arXiv:1802.05957) and batch norm over small virtual batches, whose statistics are taken in evaluation too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..layers.frozen import Frozen
from .discriminator import Discriminator
from .vision_transformers import vision_transformer


class DINODiscriminator(Discriminator):
    """Heads on the tokens of a frozen vision transformer.

    Images larger than the transformer takes are, in training, cropped at random or averaged down, each with its
    probability, one choice per call; in evaluation always averaged down. Smaller ones are enlarged bilinearly.

    Args:
        backbone: timm name of the vision transformer.
        weights: file of its weights, safetensors or a pickle of tensors; timm's download if ``None``.
        readouts: blocks whose outputs get a head, besides the patch embedding.
        kernel_size: of the residual convolution in a head, odd.
        virtual_batch: images that share the statistics of a batch norm.
        crop_probability: of a crop instead of averaging.

    Raises:
        ValueError: for a backbone that is no vision transformer of timm, readouts it does not have, other options out
            of range, or a file that is not its weights.
        FileNotFoundError: if the weights are neither given nor to be downloaded.
    """

    batch_statistics = True

    def __init__(
        self,
        backbone: str = "vit_small_patch16_224.dino",
        weights: str | None = None,
        readouts: tuple[int, ...] = (2, 5, 8, 11),
        kernel_size: int = 9,
        virtual_batch: int = 8,
        crop_probability: float = 0.5,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or virtual_batch < 1 or not 0 <= crop_probability <= 1:
            raise ValueError(
                f"needs an odd kernel_size, virtual_batch >= 1 and crop_probability in [0, 1]; "
                f"got {kernel_size}, {virtual_batch} and {crop_probability}"
            )
        trunk = vision_transformer(backbone, weights)
        if getattr(trunk, "cls_token", None) is None:
            raise ValueError(f"backbone must be a vision transformer with a class token; {backbone!r} is not")
        depth = len(trunk.blocks)
        if not readouts or sorted(set(readouts)) != list(readouts) or not 0 <= readouts[0] <= readouts[-1] < depth:
            raise ValueError(f"readouts must rise within 0 and {depth - 1} ({backbone}); got {tuple(readouts)}")
        self.trunk = Frozen(trunk)
        self.readouts = tuple(readouts)
        self.crop_probability = crop_probability
        self.input_size: tuple[int, int] = trunk.patch_embed.img_size
        self.heads = nn.ModuleList(
            _head(trunk.embed_dim, kernel_size, virtual_batch) for _ in range(len(self.readouts) + 1)
        )
        for name in ("mean", "std"):
            value = torch.tensor(trunk.pretrained_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def score(self, images: Tensor) -> Tensor:
        """Logits ``(B, R * P)``: P patches at each of the R readouts."""
        features = self.features((self.fit(images) - self.mean) / self.std)
        logits = [head(tokens.transpose(1, 2)) for head, tokens in zip(self.heads, features, strict=True)]  # (B, 1, P)
        return torch.cat(logits, 2).flatten(1)

    def fit(self, images: Tensor) -> Tensor:
        """Images at the size that the transformer takes."""
        (height, width), size = images.shape[2:], self.input_size
        if (height, width) == size:
            return images
        if height < size[0] or width < size[1]:
            return F.interpolate(images, size, mode="bilinear", align_corners=False)
        # Drawn on the host, from the generator that a run reseeds at every batch: nothing waits for the device.
        crop, down, right = torch.rand(3).tolist()
        if not self.training or crop >= self.crop_probability:
            return F.interpolate(images, size, mode="area")
        top, left = int(down * (height - size[0] + 1)), int(right * (width - size[1] + 1))
        return images[:, :, top : top + size[0], left : left + size[1]]

    def features(self, images: Tensor) -> list[Tensor]:
        """Readouts ``(B, P, C)`` of normalised images ``(B, 3, H, W)`` of the transformer's size."""
        trunk = self.trunk.network
        x = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))  # (B, 1 + P, C), the class token first
        features = [_add_class_token(x, trunk.num_prefix_tokens)]
        for i, block in enumerate(trunk.blocks[: self.readouts[-1] + 1]):
            x = block(x)
            if i in self.readouts:
                features.append(_add_class_token(x, trunk.num_prefix_tokens))
        return features


class VirtualBatchNorm(nn.Module):
    """Batch norm of ``(B, C, L)`` over groups of images, with the statistics of the moment in evaluation too.

    Args:
        channels: C.
        group: images per group; where it does not divide B, the next smaller divisor of B.
        eps: added to the variance.
    """

    def __init__(self, channels: int, group: int = 8, eps: float = 1e-5) -> None:
        super().__init__()
        self.group = group
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        group = max(size for size in range(1, min(self.group, batch) + 1) if batch % size == 0)
        members = x.float().unflatten(0, (batch // group, group))  # (B / g, g, C, L)
        variance, mean = torch.var_mean(members, (1, 3), correction=0, keepdim=True)
        normalized = ((members - mean) * (variance + self.eps).rsqrt()).flatten(0, 1)
        return (normalized * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class _Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)) / math.sqrt(2)


def _head(channels: int, kernel_size: int, virtual_batch: int) -> nn.Sequential:
    """``(B, C, P)`` to ``(B, 1, P)``."""
    return nn.Sequential(
        _block(channels, 1, virtual_batch),
        _Residual(_block(channels, kernel_size, virtual_batch)),
        spectral_norm(nn.Conv1d(channels, 1, 1)),
    )


def _block(channels: int, kernel_size: int, virtual_batch: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv), VirtualBatchNorm(channels, virtual_batch), nn.LeakyReLU(0.2))


def _add_class_token(tokens: Tensor, num_prefix: int) -> Tensor:
    return tokens[:, num_prefix:] + tokens[:, :1]  # (B, P, C)
