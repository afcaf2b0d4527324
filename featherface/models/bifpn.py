"""Bidirectional feature pyramids (Tan et al. 2020): V1's, and the light one of V2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffkernels import BatchNorm, bifpn_node
from ffkernels.nn import ConvBNAct, FusedModule
from ffkernels.params import ConvParams

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value


class BiFPNNode(FusedModule):
    """Fuses two or three maps and convolves the result. See :func:`ffkernels.bifpn_node` for the formula.

    Args:
        channels: of all inputs and of the output.
        resample: for each input ``"none"``, ``"up"`` or ``"down"``.
        weights: number of fusion weights, at least the number of inputs.
        groups: of the 1x1 convolution and of the channel shuffle after it.
        bias: whether the 1x1 convolution has one.
        separable: False replaces the 3x3 depthwise and 1x1 convolutions by one dense 3x3 convolution.
        pool: border of ``"down"``, ``"max"`` or ``"max_same"``.
        eps, momentum: of the batch normalisation.
        convs: a node whose convolutions this one shares.
    """

    ff_op = "bifpn_node"

    def __init__(
        self,
        channels: int,
        resample: Sequence[str],
        weights: int,
        groups: int = 4,
        bias: bool = False,
        separable: bool = True,
        pool: str = "max",
        eps: float = 1e-5,
        momentum: float = 0.1,
        convs: BiFPNNode | None = None,
    ) -> None:
        super().__init__()
        self.resample, self.pool = tuple(resample), pool
        self.shuffle_groups = groups if separable else 1
        self.fusion_weight = nn.Parameter(torch.ones(weights))
        if convs is not None:
            self.depthwise, self.pointwise = convs.depthwise, convs.pointwise
        elif separable:
            self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            self.pointwise = nn.Conv2d(channels, channels, 1, groups=groups, bias=bias)
        else:
            self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.pointwise = None
        self.bn = nn.BatchNorm2d(channels, eps=eps, momentum=momentum)

    def forward(self, *inputs: Tensor) -> Tensor:
        return bifpn_node(
            inputs,
            self.resample,
            self.fusion_weight,
            ConvParams.of(self.depthwise),
            None if self.pointwise is None else ConvParams.of(self.pointwise),
            BatchNorm.of(self.bn),
            self.shuffle_groups,
            self.pool,
            policy=self.ff_policy,
        )

    def ff_plan(self, builder: Builder, *inputs: Value) -> Value:
        return builder.bifpn_node(
            inputs,
            self.resample,
            self.fusion_weight,
            self.depthwise,
            self.pointwise,
            self.bn,
            self.shuffle_groups,
            self.pool,
        )


class BiFPN_Light(nn.Module):
    """One repeat of V2's pyramid: laterals on the first, then four nodes::

        P4u = S(silu(w p4 + w up(p5)))              P3o = S(silu(w p3 + w up(P4u)))
        P4o = S(silu(w p4 + w P4u + w down(P3o)))   P5o = S(silu(w p5 + w down(P4u) + w down(P4o)))

    S is a 3x3 depthwise convolution, a grouped 1x1, a channel shuffle and BN. Used as ``nn.Sequential`` of repeats.

    Args:
        num_channels: channels of the pyramid.
        conv_channels: channels of the three inputs on the first repeat.
        first_time: whether this is the first repeat, which brings the inputs to ``num_channels`` by 1x1 convolutions.
        use_dwsep: False makes S one dense 3x3 convolution and BN.
        reduction_factor: groups of the 1x1 convolutions and of the shuffle.
        convs: a repeat whose depthwise and pointwise convolutions this one shares.

    Shape: [P3, P4, P5], each half the size of the one before, rounded up -> [P3o, P4o, P5o] of ``num_channels``.
    """

    def __init__(
        self,
        num_channels: int = 32,
        conv_channels: Sequence[int] = (64, 128, 256),
        first_time: bool = False,
        use_dwsep: bool = True,
        reduction_factor: int = 4,
        convs: BiFPN_Light | None = None,
    ) -> None:
        super().__init__()
        if use_dwsep and num_channels % reduction_factor:
            raise ValueError(
                f"BiFPN_Light: reduction_factor={reduction_factor} does not divide {num_channels} channels"
            )
        self.laterals = None
        if first_time:
            self.laterals = nn.ModuleList(
                ConvBNAct(channels, num_channels, 1, bias=True, activation="none") for channels in conv_channels
            )

        def node(name: str, *resample: str) -> BiFPNNode:
            shared = None if convs is None else getattr(convs, name)
            return BiFPNNode(num_channels, resample, len(resample), reduction_factor, separable=use_dwsep, convs=shared)

        self.p4_up = node("p4_up", "none", "up")
        self.p3_out = node("p3_out", "none", "up")
        self.p4_out = node("p4_out", "none", "none", "down")
        self.p5_out = node("p5_out", "none", "down", "down")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if self.laterals is not None:
            features = [lateral(x) for lateral, x in zip(self.laterals, features)]
        p3, p4, p5 = features
        p4_up = self.p4_up(p4, p5)
        p3_out = self.p3_out(p3, p4_up)
        p4_out = self.p4_out(p4, p4_up, p3_out)
        p5_out = self.p5_out(p5, p4_up, p4_out)
        return [p3_out, p4_out, p5_out]

    def ff_plan(self, builder: Builder, features: Sequence[Value]) -> list[Value]:
        if self.laterals is not None:
            features = [builder.module(lateral, x) for lateral, x in zip(self.laterals, features)]
        p3, p4, p5 = features
        p4_up = builder.module(self.p4_up, p4, p5)
        p3_out = builder.module(self.p3_out, p3, p4_up)
        p4_out = builder.module(self.p4_out, p4, p4_up, p3_out)
        p5_out = builder.module(self.p5_out, p5, p4_up, p4_out)
        return [p3_out, p4_out, p5_out]


class BiFPN(nn.Module):
    """One repeat of V1's pyramid.

    It differs from :class:`BiFPN_Light` in its 1x1 convolutions (dense, with bias), in a second lateral of P4 and of P5
    for the bottom-up path on the first repeat, in P5o = S(silu(w0 p5 + w1 down(P4o))), whose third weight only takes
    part in the sum that normalises, and in TensorFlow's border of the max-pool.

    Args:
        num_channels: channels of the pyramid.
        conv_channels: channels of the three inputs on the first repeat.
        first_time: whether this is the first repeat.

    Shape: [P3, P4, P5], each half the size of the one before, rounded up -> [P3o, P4o, P5o] of ``num_channels``.
    """

    def __init__(
        self, num_channels: int, conv_channels: Sequence[int] = (64, 128, 256), first_time: bool = False
    ) -> None:
        super().__init__()
        bn = {"eps": 1e-3, "momentum": 0.01}
        self.laterals = self.bottom_up_laterals = None
        if first_time:
            self.laterals = nn.ModuleList(
                ConvBNAct(channels, num_channels, 1, bias=True, activation="none", **bn) for channels in conv_channels
            )
            self.bottom_up_laterals = nn.ModuleList(
                ConvBNAct(channels, num_channels, 1, bias=True, activation="none", **bn)
                for channels in conv_channels[1:]
            )

        def node(weights: int, *resample: str) -> BiFPNNode:
            return BiFPNNode(num_channels, resample, weights, groups=1, bias=True, pool="max_same", **bn)

        self.p4_up = node(2, "none", "up")
        self.p3_out = node(2, "none", "up")
        self.p4_out = node(3, "none", "none", "down")
        self.p5_out = node(3, "none", "down")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if self.laterals is None:
            p3, p4, p5 = features
            p4_second, p5_second = p4, p5
        else:
            p3, p4, p5 = (lateral(x) for lateral, x in zip(self.laterals, features))
            p4_second, p5_second = (lateral(x) for lateral, x in zip(self.bottom_up_laterals, features[1:]))
        p4_up = self.p4_up(p4, p5)
        p3_out = self.p3_out(p3, p4_up)
        p4_out = self.p4_out(p4_second, p4_up, p3_out)
        p5_out = self.p5_out(p5_second, p4_out)
        return [p3_out, p4_out, p5_out]

    def ff_plan(self, builder: Builder, features: Sequence[Value]) -> list[Value]:
        p3, p4, p5 = features
        p4_second, p5_second = p4, p5
        if self.laterals is not None:
            p3, p4, p5 = (builder.module(lateral, x) for lateral, x in zip(self.laterals, features))
            p4_second, p5_second = (
                builder.module(lateral, x) for lateral, x in zip(self.bottom_up_laterals, features[1:])
            )
        p4_up = builder.module(self.p4_up, p4, p5)
        p3_out = builder.module(self.p3_out, p3, p4_up)
        p4_out = builder.module(self.p4_out, p4_second, p4_up, p3_out)
        p5_out = builder.module(self.p5_out, p5_second, p4_out)
        return [p3_out, p4_out, p5_out]
