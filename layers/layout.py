"""How convolutional networks lie in memory: channels-last on accelerators, contiguous on the CPU.

Tensor cores read channels-last. On the CPU the convolutions of both layouts take the same time, but group norm does
not: its kernel is several times slower channels-last, and adds the pixels of a channel up one by one in float32, which
at 256x256 pixels is off by 1e-3 of a standard deviation, enough to change codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def device_layout(device: torch.device) -> torch.memory_format:
    """The memory format of 4D tensors on a device."""
    return torch.contiguous_format if device.type in ("cpu", "meta") else torch.channels_last


def in_device_layout(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` in the layout of its device."""
    return x.contiguous(memory_format=device_layout(x.device))


class DeviceLayout(nn.Module):
    """A module whose 4D weights are brought into the layout of their device whenever the module moves."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeviceLayout:
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = in_device_layout(parameter.data)
        return self
