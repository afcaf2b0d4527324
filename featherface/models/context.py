"""What lies around a face: context modules and channel shuffles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffkernels import BatchNorm, channel_shuffle, ssh_grouped
from ffkernels.nn import ConvBNAct, DeformConvBNAct, FusedModule
from ffkernels.params import ConvParams

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value


def branch_channels(out_channel: int, reduction: int) -> tuple[int, int]:
    """Channels of SSH's 3x3 branch and of each of the other two: out / r and (out - out / r) / 2."""
    if out_channel % reduction or (out_channel - out_channel // reduction) % 2:
        raise ValueError(f"SSH: {out_channel} channels cannot be divided in branches with reduction={reduction}")
    first = out_channel // reduction
    return first, (out_channel - first) // 2


class SSH_Grouped(FusedModule):
    """The SSH context block (Najibi et al. 2017) with grouped 3x3 convolutions.

    Three branches of one, two and three convolutions, BN after each; the last two share their first convolution. ReLU
    between convolutions and after the concatenation. See :func:`ffkernels.ssh_grouped` for the formula.

    Args:
        in_channel, out_channel: channels before and after.
        groups: of every convolution.
        reduction: r; the 3x3 branch has out / r channels, the others (out - out / r) / 2 each.
        convs: a block whose convolutions this one shares; its batch normalisations stay its own.

    Shape: (B, in_channel, H, W) -> (B, out_channel, H, W).
    """

    ff_op = "ssh_grouped"

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        groups: int = 4,
        reduction: int = 2,
        convs: SSH_Grouped | None = None,
    ) -> None:
        super().__init__()
        first, other = branch_channels(out_channel, reduction)
        if any(channels % groups for channels in (in_channel, first, other)):
            raise ValueError(
                f"SSH_Grouped: groups={groups} must divide the input channels and those of the branches, "
                f"{in_channel}, {first} and {other}"
            )
        self.conv3X3 = ConvBNAct(in_channel, first, groups=groups, activation="none")
        self.conv5X5_1 = ConvBNAct(in_channel, other, groups=groups)
        self.conv5X5_2 = ConvBNAct(other, other, groups=groups, activation="none")
        self.conv7X7_2 = ConvBNAct(other, other, groups=groups)
        self.conv7x7_3 = ConvBNAct(other, other, groups=groups, activation="none")
        if convs is not None:
            for mine, theirs in zip(self.children(), convs.children()):
                mine[0] = theirs[0]

    def ff_absorbed(self) -> Iterable[nn.Module]:
        return self.children()

    def forward(self, x: Tensor, shuffle_groups: int = 1) -> Tensor:
        """The context of x; with ``shuffle_groups``, its channels shuffled as they are stored."""
        layers = (self.conv3X3, self.conv5X5_1, self.conv5X5_2, self.conv7X7_2, self.conv7x7_3)
        convs = [ConvParams.of(layer[0]) for layer in layers]
        bns = [BatchNorm.of(layer[1]) for layer in layers]
        return ssh_grouped(x, convs, bns, shuffle_groups, policy=self.ff_policy)

    def ff_plan(self, builder: Builder, x: Value, shuffle_groups: int = 1) -> Value:
        return self.ff_plan_with_input(builder, x, shuffle_groups)[0]

    def ff_plan_with_input(self, builder: Builder, x: Value, shuffle_groups: int = 1) -> tuple[Value, Value]:
        """The context, and x as the context block read it."""
        layers = (self.conv3X3, self.conv5X5_1, self.conv5X5_2, self.conv7X7_2, self.conv7x7_3)
        return builder.ssh_grouped(x, [layer[0] for layer in layers], [layer[1] for layer in layers], shuffle_groups)


class SSH_Deformable(nn.Module):
    """SSH of deformable 3x3 convolutions (DCNv2), LeakyReLU 0.1 between them: the context of V1 as published.

    Shape: (B, in_channel, H, W) -> (B, out_channel, H, W).
    """

    def __init__(self, in_channel: int, out_channel: int) -> None:
        super().__init__()
        first, other = branch_channels(out_channel, 2)
        self.conv3X3 = DeformConvBNAct(in_channel, first)
        self.conv5X5_1 = DeformConvBNAct(in_channel, other, activation="leaky_relu")
        self.conv5X5_2 = DeformConvBNAct(other, other)
        self.conv7X7_2 = DeformConvBNAct(other, other, activation="leaky_relu")
        self.conv7x7_3 = DeformConvBNAct(other, other)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5X5_1(x)
        branches = self.conv3X3(x), self.conv5X5_2(shared), self.conv7x7_3(self.conv7X7_2(shared))
        return F.relu(torch.cat(branches, dim=1))

    def ff_plan(self, builder: Builder, x: Value) -> Value:
        def sampling(source: Value, *blocks: DeformConvBNAct) -> Value:
            convs = [conv for block in blocks for conv in (block[0].offset_conv, block[0].modulator_conv)]
            return builder.conv(source, builder.stack(convs))

        x = builder.materialised(x)
        fields = sampling(x, self.conv3X3, self.conv5X5_1)
        branch3 = self.conv3X3.ff_plan_sampled(builder, x, fields, 0)
        shared = self.conv5X5_1.ff_plan_sampled(builder, x, fields, 27)
        fields = sampling(shared, self.conv5X5_2, self.conv7X7_2)
        branch5 = self.conv5X5_2.ff_plan_sampled(builder, shared, fields, 0)
        branch7 = builder.module(self.conv7x7_3, self.conv7X7_2.ff_plan_sampled(builder, shared, fields, 27))
        return builder.concat([branch3, branch5, branch7], "relu")


class ChannelShuffle_Light(FusedModule):
    """Channel shuffle (Zhang et al. 2018): view (B, g, C / g, H, W), axes 1 and 2 exchanged. No parameters.

    Args:
        channels: C, a multiple of ``groups``.
        groups: g.

    Shape: (B, C, H, W) -> the same.
    """

    ff_op = "channel_shuffle"

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"ChannelShuffle_Light: groups={groups} does not divide {channels} channels")
        self.channels, self.groups = channels, groups

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(x, self.groups, policy=self.ff_policy)

    def ff_plan(self, builder: Builder, x: Value) -> Value:
        return builder.channel_shuffle(x, self.groups)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"channels={self.channels}, groups={self.groups}", super().extra_repr()]))
