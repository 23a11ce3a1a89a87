"""A Gaussian with a diagonal covariance for every token: the bottleneck of a variational autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Gaussian:
    """Mean and log-variance of every latent.

    Attributes:
        mean: ``(B, N, D)``, the most likely value.
        logvar: ``(B, N, D)``.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> Gaussian:
        """Of ``(B, N, 2 * D)``, means first; in float32 at least, log-variances clamped to [-30, 20].

        Raises:
            ValueError: for an odd number of channels.
        """
        if parameters.shape[-1] % 2:
            raise ValueError(f"parameters need means and log-variances, (B, N, 2 * D); got {tuple(parameters.shape)}")
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        mean, logvar = parameters.chunk(2, -1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def std(self) -> Tensor:
        """``(B, N, D)``."""
        return (0.5 * self.logvar).exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw ``(B, N, D)``; its gradient reaches mean and log-variance."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal distribution, summed over the channels of a token: ``(B, N)``."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)
