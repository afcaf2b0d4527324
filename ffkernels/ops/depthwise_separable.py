"""The block of MobileNetV1 in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import BatchNorm
from ..config import Policy
from ..params import ConvParams, ConvUnit
from ..reference.depthwise_separable import depthwise_separable as reference
from . import checks
from .conv_chain import run, supports, supports_cuda

OP = "depthwise_separable"
registry.register(OP, "cpu", (torch.float32, torch.float64), supports=supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=supports_cuda)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=supports)


def depthwise_separable(
    x: Tensor,
    depthwise: ConvParams,
    depthwise_bn: BatchNorm | None,
    pointwise: ConvParams,
    pointwise_bn: BatchNorm | None,
    activation: str = "leaky_relu",
    negative_slope: float = 0.1,
    *,
    policy: Policy | None = None,
) -> Tensor:
    """y = act(bn2(pointwise(act(bn1(depthwise(x)))))), the block of MobileNetV1 (Howard et al. 2017).

    Args:
        x: (B, C, H, W), any floating dtype, NCHW or channels_last.
        depthwise: one filter per channel, weight (C, 1, k, k), groups C, any stride and padding.
        depthwise_bn: batch normalisation of C channels, or None.
        pointwise: weight (O, C / groups, 1, 1), stride 1, padding 0.
        pointwise_bn: batch normalisation of O channels, or None.
        activation: applied after each of the two: ``"none"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, O, H', W') with H' = (H + 2 padding - k) // stride + 1, in the dtype of x.

    Raises:
        ValueError: shapes do not fit each other, or the activation is unknown.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    checks.feature_map(OP, "x", x)
    channels = checks.convolution(OP, "depthwise", depthwise, x, x.shape[1])
    if depthwise.groups != channels or channels != x.shape[1]:
        checks.fail(OP, f"depthwise must keep the {x.shape[1]} channels apart, got groups={depthwise.groups}")
    out_channels = checks.convolution(OP, "pointwise", pointwise, x, channels)
    if pointwise.weight.shape[2:] != (1, 1) or pointwise.stride != 1 or pointwise.padding != 0:
        checks.fail(OP, f"pointwise must be a 1x1 convolution of stride 1, got {tuple(pointwise.weight.shape)}")
    checks.batch_norm(OP, "depthwise_bn", depthwise_bn, x, channels)
    checks.batch_norm(OP, "pointwise_bn", pointwise_bn, x, out_channels)
    checks.activation(OP, activation)
    units = [
        ConvUnit(depthwise, depthwise_bn, activation, negative_slope),
        ConvUnit(pointwise, pointwise_bn, activation, negative_slope),
    ]
    y = run(OP, x, units, policy)
    if y is not None:
        return y
    return reference(x, depthwise, depthwise_bn, pointwise, pointwise_bn, activation, negative_slope)
