"""Drop-in block of a modulated deformable convolution, batch normalisation and activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batch_norm import BatchNorm
from ..ops.deform_conv2d import deform_conv2d
from ..params import ConvParams
from .conv import ACTIVATION_LAYERS, activation_layer
from .module import FusedModule, FusedSequential, called_for_itself, overrides

if TYPE_CHECKING:
    from ..engine.builder import Builder
    from ..engine.graph import Value


class DeformConv(FusedModule):
    """The layers of a DCNv2: where to look (``offset_conv``), how much to trust it (``modulator_conv``), the filter.

    offset = offset_conv(x) in pixels, (dy, dx) per tap; mask = 2 * sigmoid(modulator_conv(x)). Both convolutions start
    from zero, so that the layer begins as ``regular_conv`` alone (Zhu et al. 2019; mask 1 at the start, as V1 has it).

    Args:
        in_channels, out_channels, kernel_size, stride, bias: as for ``nn.Conv2d``; the padding is half the kernel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        taps, padding = kernel_size * kernel_size, kernel_size // 2
        self.offset_conv = nn.Conv2d(in_channels, 2 * taps, kernel_size, stride, padding)
        self.modulator_conv = nn.Conv2d(in_channels, taps, kernel_size, stride, padding)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        for conv in (self.offset_conv, self.modulator_conv):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (B, 2 K, H', W') and mask (B, K, H', W') for the K taps of every output pixel."""
        return self.offset_conv(x), 2 * torch.sigmoid(self.modulator_conv(x))

    def filter(self) -> ConvParams:
        """``regular_conv``, whose parameters are read: it is never called.

        Raises:
            ValueError: a call of it would do something else, as where hooks prune its weight.
        """
        conv = self.regular_conv
        if called_for_itself(conv) or overrides(conv, nn.Conv2d):
            raise ValueError(
                "regular_conv of a deformable convolution is never called, so that its hooks (pruning's, too) or a "
                "forward of its own would not run; remove them (torch.nn.utils.prune.remove) or use a parametrization"
            )
        return ConvParams.of(conv)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution without batch normalisation and activation."""
        return deform_conv2d(x, *self.sampling(x), self.filter(), None, policy=self.ff_policy)


class DeformConvBNAct(FusedSequential):
    """``nn.Sequential(DeformConv, nn.BatchNorm2d, activation)``, everything after the offsets run as one op.

    Args:
        in_channels, out_channels, kernel_size: as for :class:`DeformConv`.
        activation, negative_slope: as for :class:`ffkernels.nn.ConvBNAct`.

    Shape: (B, in_channels, H, W) -> (B, out_channels, H, W).
    """

    ff_op = "deform_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        activation: str = "none",
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        self.append(DeformConv(in_channels, out_channels, kernel_size))
        self.append(nn.BatchNorm2d(out_channels))
        self.append(activation_layer(activation, negative_slope))
        self.activation, self.negative_slope = activation, negative_slope

    def ff_stock(self) -> tuple[type[nn.Module], ...]:
        return DeformConv, nn.BatchNorm2d, ACTIVATION_LAYERS[self.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.ff_layers_run():
            return nn.Sequential.forward(self, x)
        return deform_conv2d(
            x,
            *self[0].sampling(x),
            self[0].filter(),
            BatchNorm.of(self[1]),
            self.activation,
            self.negative_slope,
            policy=self.ff_policy,
        )

    def ff_plan(self, builder: Builder, x: Value) -> Value:
        self.ff_check_stock()
        fields = builder.conv(x, builder.stack([self[0].offset_conv, self[0].modulator_conv]))
        return self.ff_plan_sampled(builder, x, fields, 0)

    def ff_plan_sampled(self, builder: Builder, x: Value, fields: Value, first: int) -> Value:
        """The block where its 27 offsets and modulators are channels ``first`` and on of a map."""
        return builder.deform_conv2d(
            x, fields, first, self[0].regular_conv, self[1], self.activation, self.negative_slope
        )
