"""FeatherFace V1, the teacher, in three variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ffkernels import ConvParams, HeadParams
from ffkernels.nn import ConvBNAct, DeformConvBNAct

from .attention import CBAMManager
from .backbone import MobileNetV1
from .base import FeatherFace
from .bifpn import BiFPN
from .context import ChannelShuffle_Light, SSH_Deformable
from .v2 import LEVELS, STAGES

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value


class FeatherFaceV1(FeatherFace):
    """Backbone, attention, two BiFPN, attention, context, channel shuffle, three 1x1 heads per level.

    Args:
        context: ``"conv"`` (3x3 convolution, as the seed's table counts it, 487,103 parameters), ``"dcn"`` (deformable,
            541,130) or ``"ssh"`` (the published network, 489,015: SSH of deformable convolutions, 56 channels instead
            of 74, no attention, the shuffle transposed).
    """

    def __init__(self, context: str = "conv") -> None:
        super().__init__()
        published = context == "ssh"
        channels = 56 if published else 74
        self.body = MobileNetV1()
        self.backbone_cbam_manager = self.bifpn_cbam_manager = None
        if not published:
            self.backbone_cbam_manager = CBAMManager(dict(zip(STAGES, MobileNetV1.channels)))
            self.bifpn_cbam_manager = CBAMManager(dict.fromkeys(LEVELS, channels))
        self.bifpn = nn.Sequential(*[BiFPN(channels, MobileNetV1.channels, first_time=i == 0) for i in range(2)])
        build = {
            "conv": lambda: ConvBNAct(channels, channels, activation="relu"),
            "dcn": lambda: DeformConvBNAct(channels, channels, activation="relu"),
            "ssh": lambda: SSH_Deformable(channels, channels),
        }[context]
        self.ssh1, self.ssh2, self.ssh3 = build(), build(), build()
        groups = channels // 2 if published else 2
        self.ssh1_cs = ChannelShuffle_Light(channels, groups)
        self.ssh2_cs = ChannelShuffle_Light(channels, groups)
        self.ssh3_cs = ChannelShuffle_Light(channels, groups)
        self.ClassHead = nn.ModuleList(nn.Conv2d(channels, 2 * 2, 1) for _ in range(3))
        self.BboxHead = nn.ModuleList(nn.Conv2d(channels, 2 * 4, 1) for _ in range(3))
        self.LandmarkHead = nn.ModuleList(nn.Conv2d(channels, 2 * 10, 1) for _ in range(3))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        levels = self.body(x)
        if self.backbone_cbam_manager is not None:
            levels = [self.backbone_cbam_manager(c, name, residual=True) for c, name in zip(levels, STAGES)]
        levels = self.bifpn(levels)
        if self.bifpn_cbam_manager is not None:
            levels = [self.bifpn_cbam_manager(p, name, residual=True) for p, name in zip(levels, LEVELS)]
        context = ((self.ssh1, self.ssh1_cs), (self.ssh2, self.ssh2_cs), (self.ssh3, self.ssh3_cs))
        return [shuffle(block(p)) for p, (block, shuffle) in zip(levels, context)]

    def ff_plan_features(self, builder: Builder, x: Value) -> list[Value]:
        levels = builder.module(self.body, x)
        if self.backbone_cbam_manager is not None:
            levels = [builder.module(self.backbone_cbam_manager, c, name, True) for c, name in zip(levels, STAGES)]
        levels = builder.module(self.bifpn, levels)
        if self.bifpn_cbam_manager is not None:
            levels = [builder.module(self.bifpn_cbam_manager, p, name, True) for p, name in zip(levels, LEVELS)]
        context = ((self.ssh1, self.ssh1_cs), (self.ssh2, self.ssh2_cs), (self.ssh3, self.ssh3_cs))
        return [builder.module(shuffle, builder.module(block, p)) for p, (block, shuffle) in zip(levels, context)]

    def ff_plan_heads(self, builder: Builder) -> list[HeadParams]:
        return self.heads()

    def heads(self) -> list[HeadParams]:
        levels = zip(self.ClassHead, self.BboxHead, self.LandmarkHead)
        return [HeadParams(None, None, *map(ConvParams.of, predictors)) for predictors in levels]
