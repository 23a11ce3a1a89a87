"""LeCam regularisation of a discriminator (arXiv:2104.03310), in the form that TiTok trains with (arXiv:2406.07550).

It holds the mean logit of each side near the moving average of the *other* side, which keeps the discriminator from
running away from a generator that it tells apart too easily.

The averages are those of one rank: a rank's patches (tens of thousands of logits) over a thousand steps estimate the
mean well, and a collective in every step would cost more than it brings. They are buffers: checkpoints hold them, and
DistributedDataParallel, which broadcasts the buffers of rank 0 before every step, makes rank 0's the common ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeCam(nn.Module):
    """``relu(mean(real) - ema_fake)^2 + relu(ema_real - mean(fake))^2``.

    The value uses the averages as they were before the step. They start at 0 and are not bias-corrected.

    Args:
        decay: of the moving averages.

    Attributes:
        ema_real: scalar, moving average of the mean logit of real images.
        ema_fake: scalar, of reconstructions.

    Raises:
        ValueError: unless ``0 <= decay < 1``.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1); got {decay}")
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))
        self._updated_at = -1

    def forward(self, logits_real: Tensor, logits_fake: Tensor, step: int) -> Tensor:
        """Scalar penalty of logits of any shapes.

        In training it also updates the averages, once per optimizer step: the further batches of an accumulated step
        only read them. A batch whose mean is not finite leaves them as they are.
        """
        mean_real, mean_fake = logits_real.float().mean(), logits_fake.float().mean()
        penalty = F.relu(mean_real - self.ema_fake).square() + F.relu(self.ema_real - mean_fake).square()
        if self.training and torch.is_grad_enabled() and step != self._updated_at:
            self._update(self.ema_real, mean_real)
            self._update(self.ema_fake, mean_fake)
            self._updated_at = step
        return penalty

    @torch.no_grad()
    def _update(self, average: Tensor, mean: Tensor) -> None:
        average.copy_(torch.where(mean.isfinite(), self.decay * average + (1 - self.decay) * mean, average))
