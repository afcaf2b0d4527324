"""One node of a BiFPN (Tan et al. 2020): resample, fuse with normalised weights, SiLU, convolve, BN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..batch_norm import BatchNorm
from ..params import ConvParams
from .channel_shuffle import channel_shuffle
from .layers import batch_norm, conv2d


def bifpn_node(
    inputs: Sequence[Tensor],
    resample: Sequence[str],
    fusion_weight: Tensor,
    depthwise: ConvParams,
    pointwise: ConvParams | None,
    bn: BatchNorm,
    shuffle_groups: int = 1,
    pool: str = "max",
    epsilon: float = 1e-4,
) -> Tensor:
    size = inputs[list(resample).index("none")].shape[2:]
    weight = F.relu(fusion_weight)
    weight = weight / (weight.sum() + epsilon)
    fused = sum(weight[i] * resampled(x, how, size, pool) for i, (x, how) in enumerate(zip(inputs, resample)))
    y = conv2d(F.silu(fused), depthwise)
    if pointwise is not None:
        y = channel_shuffle(conv2d(y, pointwise), shuffle_groups)
    return batch_norm(y, bn)


def resampled(x: Tensor, how: str, size: Sequence[int], pool: str) -> Tensor:
    """``"none"``: x; ``"up"``: nearest neighbour to ``size``; ``"down"``: 3x3 maximum of stride 2, ceil(H / 2) high.

    pool ``"max"`` ignores what lies outside; ``"max_same"`` pads with zeros, one row and column more at the far side
    when the size is even (TensorFlow's SAME).
    """
    if how == "none":
        return x
    if how == "up":
        return F.interpolate(x, size=tuple(size), mode="nearest")
    if pool == "max_same":
        height, width = x.shape[2:]
        return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), 3, 2)
    return F.max_pool2d(x, 3, 2, 1)
