"""Detection heads of all levels, their outputs in one row per anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..params import HeadParams
from .grouped_conv_bn_act import grouped_conv_bn_act
from .layers import conv2d


def multi_head(
    features: Sequence[Tensor], heads: Sequence[HeadParams], softmax: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    levels = [level(x, head) for x, head in zip(features, heads)]
    bbox, cls, landmarks = (torch.cat(outputs, dim=1) for outputs in zip(*levels))
    return bbox, torch.softmax(cls, dim=-1) if softmax else cls, landmarks


def level(x: Tensor, head: HeadParams) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, H, W) -> bbox (B, H W A, 4), cls (B, H W A, 2), landmarks (B, H W A, 10), A anchors per pixel."""
    if head.trunk is not None:
        x = grouped_conv_bn_act(x, head.trunk, head.trunk_bn, activation="relu")
    predictors = ((head.bbox, 4), (head.cls, 2), (head.landmarks, 10))
    return tuple(conv2d(x, conv).permute(0, 2, 3, 1).unflatten(3, (-1, k)).flatten(1, 3) for conv, k in predictors)
