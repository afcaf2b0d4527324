"""Drop-in blocks of convolution, batch normalisation and activation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..batch_norm import BatchNorm
from ..ops.conv_chain import conv_chain, facts_of
from ..ops.depthwise_separable import depthwise_separable
from ..ops.grouped_conv_bn_act import grouped_conv_bn_act
from ..params import ConvParams, ConvUnit
from .module import FusedModule, FusedSequential, called_for_itself

if TYPE_CHECKING:
    from ..engine.builder import Builder
    from ..engine.graph import Value


ACTIVATION_LAYERS = {"none": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU}


def activation_layer(activation: str, negative_slope: float = 0.1) -> nn.Module:
    """The stock layer for the name of an activation."""
    if activation not in ACTIVATION_LAYERS:
        raise ValueError(f"unknown activation {activation!r}, use one of: {', '.join(ACTIVATION_LAYERS)}")
    options = {"none": {}, "leaky_relu": {"negative_slope": negative_slope, "inplace": True}}
    return ACTIVATION_LAYERS[activation](**options.get(activation, {"inplace": True}))


class ConvBNAct(FusedSequential):
    """``nn.Sequential(nn.Conv2d, nn.BatchNorm2d, activation)`` run as one op, with the same parameter names.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: as for ``nn.Conv2d``. The padding is half of
            the kernel.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
        eps, momentum: as for ``nn.BatchNorm2d``.

    Shape: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)) for an odd kernel.
    """

    ff_op = "grouped_conv_bn_act"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        activation: str = "relu",
        negative_slope: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.append(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias))
        self.append(nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum))
        self.append(activation_layer(activation, negative_slope))
        self.activation, self.negative_slope = activation, negative_slope

    def ff_stock(self) -> tuple[type[nn.Module], ...]:
        return nn.Conv2d, nn.BatchNorm2d, ACTIVATION_LAYERS[self.activation]

    def ff_facts(self) -> dict[str, Any]:
        return _facts(self)

    def units(self) -> list[ConvUnit]:
        """This block as part of a chain, for one forward pass."""
        return [ConvUnit(ConvParams.of(self[0]), BatchNorm.of(self[1]), self.activation, self.negative_slope)]

    def forward(self, x: Tensor) -> Tensor:
        if self.ff_layers_run():
            return nn.Sequential.forward(self, x)
        conv, bn = ConvParams.of(self[0]), BatchNorm.of(self[1])
        return grouped_conv_bn_act(x, conv, bn, self.activation, self.negative_slope, policy=self.ff_policy)

    def ff_plan(self, builder: Builder, x: Value) -> Value:
        self.ff_check_stock()
        return builder.conv(x, self[0], self[1], self.activation, self.negative_slope)


class DepthwiseSeparable(FusedSequential):
    """MobileNetV1's block run as one op: 3x3 depthwise, BN, activation, 1x1, BN, activation, without biases.

    Parameter names are those of the ``nn.Sequential`` of these six layers.

    Args:
        in_channels, out_channels: channels before and after the 1x1 convolution.
        stride: of the depthwise convolution.
        activation, negative_slope: as for :class:`ConvBNAct`, after each of the two convolutions.

    Shape: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    ff_op = "depthwise_separable"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        activation: str = "leaky_relu",
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.append(nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False))
        self.append(nn.BatchNorm2d(in_channels))
        self.append(activation_layer(activation, negative_slope))
        self.append(nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.append(nn.BatchNorm2d(out_channels))
        self.append(activation_layer(activation, negative_slope))
        self.activation, self.negative_slope = activation, negative_slope

    def ff_stock(self) -> tuple[type[nn.Module], ...]:
        return 2 * (nn.Conv2d, nn.BatchNorm2d, ACTIVATION_LAYERS[self.activation])

    def ff_facts(self) -> dict[str, Any]:
        return _facts(self)

    def units(self) -> list[ConvUnit]:
        """This block as part of a chain, for one forward pass."""
        rest = self.activation, self.negative_slope
        return [
            ConvUnit(ConvParams.of(self[0]), BatchNorm.of(self[1]), *rest),
            ConvUnit(ConvParams.of(self[3]), BatchNorm.of(self[4]), *rest),
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self.ff_layers_run():
            return nn.Sequential.forward(self, x)
        return depthwise_separable(
            x,
            ConvParams.of(self[0]),
            BatchNorm.of(self[1]),
            ConvParams.of(self[3]),
            BatchNorm.of(self[4]),
            self.activation,
            self.negative_slope,
            policy=self.ff_policy,
        )

    def ff_plan(self, builder: Builder, x: Value) -> Value:
        self.ff_check_stock()
        return builder.depthwise_separable(x, self[0], self[1], self[3], self[4], self.activation, self.negative_slope)


def _facts(module: nn.Module) -> dict[str, Any]:
    """What the registry asks of the convolutions inside a block or a chain."""
    return facts_of([ConvParams.of(layer) for layer in module.modules() if isinstance(layer, nn.Conv2d)])


def _absorbable(block: nn.Module) -> bool:
    """Whether a chain does what the block's own forward does."""
    known = type(block).forward in (ConvBNAct.forward, DepthwiseSeparable.forward)
    return known and not called_for_itself(block) and block.ff_altered() is None


class ConvChain(FusedModule, nn.Sequential):
    """``nn.Sequential`` of :class:`ConvBNAct` and :class:`DepthwiseSeparable` blocks, which fused runs as one op.

    The blocks' own ``forward`` is called where it is plain PyTorch, or where a block is of another class, or it or a
    layer of it has hooks or was replaced.

    Shape: that of the blocks, one after the other.
    """

    ff_op = "conv_chain"

    def __init__(self, *blocks: ConvBNAct | DepthwiseSeparable) -> None:
        super().__init__()
        self.extend(blocks)

    def ff_facts(self) -> dict[str, Any]:
        return _facts(self)

    def ff_absorbed(self) -> Iterable[nn.Module]:
        return () if self._runs_blocks() else self.children()

    def ff_bypassed(self) -> str | None:
        if all(map(_absorbable, self)):
            return None
        return "its blocks are called one by one: one has hooks, or was replaced or altered"

    def _runs_blocks(self) -> bool:
        return self.ff_policy.mode == "0" or not all(map(_absorbable, self))

    def forward(self, x: Tensor) -> Tensor:
        if self._runs_blocks():
            return nn.Sequential.forward(self, x)
        return conv_chain(x, [unit for block in self for unit in block.units()], policy=self.ff_policy)
