"""What the models have in common: their input, their outputs, and how levels become rows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ffkernels import HeadParams, multi_head
from ffkernels.nn import FusedModule
from ffkernels.ops.channel_shuffle import channels_last

from .anchors import VARIANCES, anchors

if TYPE_CHECKING:
    from ffkernels.engine import Builder
    from ffkernels.engine.graph import Value


class FeatherFace(FusedModule):
    """Base of the models. A model implements ``forward_features`` and ``heads``.

    Attributes:
        name: the registry's name of the model, where it was made by :func:`featherface.create_model`.
        options: the constructor's arguments that weights alone do not tell, as JSON can hold them.
    """

    ff_op = "multi_head"
    name: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps that the heads read: P3, P4, P5 of H/8, H/16, H/32, rounded up."""
        raise NotImplementedError

    def heads(self) -> list[HeadParams]:
        """The parameters of the three heads, for one forward pass."""
        raise NotImplementedError

    def forward(self, x: Tensor, logits: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions for every anchor.

        Args:
            x: (B, 3, H, W), BGR 0..255 minus (104, 117, 123), any H and W from 1; B may be 0.
            logits: whether classes are logits. None: logits in training mode, probabilities in evaluation mode.

        Returns:
            bbox (B, N, 4), cls (B, N, 2) with the face in column 1, landmarks (B, N, 10). N runs over P3, P4, P5, in a
            level over rows, then columns, then two anchors: :func:`featherface.models.anchors.anchors`.

        Raises:
            ValueError: x is not a (B, 3, H, W) tensor.
        """
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"{type(self).__name__}: the input must be (B, 3, H, W), got {tuple(x.shape)}")
        if self.ff_policy.mode != "0":
            x = channels_last(x)  # as the kernels compute: not once per op
        features = self.forward_features(x)
        softmax = not (self.training if logits is None else logits)
        return multi_head(features, self.heads(), softmax, policy=self.ff_policy)

    def ff_plan(self, builder: Builder, x: Value) -> None:
        builder.multi_head(self.ff_plan_features(builder, x), self.ff_plan_heads(builder))
        builder.anchors(anchors, VARIANCES)

    def ff_plan_features(self, builder: Builder, x: Value) -> list[Value]:
        """``forward_features`` for an engine."""
        raise TypeError(f"an engine cannot plan {type(self).__name__}: it has no ff_plan_features(builder, x)")

    def ff_plan_heads(self, builder: Builder) -> list[HeadParams]:
        """``heads`` for an engine."""
        raise TypeError(f"an engine cannot plan {type(self).__name__}: it has no ff_plan_heads(builder)")
