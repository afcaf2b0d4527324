"""What an op needs of the layers it stands for, as plain tuples of tensors and numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .batch_norm import BatchNorm


class ConvParams(NamedTuple):
    """A 2-D convolution with zero padding, dilation 1 and the same stride and padding along both axes.

    Attributes:
        weight: (out_channels, in_channels / groups, kh, kw).
        bias: (out_channels,) or None.
        stride: step between outputs, in pixels.
        padding: zeros added on every side, in pixels.
        groups: number of independent channel groups.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvParams:
        """The parameters of an ``nn.Conv2d``.

        Raises:
            ValueError: the layer is dilated, pads with anything but zeros, or treats its two axes differently.
        """
        if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"{conv} cannot be described by ConvParams: it needs dilation 1 and numeric zero padding")
        if conv.stride[0] != conv.stride[1] or conv.padding[0] != conv.padding[1]:
            raise ValueError(f"{conv} cannot be described by ConvParams: stride and padding must be the same both ways")
        return cls(conv.weight, conv.bias, conv.stride[0], conv.padding[0], conv.groups)


class ConvUnit(NamedTuple):
    """A convolution, the batch normalisation of its output, and the activation of that.

    Attributes:
        conv: the convolution.
        bn: the batch normalisation, or None.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
    """

    conv: ConvParams
    bn: BatchNorm | None
    activation: str = "none"
    negative_slope: float = 0.1


class ChannelMLP(NamedTuple):
    """Two linear layers with a ReLU between them, width -> hidden -> width, as ``nn.Linear`` keeps them.

    Attributes:
        fc1_weight: (hidden, width).
        fc1_bias: (hidden,) or None.
        fc2_weight: (width, hidden).
        fc2_bias: (width,) or None.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    @classmethod
    def of(cls, fc1: nn.Linear, fc2: nn.Linear) -> ChannelMLP:
        """The parameters of two ``nn.Linear`` layers."""
        return cls(fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class HeadParams(NamedTuple):
    """The detection head of one level: an optional trunk (convolution, BN, ReLU) and three 1x1 predictors.

    Attributes:
        trunk: the trunk's convolution, or None when the predictors read the feature map itself.
        trunk_bn: its batch normalisation, or None.
        cls: predictor of anchors * 2 channels.
        bbox: predictor of anchors * 4 channels.
        landmarks: predictor of anchors * 10 channels.
    """

    trunk: ConvParams | None
    trunk_bn: BatchNorm | None
    cls: ConvParams
    bbox: ConvParams
    landmarks: ConvParams
