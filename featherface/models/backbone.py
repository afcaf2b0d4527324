"""MobileNetV1 at a quarter of its width (Howard et al. 2017), 213,072 parameters: the backbone of every model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ffkernels.nn import ConvBNAct, ConvChain, DepthwiseSeparable

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value


class MobileNetV1(nn.Module):
    """Three stages without a classifier; names and values fit the ImageNet weights of biubug6's RetinaFace.

    Shape: (B, 3, H, W) -> [C3 (B, 64, H/8, W/8), C4 (B, 128, H/16, W/16), C5 (B, 256, H/32, W/32)], sizes rounded up.
    """

    channels = (64, 128, 256)

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = ConvChain(
            ConvBNAct(3, 8, stride=2, activation="leaky_relu"),
            DepthwiseSeparable(8, 16),
            DepthwiseSeparable(16, 32, stride=2),
            DepthwiseSeparable(32, 32),
            DepthwiseSeparable(32, 64, stride=2),
            DepthwiseSeparable(64, 64),
        )
        self.stage2 = ConvChain(
            DepthwiseSeparable(64, 128, stride=2),
            *[DepthwiseSeparable(128, 128) for _ in range(5)],
        )
        self.stage3 = ConvChain(DepthwiseSeparable(128, 256, stride=2), DepthwiseSeparable(256, 256))

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.stage1(x)
        c4 = self.stage2(c3)
        return [c3, c4, self.stage3(c4)]

    def ff_plan(self, builder: Builder, x: Value) -> list[Value]:
        c3 = builder.module(self.stage1, x)
        c4 = builder.module(self.stage2, c3)
        return [c3, c4, builder.module(self.stage3, c4)]
