"""CBAM attention (Woo et al. 2018): one per level in V1, shared and grouped (CBAM_Plus) in V2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffkernels import BatchNorm, cbam
from ffkernels.engine.graph import eval_norm
from ffkernels.nn import FusedModule
from ffkernels.params import ChannelMLP, ConvParams

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value


class ChannelGate(nn.Module):
    """The MLP behind a gate per channel, width -> hidden -> width.

    The first layer starts from the absolute value of PyTorch's draw: its inputs are pooled activations, and with two or
    four hidden ReLU units a signed draw is dead from the start one time in ten.
    """

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)
        with torch.no_grad():
            self.fc1.weight.abs_()

    def params(self) -> ChannelMLP:
        return ChannelMLP.of(self.fc1, self.fc2)


class SpatialGate(nn.Module):
    """The 7x7 convolution and batch normalisation behind a gate per pixel, for ``groups`` groups of channels.

    The normalisation's affine parameters live here; its running statistics are those of each use
    (:class:`SpatialStatistics`), because every level and every repetition has its own distribution.
    """

    def __init__(self, groups: int = 4, kernel_size: int = 7) -> None:
        super().__init__()
        self.groups = groups
        self.conv = nn.Conv2d(2 * groups, groups, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(groups, track_running_stats=False)

    def params(self) -> ConvParams:
        return ConvParams.of(self.conv)


class SpatialStatistics(nn.Module):
    """Running mean and variance of one use of a :class:`SpatialGate`."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(groups))
        self.register_buffer("running_var", torch.ones(groups))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def of(self, bn: nn.BatchNorm2d) -> BatchNorm:
        """``bn`` with these statistics, for one forward pass; counts the batch as ``nn.BatchNorm2d.forward`` does."""
        return BatchNorm.of(bn, self.running_mean, self.running_var, self.num_batches_tracked)


class SharedCBAMManager(FusedModule):
    """Attention of several named levels with shared weights.

    The spatial gate is always shared, each use keeping running statistics of its own. The channel gate is shared where
    the widths differ: one MLP of the smallest width, applied to each chunk of that many channels. Where all widths are
    equal each level has its own, because sharing would leave the channel gate blind to scale.

    Args:
        configs: channels by name of the level.
        reduction_ratio: width of an MLP over its hidden units, rounded down but at least one unit.
        share: True or False overrides the rule for the channel gate; False with different widths gives each level an
            MLP of its own width.
        repeats: how often the attention is applied, with the same weights: a_0 = x, y_k = cbam(a_k),
            a_(k+1) = a_k + y_k; the result is the last y_k.
        spatial_gate: the gate of another manager, to share it.

    Shape: (B, configs[name], H, W) -> the same. See :func:`ffkernels.cbam` for the formula.
    """

    ff_op = "cbam"

    def __init__(
        self,
        configs: Mapping[str, int],
        reduction_ratio: int = 32,
        share: bool | None = None,
        repeats: int = 1,
        spatial_gate: SpatialGate | None = None,
    ) -> None:
        super().__init__()
        widths = list(configs.values())
        width = min(widths)
        self.shared = len(set(widths)) > 1 if share is None else share
        self.spatial_gate = spatial_gate or SpatialGate()
        if self.shared and any(channels % width for channels in widths):
            raise ValueError(f"SharedCBAMManager: channels {widths} must be multiples of the smallest, {width}")
        if any(channels % self.spatial_gate.groups for channels in widths):
            raise ValueError(
                f"SharedCBAMManager: channels {widths} must be multiples of {self.spatial_gate.groups}, "
                "the groups of the spatial gate"
            )
        gates = {"shared": width} if self.shared else dict(configs)
        self.channel_gates = nn.ModuleDict({n: ChannelGate(c, max(c // reduction_ratio, 1)) for n, c in gates.items()})
        self.statistics = nn.ModuleDict(
            {n: nn.ModuleList(SpatialStatistics(self.spatial_gate.groups) for _ in range(repeats)) for n in configs}
        )

    def forward(self, feat: Tensor, name: str, residual: bool = False) -> Tensor:
        """The attention of level ``name``; with ``residual``, relu(attention + feat)."""
        if name not in self.statistics:
            raise ValueError(f"SharedCBAMManager: no level {name!r}, it has: {', '.join(self.statistics)}")
        mlp = self.channel_gates["shared" if self.shared else name].params()
        bns = [statistics.of(self.spatial_gate.bn) for statistics in self.statistics[name]]
        return cbam(feat, mlp, self.spatial_gate.params(), bns, residual=residual, policy=self.ff_policy)

    def ff_plan(self, builder: Builder, feat: Value, name: str, residual: bool = False) -> Value:
        mlp = self.channel_gates["shared" if self.shared else name].params()
        gate = self.spatial_gate
        bns = [eval_norm(gate.bn, s.running_mean, s.running_var) for s in self.statistics[name]]
        return builder.cbam(feat, mlp, gate.conv, bns, residual=residual)


class CBAM_Plus(SharedCBAMManager):
    """The attention of :class:`SharedCBAMManager` for one level alone.

    Args:
        gate_channels: channels of the level, a multiple of 4.
        reduction_ratio: width of the MLP over its hidden units.

    Shape: (B, gate_channels, H, W) -> the same.
    """

    def __init__(self, gate_channels: int, reduction_ratio: int = 32) -> None:
        super().__init__({"level": gate_channels}, reduction_ratio)

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """Gated x, or with ``residual`` relu(gated x + x)."""
        return super().forward(x, "level", residual)

    def ff_plan(self, builder: Builder, x: Value, residual: bool = False) -> Value:
        return super().ff_plan(builder, x, "level", residual)


class CBAM(FusedModule):
    """V1's attention for one level: an MLP with biases and a spatial gate on [max, mean] of all channels.

    Args:
        gate_channels: channels of the level.
        reduction_ratio: channels over hidden units of the MLP, rounded down.

    Shape: (B, gate_channels, H, W) -> the same. See :func:`ffkernels.cbam` for the formula.
    """

    ff_op = "cbam"

    def __init__(self, gate_channels: int, reduction_ratio: int = 48) -> None:
        super().__init__()
        self.channel_gate = ChannelGate(gate_channels, max(gate_channels // reduction_ratio, 1), bias=True)
        self.spatial_conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.spatial_bn = nn.BatchNorm2d(1)

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """Gated x, or with ``residual`` relu(gated x + x)."""
        mlp, conv, bns = self.channel_gate.params(), ConvParams.of(self.spatial_conv), [BatchNorm.of(self.spatial_bn)]
        return cbam(x, mlp, conv, bns, spatial_order="max_mean", residual=residual, policy=self.ff_policy)

    def ff_plan(self, builder: Builder, x: Value, residual: bool = False) -> Value:
        mlp = self.channel_gate.params()
        return builder.cbam(x, mlp, self.spatial_conv, [self.spatial_bn], "max_mean", residual)


class CBAMManager(nn.Module):
    """One :class:`CBAM` per named level, called like :class:`SharedCBAMManager`."""

    def __init__(self, configs: Mapping[str, int], reduction_ratio: int = 48) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({name: CBAM(channels, reduction_ratio) for name, channels in configs.items()})

    def forward(self, feat: Tensor, name: str, residual: bool = False) -> Tensor:
        return self.levels[name](feat, residual)

    def ff_plan(self, builder: Builder, feat: Value, name: str, residual: bool = False) -> Value:
        return builder.module(self.levels[name], feat, residual)
