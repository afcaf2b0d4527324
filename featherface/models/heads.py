"""Detection heads: two classes, four box offsets and ten landmark offsets per anchor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ffkernels import BatchNorm, multi_head
from ffkernels.nn import ConvBNAct, FusedModule
from ffkernels.params import ConvParams, HeadParams

if TYPE_CHECKING:
    from ffkernels.engine import Builder


class SharedMultiHead(FusedModule):
    """The head of one level: a 3x3 convolution shared by three 1x1 predictors.

    Args:
        in_channels: channels of the level; the shared convolution halves them.
        num_anchors: anchors per pixel.
        predictors: a head whose predictors this one shares.

    Shape: (B, in_channels, H, W) -> cls (B, N, 2), bbox (B, N, 4), landmarks (B, N, 10), N = H * W * num_anchors,
    rows first, then columns, then anchors. Classes are logits; column 1 is the face.
    """

    ff_op = "multi_head"

    def __init__(self, in_channels: int, num_anchors: int = 2, predictors: SharedMultiHead | None = None) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.shared_conv = ConvBNAct(in_channels, hidden)
        if predictors is None:
            self.cls_head = nn.Conv2d(hidden, num_anchors * 2, 1)
            self.bbox_head = nn.Conv2d(hidden, num_anchors * 4, 1)
            self.landmark_head = nn.Conv2d(hidden, num_anchors * 10, 1)
        else:
            self.cls_head, self.bbox_head = predictors.cls_head, predictors.bbox_head
            self.landmark_head = predictors.landmark_head

    def params(self) -> HeadParams:
        """What :func:`ffkernels.multi_head` needs of this head, for one forward pass."""
        return HeadParams(
            ConvParams.of(self.shared_conv[0]),
            BatchNorm.of(self.shared_conv[1]),
            ConvParams.of(self.cls_head),
            ConvParams.of(self.bbox_head),
            ConvParams.of(self.landmark_head),
        )

    def ff_absorbed(self) -> Iterable[nn.Module]:
        return self.children()

    def ff_plan(self, builder: Builder) -> HeadParams:
        """What the engine needs of this head. Unlike :meth:`params`, counts no batch."""
        predictors = map(ConvParams.of, (self.cls_head, self.bbox_head, self.landmark_head))
        return HeadParams(ConvParams.of(self.shared_conv[0]), self.shared_conv[1], *predictors)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bbox, cls, landmarks = multi_head([x], [self.params()], policy=self.ff_policy)
        return cls, bbox, landmarks
