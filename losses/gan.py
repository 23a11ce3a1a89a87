"""The two sides of a GAN loss, of logits: hinge, vanilla, non-saturating.

Large logits mean "real". The discriminator's loss is the mean of its two halves, as in VQGAN (arXiv:2012.09841). The
generator's loss is ``-mean(fake)`` for hinge and vanilla, again as in VQGAN, and ``-mean log sigmoid(fake)`` for
non-saturating (arXiv:1406.2661).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

GANLoss = Literal["hinge", "vanilla", "non_saturating"]


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, loss: GANLoss = "hinge") -> Tensor:
    """What the discriminator minimises: a scalar of two tensors of logits of any shapes.

    Raises:
        ValueError: for an unknown loss.
    """
    if check_loss(loss) == "hinge":
        return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def generator_loss(logits_fake: Tensor, loss: GANLoss = "hinge") -> Tensor:
    """What the generator minimises: a scalar of the logits of its images, any shape.

    Raises:
        ValueError: for an unknown loss.
    """
    if check_loss(loss) == "non_saturating":
        return F.softplus(-logits_fake).mean()
    return -logits_fake.mean()


def check_loss(loss: str) -> str:
    """The name itself, if it is one of the losses here.

    Raises:
        ValueError: otherwise.
    """
    if loss not in get_args(GANLoss):
        raise ValueError(f"loss must be one of {list(get_args(GANLoss))}; got {loss!r}")
    return loss
