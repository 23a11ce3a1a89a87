"""Pictures for people: an image beside its reconstructions with captions, and many such rows on one sheet."""

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
_SHEET_SIDE = 256  # longer side of an image on the sheet, at most


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


def row(columns: Sequence[tuple[Tensor, str]]) -> Tensor:
    """Images ``(3, H, W)`` in [0, 1] of one size side by side, each with a caption of its own below.

    Columns are as wide as the widest image or caption; a caption may have several lines.

    Returns:
        uint8 ``(3, H', W')``.
    """
    parts = [(to_uint8(image).permute(1, 2, 0).numpy(), caption) for image, caption in columns]
    height, width = parts[0][0].shape[:2]
    font = ImageFont.load_default(size=max(10, min(20, height // 16)))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), caption, font=font) for _, caption in parts]
    width = max(width, *(math.ceil(box[2]) for box in boxes))
    bottom = height + max(math.ceil(box[3]) for box in boxes) + 2 * _GAP
    picture = Image.new("RGB", (len(parts) * (width + _GAP) - _GAP, bottom), "white")
    draw = ImageDraw.Draw(picture)
    for i, (image, caption) in enumerate(parts):
        picture.paste(Image.fromarray(image), (i * (width + _GAP), 0))
        draw.multiline_text((i * (width + _GAP), height + _GAP), caption, fill="black", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def contact_sheet(pictures: Sequence[Tensor], columns: int = 2) -> Tensor:
    """Pictures uint8 ``(3, H, W)`` of ``columns`` images each on one roughly square sheet, large ones reduced."""
    cells, side = [], columns * (_SHEET_SIDE + _GAP) - _GAP
    for picture in pictures:
        cell = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        cell.thumbnail((side, side), Image.Resampling.LANCZOS)
        cells.append(cell)
    width, height = max(cell.width for cell in cells) + _GAP, max(cell.height for cell in cells) + _GAP
    across = max(1, min(len(cells), round(math.sqrt(len(cells) * height / width))))
    rows = math.ceil(len(cells) / across)
    sheet = Image.new("RGB", (across * width + _GAP, rows * height + _GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (_GAP + i % across * width, _GAP + i // across * height))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
