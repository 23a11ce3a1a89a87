"""Fixed binomial low-pass filter in front of a stride, against aliasing (arXiv:1904.11486)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Blur(nn.Module):
    """Filters every channel with the outer product of ``(1, 3, 3, 1) / 8``.

    Args:
        stride: of the filter; 2 halves height and width.
        padding: zeros on each side; ``None`` for as many as make the output ``ceil(size / stride)``, the odd one at the
            right and the bottom (TensorFlow's "same").
    """

    def __init__(self, stride: int = 2, padding: int | None = None) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)  # (1, 1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H', W')``."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        if self.padding is not None:
            return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)
        bottom, right = (self._missing(size) for size in x.shape[2:])
        x = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        return F.conv2d(x, kernel, stride=self.stride, groups=channels)

    def _missing(self, size: int) -> int:
        outputs = -(-size // self.stride)
        return max((outputs - 1) * self.stride + self.kernel.shape[-1] - size, 0)
