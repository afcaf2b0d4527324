"""CBAM (Woo et al. 2018): a gate per channel, then a gate per pixel, here also grouped, chunked and repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_norm import BatchNorm
from ..params import ChannelMLP, ConvParams
from .layers import batch_norm, conv2d


def cbam(
    x: Tensor,
    channel_mlp: ChannelMLP,
    spatial: ConvParams,
    spatial_bn: Sequence[BatchNorm],
    spatial_order: str = "mean_max",
    residual: bool = False,
) -> Tensor:
    def gated(a: Tensor, bn: BatchNorm) -> Tensor:
        return spatial_gate(channel_gate(a, channel_mlp), spatial, bn, spatial_order)

    state = x
    for bn in spatial_bn[:-1]:
        state = state + gated(state, bn)
    y = gated(state, spatial_bn[-1])
    return F.relu(y + x) if residual else y


def channel_gate(x: Tensor, mlp: ChannelMLP) -> Tensor:
    """x * sigmoid(mlp(mean) + mlp(max)), mean and max over the pixels, the MLP applied to each chunk of channels."""

    def run(pooled: Tensor) -> Tensor:
        chunks = pooled.unflatten(1, (-1, mlp.fc1_weight.shape[1]))
        hidden = F.relu(F.linear(chunks, mlp.fc1_weight, mlp.fc1_bias))
        return F.linear(hidden, mlp.fc2_weight, mlp.fc2_bias).flatten(1)

    gate = torch.sigmoid(run(x.mean((2, 3))) + run(x.amax((2, 3))))
    return x * gate[:, :, None, None]


def spatial_gate(x: Tensor, conv: ConvParams, bn: BatchNorm, order: str) -> Tensor:
    """Each group of channels times sigmoid(bn(conv([mean, max]))), mean and max over the group's channels."""
    groups = x.unflatten(1, (conv.groups, -1))
    maps = [groups.mean(2), groups.amax(2)]
    if order == "max_mean":
        maps.reverse()
    interleaved = torch.stack(maps, dim=2).flatten(1, 2)
    gate = torch.sigmoid(batch_norm(conv2d(interleaved, conv), bn))
    return (groups * gate.unsqueeze(2)).flatten(1, 2)
