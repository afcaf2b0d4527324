"""Anchors: the boxes that predictions are relative to."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = (8, 16, 32)
SIZES = ((16, 32), (64, 128), (256, 512))
VARIANCES = (0.1, 0.2)


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of the feature maps P3, P4, P5 of an image."""
    return [(-(-height // step), -(-width // step)) for step in STEPS]


def anchors(height: int, width: int) -> Tensor:
    """Anchors of an image of ``height`` x ``width`` pixels, as in RetinaFace (Deng et al. 2020).

    Cell (i, j) of a level with step s has two square anchors around ((j + 0.5) s, (i + 0.5) s), of 16 and 32 pixels on
    P3, 64 and 128 on P4, 256 and 512 on P5.

    Returns:
        (N, 4) float32: centre x, centre y, width, height, each divided by the image's width or height. The order is
        that of the models' outputs: level, row, column, size.

    Raises:
        ValueError: the image has no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"anchors: an image of {height} x {width} pixels has none")
    levels = []
    for step, sizes, (rows, columns) in zip(STEPS, SIZES, level_sizes(height, width)):
        boxes = torch.empty(rows, columns, len(sizes), 4, dtype=torch.float64)
        boxes[..., 0] = ((torch.arange(columns, dtype=torch.float64) + 0.5) * step / width)[None, :, None]
        boxes[..., 1] = ((torch.arange(rows, dtype=torch.float64) + 0.5) * step / height)[:, None, None]
        side = torch.tensor(sizes, dtype=torch.float64)
        boxes[..., 2], boxes[..., 3] = side / width, side / height
        levels.append(boxes.reshape(-1, 4))
    return torch.cat(levels).float()
