"""Layers with random parameters, for the benchmarks of ops made of convolutions."""

from __future__ import annotations

import torch

from ffkernels import BatchNorm, ConvParams

BATCH = 8
"""Images per case; maps are those of a 320x320 input."""


def conv(
    out_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> ConvParams:
    weight = (torch.randn(out_channels, channels // groups, kernel, kernel) * 0.1).requires_grad_()
    offset = torch.zeros(out_channels, requires_grad=True) if bias else None
    return ConvParams(weight, offset, stride, kernel // 2, groups)


def norm(channels: int, training: bool) -> BatchNorm:
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    return BatchNorm(weight, bias, torch.zeros(channels), torch.ones(channels), training, 0.1, 1e-5)


def image(channels: int, height: int, training: bool, width: int | None = None) -> torch.Tensor:
    x = torch.randn(BATCH, channels, height, width or height).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(training)


def leaves(*values: object) -> list[torch.Tensor]:
    """Tensors that take gradients inside nested tuples and lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found += [value] if value.requires_grad else []
        elif isinstance(value, (tuple, list)):
            found += leaves(*value)
    return found


def products(conv: ConvParams, x: torch.Tensor) -> int:
    """Multiplications of one forward pass of a convolution that keeps its padding at half the kernel."""
    size = [-(-n // conv.stride) for n in x.shape[2:]]
    return x.shape[0] * size[0] * size[1] * conv.weight.numel()
