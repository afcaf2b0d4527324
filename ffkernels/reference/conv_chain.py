"""Units of convolution, batch normalisation and activation, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..params import ConvUnit
from .grouped_conv_bn_act import grouped_conv_bn_act


def conv_chain(x: Tensor, units: Sequence[ConvUnit]) -> Tensor:
    for unit in units:
        x = grouped_conv_bn_act(x, unit.conv, unit.bn, unit.activation, unit.negative_slope)
    return x
