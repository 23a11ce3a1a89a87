"""The Inception network behind rFID, rIS, KID and precision/recall (arXiv:1512.00567, arXiv:1706.08500).

The graph and the weights are those of torch-fidelity, which reproduce the TensorFlow model that the first FID used. The
numbers are the same up to rounding; the way there is shorter: batch normalization is folded into the convolutions,
tensors are channels_last, images are resized by two matrix products. float64 computes in float64 throughout.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..metric import MetricUnavailable, Originals, Pairs
from ..networks import exactly
from ..protocol import Resize
from .resize import InceptionResize

Dtype = Literal["float32", "float64", "tf32", "bfloat16"]

POOL_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
NUM_CLASSES = 1008
_IMAGES_AT_ONCE = {"cpu": 16}  # more is no faster there; the activations of each take 9 MB
_IMAGES_AT_ONCE_ELSEWHERE = 128


class InceptionFeatures(NamedTuple):
    """What one forward pass gives, in float32, or float64 if the network computes in it.

    Attributes:
        pool: ``(B, 2048)``, the average over all places before the classifier.
        spatial: ``(B, 2023)``, the features of sFID (arXiv:2103.03841) as ADM's evaluator takes them: the first seven
            channels of the output of ``mixed_6/conv`` at 17 x 17 places, the channels innermost.
    """

    pool: Tensor
    spatial: Tensor


class Inception:
    """Computes features of images.

    Args:
        path: file of the weights, ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases.
        resize: how images are brought to 299 x 299; see :mod:`~vistok.eval.inception.resize`.
        dtype: what the convolutions compute in: ``float32`` (without TF32, whatever the global setting), ``float64``,
            ``tf32`` or ``bfloat16``. The last two change the numbers.
        device: to compute on.

    Raises:
        MetricUnavailable: if there is no such file.
        ValueError: if the file does not hold these weights, or for another ``resize`` or ``dtype``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resize: Resize = "tf1",
        dtype: Dtype = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}; got {dtype!r}")
        self.device = torch.device(device)
        if dtype == "float64" and self.device.type == "mps":
            raise MetricUnavailable("this accelerator has no float64: evaluate with extractor_dtype float32")
        self.dtype = dtype
        self.resize = InceptionResize(resize, torch.float64 if dtype == "float64" else torch.float32)
        network_dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)
        network = load_network(path)
        # The classifier is a matrix product that costs nothing: it stays in full precision.
        self._classifier = network.fc.weight.detach().to(self.device, self.resize.dtype)  # (1008, 2048)
        self._classifier_bias = network.fc.bias.detach().to(self.device, self.resize.dtype)
        fold_batch_norm(network.double())
        self._stages = stages(network).to(network_dtype).to(self.device, memory_format=torch.channels_last)
        self._network_dtype = network_dtype

    def __call__(self, images: Tensor) -> InceptionFeatures:
        """Features of uint8 images ``(B, 3, H, W)`` on the device of the network.

        Raises:
            ValueError: for images of another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
        at_once = _IMAGES_AT_ONCE.get(self.device.type, _IMAGES_AT_ONCE_ELSEWHERE)
        with exactly(self.device, "tf32" if self.dtype == "tf32" else "ieee"):
            parts = [self._forward(part) for part in images.split(at_once)]
        return InceptionFeatures(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def originals(self, originals: Originals) -> InceptionFeatures:
        """Features of the originals of a batch, computed once."""
        return originals.once(("inception", id(self)), lambda: self(originals.images))

    def reconstructions(self, pairs: Pairs) -> InceptionFeatures:
        """Features of the reconstructions of a batch, computed once."""
        if pairs.reconstructions is pairs.originals.images:
            return self.originals(pairs.originals)
        return pairs.once(("inception", id(self)), lambda: self(pairs.reconstructions))

    def logits(self, pool: Tensor, *, bias: bool = False) -> Tensor:
        """The classifier's logits ``(B, 1008)`` of features ``(B, 2048)``; inception scores leave the bias out."""
        with exactly(self.device):
            logits = pool.to(self._classifier) @ self._classifier.T
            return logits + self._classifier_bias if bias else logits

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.resize(images).to(self._network_dtype, memory_format=torch.channels_last)  # (B, 3, 299, 299)
        x = self._stages[0](x)  # (B, 768, 17, 17), the branch mixed_6/conv first
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).to(self.resize.dtype)  # (B, 2023)
        return self._stages[1](x).mean((2, 3), dtype=self.resize.dtype), spatial


def load_network(path: str | Path) -> nn.Module:
    """torch-fidelity's network with the weights of a file, as tensors only: nothing that the file brings is executed.

    Raises:
        MetricUnavailable: if there is no such file.
        ValueError: if it does not hold the weights of this network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(path)
    if not path.is_file():
        raise MetricUnavailable(f"no Inception weights: there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Their constructor reads whatever it is given with pickle: it is given what has been read safely.
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        with torch.random.fork_rng(devices=[]):  # initial values, overwritten at once, are drawn from torch's generator
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} does not hold the weights of torch-fidelity's Inception: {reason}") from error


def fold_batch_norm(network: nn.Module) -> None:
    """Make every convolution of the network do the work of the batch normalization behind it, which is exact."""
    for block in network.modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()


def stages(network: nn.Module) -> nn.ModuleList:
    """The network up to the features of sFID, and from there to the last feature map."""
    trunk = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2"
    blocks = "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d"
    top = "Mixed_6e Mixed_7a Mixed_7b Mixed_7c"
    parts = [f"{trunk} {blocks}".split(), top.split()]
    return nn.ModuleList(nn.Sequential(*(getattr(network, name) for name in part)) for part in parts)
