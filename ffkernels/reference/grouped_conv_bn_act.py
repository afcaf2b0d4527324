"""Convolution, batch normalisation, activation: y = act(bn(conv(x)))."""

from __future__ import annotations

from torch import Tensor

from ..batch_norm import BatchNorm
from ..params import ConvParams
from .layers import activate, batch_norm, conv2d


def grouped_conv_bn_act(
    x: Tensor, conv: ConvParams, bn: BatchNorm | None, activation: str = "none", negative_slope: float = 0.1
) -> Tensor:
    return activate(batch_norm(conv2d(x, conv), bn), activation, negative_slope)
