"""Pixel losses: mean absolute error, mean squared error, and logit-Laplace, mixed freely.

Logit-Laplace (DALL-E, arXiv:2102.12092) is the negative log-likelihood of pixels that lie in a bounded
range: where the Laplace density behind L1 spends mass on impossible pixels, this one is the density of a variable in
(0, 1) whose logit is Laplace distributed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .pairs import check_pair

_EDGE = 0.1  # pixels are mapped to [0.1, 0.9], away from the infinite logits of 0 and 1
_EDGE_SLOPE = (1 - 2 * _EDGE) / (_EDGE * (1 - _EDGE))  # d logit / d pixel at both ends of the pixel range


class PixelLoss(nn.Module):
    """``l1 * mean |x - y| + l2 * mean (x - y)^2 + logit_laplace * NLL(x | y)``, in float32.

    Args:
        l1: weight of the mean absolute error.
        l2: weight of the mean squared error.
        logit_laplace: weight of :func:`logit_laplace_nll`.
        laplace_scale: its scale ``b``.

    Raises:
        ValueError: for a negative weight, no weight above 0, or a scale that is not positive.
    """

    def __init__(
        self, l1: float = 0.0, l2: float = 1.0, logit_laplace: float = 0.0, laplace_scale: float = 1.0
    ) -> None:
        super().__init__()
        weights = {"l1": l1, "l2": l2, "logit_laplace": logit_laplace}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"l1, l2 and logit_laplace must not be negative, nor all 0; got {weights}")
        if laplace_scale <= 0:
            raise ValueError(f"laplace_scale must be positive; got {laplace_scale}")
        self.l1 = l1
        self.l2 = l2
        self.logit_laplace = logit_laplace
        self.laplace_scale = laplace_scale

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Scalar loss of ``(B, 3, H, W)`` against ``(B, 3, H, W)``, both nominally in [0, 1]."""
        check_pair(reconstructions, images)
        reconstructions, images = reconstructions.float(), images.float()
        difference = reconstructions - images
        loss = difference.new_zeros(())
        if self.l1:
            loss = loss + self.l1 * difference.abs().mean()
        if self.l2:
            loss = loss + self.l2 * difference.square().mean()
        if self.logit_laplace:
            loss = loss + self.logit_laplace * logit_laplace_nll(reconstructions, images, self.laplace_scale)
        return loss


def logit_laplace_nll(reconstructions: Tensor, images: Tensor, scale: float = 1.0) -> Tensor:
    """Mean negative log-likelihood of pixel channels under a logit-Laplace density (arXiv:2102.12092).

    With ``s(p) = 0.8 p + 0.1``, ``x = s(image)`` and ``m = logit(s(reconstruction))``::

        -log p(x) = |logit(x) - m| / b + log(2 b x (1 - x))

    It is a density, so the value may be negative. Decoders do not clamp: beyond [0, 1] the logit of a reconstruction
    goes on along its tangent, so the gradient there is that of the nearest legal pixel. It neither vanishes, as it
    would behind a clamp, nor explodes at the pole that the logit has at a pixel of -0.125 or 1.125.

    Args:
        reconstructions: any shape; each pixel is the centre of a density.
        images: the same shape, in [0, 1]; values beyond count as the nearest legal pixel.
        scale: ``b``.

    Returns:
        Scalar in the type of the inputs.
    """
    images = images.clamp(0, 1)
    squashed = (1 - 2 * _EDGE) * images + _EDGE
    constant = math.log(2 * scale) + (squashed * (1 - squashed)).log()
    return ((_pixel_logit(images) - _pixel_logit(reconstructions)).abs() / scale + constant).mean()


def _pixel_logit(pixels: Tensor) -> Tensor:
    legal = pixels.clamp(0, 1)
    return torch.logit((1 - 2 * _EDGE) * legal + _EDGE) + _EDGE_SLOPE * (pixels - legal)
