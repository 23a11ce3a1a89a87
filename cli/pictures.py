"""Pictures for people: an image beside its reconstruction with a caption, and many such pairs on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.images import to_uint8

SHEET_PAIRS = 32
_GAP = 4
_SHEET_SIDE = 2 * 256 + _GAP  # longer side of a pair on the sheet, at most


def pair(image: Tensor, reconstruction: Tensor, caption: str) -> Tensor:
    """Two images ``(3, H, W)`` in [0, 1] side by side, a caption below.

    Returns:
        uint8 ``(3, H', W')`` with ``W'`` at least ``2 * W``.
    """
    left, right = (to_uint8(part).permute(1, 2, 0).numpy() for part in (image, reconstruction))
    height, width = left.shape[:2]
    font = ImageFont.load_default(size=max(10, min(20, height // 16)))
    x0, y0, x1, y1 = font.getbbox(caption)
    pictures = Image.new("RGB", (max(2 * width + _GAP, int(x1) + 2 * _GAP), height + int(y1) + 2 * _GAP), "white")
    pictures.paste(Image.fromarray(left), (0, 0))
    pictures.paste(Image.fromarray(right), (width + _GAP, 0))
    ImageDraw.Draw(pictures).text((_GAP, height + _GAP), caption, fill="black", font=font)
    return torch.from_numpy(np.array(pictures)).permute(2, 0, 1)


def contact_sheet(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures uint8 ``(3, H, W)`` on one roughly square sheet, large ones reduced."""
    cells = []
    for picture in pictures:
        cell = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        cell.thumbnail((_SHEET_SIDE, _SHEET_SIDE), Image.Resampling.LANCZOS)
        cells.append(cell)
    width, height = max(cell.width for cell in cells) + _GAP, max(cell.height for cell in cells) + _GAP
    columns = max(1, min(len(cells), round(math.sqrt(len(cells) * height / width))))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (_GAP + i % columns * width, _GAP + i // columns * height))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
