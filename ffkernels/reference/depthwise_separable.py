"""MobileNet's block: 3x3 depthwise convolution, BN, activation, then 1x1 convolution, BN, activation."""

from __future__ import annotations

from torch import Tensor

from ..batch_norm import BatchNorm
from ..params import ConvParams
from .grouped_conv_bn_act import grouped_conv_bn_act


def depthwise_separable(
    x: Tensor,
    depthwise: ConvParams,
    depthwise_bn: BatchNorm | None,
    pointwise: ConvParams,
    pointwise_bn: BatchNorm | None,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
) -> Tensor:
    hidden = grouped_conv_bn_act(x, depthwise, depthwise_bn, activation, negative_slope)
    return grouped_conv_bn_act(hidden, pointwise, pointwise_bn, activation, negative_slope)
