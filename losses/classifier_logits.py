"""Distance of ConvNeXt-Small's classification logits (the perceptual loss of TiTok, arXiv:2406.07550).

Both batches are resized to 224 pixels, and the 1000 ImageNet logits, not features, are compared by mean squared error.
TiTok's stage 2 uses it with weight 0.1 and no LPIPS; TA-TiTok (arXiv:2501.07730) uses both: its single term of weight
1.1 over the average with weights 1.0 and 0.1 is LPIPS with weight 1 plus this with weight 0.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.frozen import Frozen
from .pairs import at_least_float32
from .perceptual_term import PerceptualTerm
from .trunks import Trunk, load_network

_SIZE = 224  # what the classifier was trained on


class ClassifierLogitsLoss(PerceptualTerm):
    """Mean squared difference of the ImageNet logits of ConvNeXt-Small.

    Args:
        weight: factor in the objective.
        start_step: optimizer step from which the term counts; before it, it is not computed.
        trunk_weights: torchvision file ``convnext_small-0c510722.pth``; torch's hub cache, then a download, if
            ``None``.
        precision: of the features, ``float32`` or ``bfloat16``; resizing, normalisation, the classifying layer and the
            mean stay in float32.

    Raises:
        ValueError: for a file that is not its weights.
        FileNotFoundError: if the weights are neither given, nor cached, nor to be downloaded.
    """

    name = "convnext"

    def __init__(
        self, weight: float = 0.1, start_step: int = 0, trunk_weights: str | None = None, precision: str = "float32"
    ) -> None:
        network = load_network("convnext_small", trunk_weights)
        super().__init__(Trunk(nn.Sequential(network.features, network.avgpool)), weight, start_step, precision)
        self.classifier = Frozen(network.classifier)

    def prepare(self, images: Tensor) -> Tensor:
        resized = F.interpolate(
            at_least_float32(images), size=(_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True
        )
        return super().prepare(resized)  # (B, 3, 224, 224)

    def compare(self, stage: int, features: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self._logits(features), self._logits(targets))

    def _logits(self, features: Tensor) -> Tensor:
        # Not in the trunk's precision: bfloat16 rounds a logit of 10 to 1/16, which would drown small differences.
        own_type = self.classifier.network[-1].weight.dtype
        return at_least_float32(self.classifier(features.to(own_type)))  # (B, 768, 1, 1) -> (B, 1000)
