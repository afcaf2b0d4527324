"""Convolution, batch normalisation and activation in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import BatchNorm
from ..config import Policy
from ..params import ConvParams, ConvUnit
from ..reference.grouped_conv_bn_act import grouped_conv_bn_act as reference
from . import checks
from .conv_chain import run, supports, supports_cuda

OP = "grouped_conv_bn_act"
registry.register(OP, "cpu", (torch.float32, torch.float64), supports=supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=supports_cuda)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=supports)


def grouped_conv_bn_act(
    x: Tensor,
    conv: ConvParams,
    bn: BatchNorm | None,
    activation: str = "none",
    negative_slope: float = 0.1,
    *,
    policy: Policy | None = None,
) -> Tensor:
    """y = act(bn(conv(x))), for any number of channel groups (1: a dense convolution).

    On the CPU a NaN or an infinity in one group of a 1x1 convolution may also reach outputs of its neighbours: narrow
    groups are computed together, with zeros in between.

    Args:
        x: (B, C, H, W), any floating dtype, NCHW or channels_last.
        conv: the convolution, weight (O, C / groups, kh, kw).
        bn: batch normalisation of O channels, or None. In training its running statistics are updated in place.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, O, H', W') with H' = (H + 2 padding - kh) // stride + 1, in the dtype of x.

    Raises:
        ValueError: shapes do not fit each other, or the activation is unknown.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    checks.feature_map(OP, "x", x)
    out_channels = checks.convolution(OP, "conv", conv, x, x.shape[1])
    checks.batch_norm(OP, "bn", bn, x, out_channels)
    checks.activation(OP, activation)
    y = run(OP, x, [ConvUnit(conv, bn, activation, negative_slope)], policy)
    if y is not None:
        return y
    return reference(x, conv, bn, activation, negative_slope)
