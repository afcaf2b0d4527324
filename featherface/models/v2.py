"""FeatherFace V2, 256,148 parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ffkernels import HeadParams

from .attention import SharedCBAMManager
from .backbone import MobileNetV1
from .base import FeatherFace
from .bifpn import BiFPN_Light
from .context import ChannelShuffle_Light, SSH_Grouped
from .heads import SharedMultiHead

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value

STAGES = ("stage1", "stage2", "stage3")
LEVELS = ("p3", "p4", "p5")


class FeatherFaceV2(FeatherFace):
    """Backbone, attention, two BiFPN_Light, attention, grouped SSH with channel shuffle, shared-trunk heads."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self.body = MobileNetV1()
        self.backbone_cbam_manager = SharedCBAMManager(dict(zip(STAGES, MobileNetV1.channels)))
        self.bifpn = nn.Sequential(*[BiFPN_Light(channels, MobileNetV1.channels, first_time=i == 0) for i in range(2)])
        self.bifpn_cbam_manager = SharedCBAMManager(dict.fromkeys(LEVELS, channels))
        self.ssh1 = SSH_Grouped(channels, channels)
        self.ssh2 = SSH_Grouped(channels, channels)
        self.ssh3 = SSH_Grouped(channels, channels)
        self.ssh1_cs = ChannelShuffle_Light(channels)
        self.ssh2_cs = ChannelShuffle_Light(channels)
        self.ssh3_cs = ChannelShuffle_Light(channels)
        self.shared_heads = nn.ModuleList(SharedMultiHead(channels) for _ in range(3))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        stages = [self.backbone_cbam_manager(c, name, residual=True) for c, name in zip(self.body(x), STAGES)]
        levels = self.bifpn(stages)
        levels = [self.bifpn_cbam_manager(p, name, residual=True) for p, name in zip(levels, LEVELS)]
        context = ((self.ssh1, self.ssh1_cs), (self.ssh2, self.ssh2_cs), (self.ssh3, self.ssh3_cs))
        # The shuffle only renames channels, so the context block stores them shuffled.
        return [ssh(p, shuffle_groups=cs.groups) for p, (ssh, cs) in zip(levels, context)]

    def ff_absorbed(self) -> Iterable[nn.Module]:
        return [self.ssh1_cs, self.ssh2_cs, self.ssh3_cs, *self.shared_heads]

    def ff_plan_features(self, builder: Builder, x: Value) -> list[Value]:
        stages = [
            builder.module(self.backbone_cbam_manager, c, name, True)
            for c, name in zip(builder.module(self.body, x), STAGES)
        ]
        levels = builder.module(self.bifpn, stages)
        levels = [builder.module(self.bifpn_cbam_manager, p, name, True) for p, name in zip(levels, LEVELS)]
        context = ((self.ssh1, self.ssh1_cs), (self.ssh2, self.ssh2_cs), (self.ssh3, self.ssh3_cs))
        return [builder.module(ssh, p, cs.groups) for p, (ssh, cs) in zip(levels, context)]

    def ff_plan_heads(self, builder: Builder) -> list[HeadParams]:
        return [builder.module(head) for head in self.shared_heads]

    def heads(self) -> list[HeadParams]:
        return [head.params() for head in self.shared_heads]
