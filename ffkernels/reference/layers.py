"""The steps that several ops share: convolution, batch normalisation, activation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..batch_norm import BatchNorm
from ..params import ConvParams


def conv2d(x: Tensor, conv: ConvParams) -> Tensor:
    """(B, C, H, W) -> (B, O, H', W'), H' = (H + 2 padding - kh) // stride + 1."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)


def batch_norm(x: Tensor, bn: BatchNorm | None) -> Tensor:
    """What ``nn.BatchNorm2d.forward`` computes, running statistics included; ``None`` leaves x alone."""
    if bn is None:
        return x
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)


def activate(x: Tensor, activation: str, negative_slope: float = 0.1) -> Tensor:
    """``"none"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``, element by element."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "silu":
        return F.silu(x)
    raise ValueError(f"unknown activation {activation!r}: use 'none', 'relu', 'leaky_relu' or 'silu'")
