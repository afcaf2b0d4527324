"""The SSH context block: three branches that see 3x3, 5x5 and 7x7 pixels, concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_norm import BatchNorm
from ..params import ConvParams
from .channel_shuffle import channel_shuffle
from .grouped_conv_bn_act import grouped_conv_bn_act


def ssh_grouped(x: Tensor, convs: Sequence[ConvParams], bns: Sequence[BatchNorm], shuffle_groups: int = 1) -> Tensor:
    conv3x3, conv5x5_1, conv5x5_2, conv7x7_2, conv7x7_3 = zip(convs, bns)
    branch3 = grouped_conv_bn_act(x, *conv3x3)
    shared = grouped_conv_bn_act(x, *conv5x5_1, activation="relu")
    branch5 = grouped_conv_bn_act(shared, *conv5x5_2)
    branch7 = grouped_conv_bn_act(grouped_conv_bn_act(shared, *conv7x7_2, activation="relu"), *conv7x7_3)
    y = F.relu(torch.cat((branch3, branch5, branch7), dim=1))
    return channel_shuffle(y, shuffle_groups)
