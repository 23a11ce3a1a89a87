"""How images reach the 299 x 299 pixels that Inception takes: four conventions that published numbers differ in.

Every one is linear and separable, so an image is brought to size by one matrix per axis. ``tf1`` is what the original
TensorFlow graph does, and torch-fidelity and ADM with it: bilinear, pixels at the corners of their cells, no antialias.
``torch`` is pytorch-fid's: bilinear, pixels at the centres, no antialias. ``antialias`` is the default of torchmetrics:
the same with a triangle that widens when images shrink. ``clean`` is clean-fid's (arXiv:2104.11222): PIL's bicubic
filter on float channels, without rounding.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ..protocol import Resize

SIZE = 299


class InceptionResize:
    """Brings images to 299 x 299 and to the range that the network was trained on.

    Args:
        mode: ``tf1``, ``torch``, ``antialias`` or ``clean``.
        dtype: float32 or float64.

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, mode: Resize = "tf1", dtype: torch.dtype = torch.float32) -> None:
        if mode not in get_args(Resize):
            raise ValueError(f"resize must be one of {', '.join(get_args(Resize))}; got {mode!r}")
        self.mode = mode
        self.dtype = dtype
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``(B, 3, H, W)`` to ``(B, 3, 299, 299)``, from -1 to nearly 1."""
        rows, columns = (self._matrix(size, images.device) for size in images.shape[-2:])
        levels = rows @ images.to(self.dtype) @ columns.T  # (B, 3, 299, 299)
        if self.mode == "torch":
            return 2 * (levels / 255) - 1
        if self.mode == "clean":
            levels = levels.clamp(0, 255)  # bicubic overshoots
        return (levels - 128) / 128

    def _matrix(self, size: int, device: torch.device) -> Tensor:
        if (size, device) not in self._matrices:
            if self.mode in ("tf1", "torch"):
                matrix = _bilinear(size, half_pixel=self.mode == "torch", dtype=self.dtype)
            else:
                matrix = _antialiased(size, cubic=self.mode == "clean")
            self._matrices[size, device] = matrix.to(device, self.dtype)
        return self._matrices[size, device]


def _bilinear(size: int, half_pixel: bool, dtype: torch.dtype) -> Tensor:
    """Weights ``(299, size)`` of the two pixels around every sampled place, which are rounded to ``dtype``."""
    # TensorFlow keeps the scale in float32, and so does torch-fidelity when it computes in float64.
    scale = torch.tensor(size / SIZE, dtype=dtype if half_pixel else torch.float32)
    places = torch.arange(SIZE, dtype=dtype)
    places = ((places + 0.5) * scale - 0.5).clamp(min=0) if half_pixel else places * scale
    low = places.long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    fraction = (places - low).unsqueeze(1)
    matrix = torch.zeros(SIZE, size, dtype=dtype)
    matrix.scatter_add_(1, low.unsqueeze(1), 1 - fraction)
    return matrix.scatter_add_(1, high.unsqueeze(1), fraction)


def _antialiased(size: int, cubic: bool) -> Tensor:
    """Weights ``(299, size)`` float64 of a filter that covers a source pixel, or a target pixel if that is larger."""
    scale = size / SIZE
    stretch = max(scale, 1.0)
    centres = (torch.arange(SIZE, dtype=torch.float64) + 0.5) * scale
    distance = ((torch.arange(size, dtype=torch.float64) + 0.5) - centres.unsqueeze(1)).abs() / stretch
    weights = _cubic(distance) if cubic else (1 - distance).clamp(min=0)  # (299, size)
    return weights / weights.sum(1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    """Keys's kernel with a = -1/2, PIL's choice."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
