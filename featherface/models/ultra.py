"""FeatherFace V2 Ultra, 248,136 parameters: V2 with shared weights and five innovations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffkernels import HeadParams, Policy, channel_shuffle

from .attention import SharedCBAMManager
from .backbone import MobileNetV1
from .base import FeatherFace
from .bifpn import BiFPN_Light
from .context import ChannelShuffle_Light, SSH_Grouped
from .heads import SharedMultiHead
from .v2 import LEVELS, STAGES

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value

INNOVATIONS = ("reuse", "attention", "progressive", "multiscale", "dynamic")


class DynamicGate(nn.Module):
    """Dynamic Weight Sharing: how much of the context each image takes at each level, 100 parameters.

    g_l = sigmoid((w_l . mean_hw(x) + b_l) / t) with t = softplus(raw) + 0.1; y = g_l context + (1 - g_l) relu(x).
    It starts with w = 0, b = 2 and t = 1: every gate at 0.88.
    """

    def __init__(self, channels: int, levels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(levels, channels))
        self.bias = nn.Parameter(torch.full((levels,), 2.0))
        self.raw_temperature = nn.Parameter(torch.tensor(math.log(math.expm1(0.9))))

    def forward(self, x: Tensor, context: Tensor, level: int) -> Tensor:
        temperature = F.softplus(self.raw_temperature) + 0.1
        score = x.mean((2, 3)) @ self.weight[level] + self.bias[level]
        gate = torch.sigmoid(score / temperature)[:, None, None, None]
        return gate * context + (1 - gate) * F.relu(x)

    def ff_plan(self, builder: Builder, x: Value, planar_x: Value, context: Value, level: int) -> Value:
        temperature = F.softplus(self.raw_temperature.detach().double()) + 0.1
        weight, bias = (p.detach().double()[level] / temperature for p in (self.weight, self.bias))
        return builder.gate_mix(planar_x, context, weight, bias, x)


def reuse(levels: Sequence[Tensor], raw: Sequence[Tensor]) -> list[Tensor]:
    """Smart Feature Reuse: F_l + 0.3 G(C_l), C_l raw from the backbone, G the mean over chunks of channels."""
    return [p + 0.3 * c.unflatten(1, (p.shape[1], -1)).mean(2) for p, c in zip(levels, raw)]


def multiscale(levels: Sequence[Tensor]) -> list[Tensor]:
    """Multi-Scale Intelligence: each level receives its neighbours, resized bilinearly, all from the values before."""
    p3, p4, p5 = levels

    def resized(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    return [
        p3 + 0.4 * resized(p4, p3),
        p4 + 0.3 * resized(p3, p4) + 0.3 * resized(p5, p4),
        p5 + 0.4 * resized(p4, p5),
    ]


def progressive(x: Tensor, policy: Policy) -> Tensor:
    """Progressive Feature Enhancement: three times x + 0.1 tanh(x), shuffle of 4 groups, times 1, 1.1, 1.2."""
    for i in range(3):
        x = channel_shuffle(x + 0.1 * torch.tanh(x), 4, policy=policy) * (1 + 0.1 * i)
    return x


class FeatherFaceV2Ultra(FeatherFace):
    """V2 whose managers share a spatial gate, and whose pyramid repeats, context blocks and heads share convolutions.

    Every batch normalisation stays its own; of the spatial gate's, the running statistics do.

    Args:
        innovations: any of ``"reuse"``, ``"attention"``, ``"progressive"``, ``"multiscale"``, ``"dynamic"``.

    Raises:
        ValueError: an innovation is unknown.
    """

    def __init__(self, innovations: Iterable[str] = INNOVATIONS) -> None:
        super().__init__()
        chosen = {innovations} if isinstance(innovations, str) else set(innovations)
        if unknown := sorted(chosen.difference(INNOVATIONS)):
            raise ValueError(f"unknown innovations {', '.join(unknown)}; choose from: {', '.join(INNOVATIONS)}")
        self.innovations = tuple(name for name in INNOVATIONS if name in chosen)
        self.options = {"innovations": list(self.innovations)}

        channels = 32
        self.body = MobileNetV1()
        self.backbone_cbam_manager = SharedCBAMManager(
            dict(zip(STAGES, MobileNetV1.channels)), repeats=3 if "attention" in chosen else 1
        )
        first = BiFPN_Light(channels, MobileNetV1.channels, first_time=True)
        self.bifpn = nn.Sequential(first, BiFPN_Light(channels, convs=first))
        self.bifpn_cbam_manager = SharedCBAMManager(
            dict.fromkeys(LEVELS, channels), share=True, spatial_gate=self.backbone_cbam_manager.spatial_gate
        )
        self.ssh1 = SSH_Grouped(channels, channels)
        self.ssh2 = SSH_Grouped(channels, channels, convs=self.ssh1)
        self.ssh3 = SSH_Grouped(channels, channels, convs=self.ssh1)
        self.ssh1_cs = ChannelShuffle_Light(channels)
        self.ssh2_cs = ChannelShuffle_Light(channels)
        self.ssh3_cs = ChannelShuffle_Light(channels)
        head = SharedMultiHead(channels)
        self.shared_heads = nn.ModuleList([head, *[SharedMultiHead(channels, predictors=head) for _ in range(2)]])
        self.dynamic_gate = DynamicGate(channels) if "dynamic" in chosen else None

    def forward_features(self, x: Tensor) -> list[Tensor]:
        raw = self.body(x)
        levels = self.bifpn([self.backbone_cbam_manager(c, name, residual=True) for c, name in zip(raw, STAGES)])
        if "reuse" in self.innovations:
            levels = reuse(levels, raw)
        levels = [self.bifpn_cbam_manager(p, name, residual=True) for p, name in zip(levels, LEVELS)]
        if "multiscale" in self.innovations:
            levels = multiscale(levels)
        blocks = ((self.ssh1, self.ssh1_cs), (self.ssh2, self.ssh2_cs), (self.ssh3, self.ssh3_cs))
        return [self.context(p, *block, level) for level, (p, block) in enumerate(zip(levels, blocks))]

    def context(self, x: Tensor, ssh: SSH_Grouped, shuffle: ChannelShuffle_Light, level: int) -> Tensor:
        if self.dynamic_gate is None:
            x = ssh(x, shuffle_groups=shuffle.groups)
        else:
            x = shuffle(self.dynamic_gate(x, ssh(x), level))
        return progressive(x, self.ff_policy) if "progressive" in self.innovations else x

    def ff_absorbed(self) -> Iterable[nn.Module]:
        return [self.ssh1_cs, self.ssh2_cs, self.ssh3_cs, *self.shared_heads]

    def ff_plan_features(self, builder: Builder, x: Value) -> list[Value]:
        raw = builder.module(self.body, x)
        stages = [builder.module(self.backbone_cbam_manager, c, name, True) for c, name in zip(raw, STAGES)]
        levels = builder.module(self.bifpn, stages)
        if "reuse" in self.innovations:
            levels = [builder.add_chunk_mean(p, c, 0.3) for p, c in zip(levels, raw)]
        levels = [builder.module(self.bifpn_cbam_manager, p, name, True) for p, name in zip(levels, LEVELS)]
        if "multiscale" in self.innovations:
            p3, p4, p5 = levels = [builder.materialised(p) for p in levels]
            levels = [
                builder.add_resized(p3, [(p4, 0.4)]),
                builder.add_resized(p4, [(p3, 0.3), (p5, 0.3)]),
                builder.add_resized(p5, [(p4, 0.4)]),
            ]
        blocks = ((self.ssh1, self.ssh1_cs), (self.ssh2, self.ssh2_cs), (self.ssh3, self.ssh3_cs))
        return [self.ff_plan_context(builder, p, *block, level) for level, (p, block) in enumerate(zip(levels, blocks))]

    def ff_plan_context(
        self, builder: Builder, x: Value, ssh: SSH_Grouped, shuffle: ChannelShuffle_Light, level: int
    ) -> Value:
        if self.dynamic_gate is None:
            x = builder.module(ssh, x, shuffle.groups)
        else:
            x = builder.materialised(x)
            context, planar_x = ssh.ff_plan_with_input(builder, x)
            x = builder.module(shuffle, builder.module(self.dynamic_gate, x, planar_x, context, level))
        return builder.progressive(x) if "progressive" in self.innovations else x

    def ff_plan_heads(self, builder: Builder) -> list[HeadParams]:
        return [builder.module(head) for head in self.shared_heads]

    def heads(self) -> list[HeadParams]:
        return [head.params() for head in self.shared_heads]
