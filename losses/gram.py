"""Distance of Gram matrices of VGG16 features: texture without position (arXiv:1505.07376).

AToken (arXiv:2509.14476) trains a tokenizer with LPIPS and a Gram term, and without a discriminator.

The Gram matrix of features ``(C, H, W)`` is the product of every pair of channels summed over positions, divided by
``C H W`` (arXiv:1603.08155), so that it depends on neither the image size nor the width of the layer. The loss is the
mean over matrix entries and batch of the squared difference, summed over the five layers that LPIPS uses (relu1_2,
relu2_2, relu3_3, relu4_3, relu5_3), each with weight 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .pairs import at_least_float32
from .perceptual_term import PerceptualTerm
from .trunks import load_feature_trunk


class GramLoss(PerceptualTerm):
    """Mean squared difference of normalised Gram matrices.

    Args:
        weight: factor in the objective. The value is a square of means of products and is usually far below 1.
        start_step: optimizer step from which the term counts; before it, it is not computed.
        trunk_weights: torchvision file ``vgg16-397923af.pth``; torch's hub cache, then a download, if ``None``.
        precision: of the trunk, ``float32`` or ``bfloat16``; the matrices and their differences stay in float32.
            Gradients of small differences of large matrices lose more to bfloat16 features than those of LPIPS do.

    Raises:
        ValueError: for a file that is not its weights.
        FileNotFoundError: if the weights are neither given, nor cached, nor to be downloaded.
    """

    name = "gram"

    def __init__(
        self, weight: float = 1.0, start_step: int = 0, trunk_weights: str | None = None, precision: str = "float32"
    ) -> None:
        super().__init__(load_feature_trunk("vgg16", trunk_weights), weight, start_step, precision)

    def compare(self, stage: int, features: Tensor, targets: Tensor) -> Tensor:
        target = gram_matrix(targets)
        # Recomputed in the backward pass (a twentieth of the trunk's work): otherwise a float32 copy of bfloat16
        # features would be kept for it.
        return checkpoint(_gram_distance, features, target, use_reentrant=False, preserve_rng_state=False)


def gram_matrix(features: Tensor) -> Tensor:
    """``(B, C, C)`` mean products of channels of ``(B, C, H, W)``, divided by ``C`` as well as ``H W``."""
    flat = at_least_float32(features).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C), a view if channels-last
    return flat.transpose(1, 2) @ flat / (flat.shape[1] * flat.shape[2])


def _gram_distance(features: Tensor, target: Tensor) -> Tensor:
    return (gram_matrix(features) - target).square().mean()
