"""Calls into csrc/cpu/grouped_conv_bn_act.cpp and batch_norm.cpp as parts of a plan.

``stats`` of C channels is (4, C): mean, biased variance, scale, shift, with ``y = (z - mean) * scale + shift``.
``sums`` is (2, C) in float64: the sums of g and of g * (z - mean), g the gradient of y.
"""

from __future__ import annotations

from typing import NamedTuple

from ..ops.conv_chain import Link
from .plan import At, Map, Plan


class Operand(NamedTuple):
    """A map as a convolution reads it: act((x - mean) * scale + shift); without stats and activation, x itself."""

    x: Map
    stats: At | None = None
    activation: int = 0
    slope: float = 0.0

    @property
    def plain(self) -> bool:
        return self.stats is None and self.activation == 0


class Conv(NamedTuple):
    """A convolution's weight, its shape (O, C / groups, k, k), and geometry.

    Outputs from ``split`` on (None: none) are those of a second convolution with as many groups.
    """

    weight: At
    shape: tuple[int, ...]
    bias: At | None = None
    stride: int = 1
    padding: int = 0
    groups: int = 1
    split: int | None = None

    @classmethod
    def of(cls, link: Link, shape: tuple[int, ...]) -> Conv:
        return cls(link.weight, shape, link.bias, link.stride, link.padding, link.groups)

    def numbers(self, x: Map) -> tuple[int, ...]:
        outputs = self.shape[0]
        return (*x.shape, outputs, self.shape[2], self.stride, self.padding, self.groups, self.split or outputs)

    def output(self, x: tuple[int, ...]) -> tuple[int, int, int, int]:
        kernel = self.shape[2]
        height, width = ((n + 2 * self.padding - kernel) // self.stride + 1 for n in x[2:])
        return x[0], self.shape[0], height, width


def sums_of(plan: Plan, channels: int) -> At:
    return plan.scratch(2 * channels * 8)


def forward(
    plan: Plan,
    source: Operand,
    conv: Conv,
    z: Map,
    *,
    stats: At | None = None,
    bn: tuple[At | None, At | None, float] = (None, None, 0.0),
    after: Operand | None = None,
) -> None:
    """z = conv(source), and its ``stats`` for the normalisation ``bn`` (weight, bias, eps) where given.

    ``after`` gives the stats and activation to apply before z is stored; its ``x`` is not read.
    """
    numbers = conv.numbers(source.x)
    size = plan.native.ff_cpu_conv_workspace(0, *numbers, plan.dtype, plan.threads)
    plan.call(
        "ff_cpu_conv_forward",
        source.x.at,
        source.x.pixel,
        source.stats,
        source.activation,
        source.slope,
        conv.weight,
        conv.bias,
        z.at,
        stats,
        *bn,
        after.stats if after else None,
        after.activation if after else 0,
        after.slope if after else 0.0,
        *numbers,
        plan.workspace(size),
    )


def backward(
    plan: Plan,
    grad: Map,
    output: Operand,
    sums: At | None,
    eps: float,
    source: Operand,
    conv: Conv,
    *,
    grad_x: Map | None,
    grad_weight: At | None,
    x_sums: At | None = None,
) -> None:
    """The backward pass of :func:`forward`; fills ``grad_x``, ``grad_weight`` and ``x_sums``.

    ``grad`` is the gradient of the normalisation's output, or of ``output.activation`` behind it where that is not 0.
    ``output.x`` is z and ``output.stats`` its statistics (None: no normalisation); ``sums`` is None unless those were
    the batch's own. ``grad_x`` is the gradient of the argument of ``source.activation``.
    """
    numbers = conv.numbers(source.x)
    size = plan.native.ff_cpu_conv_workspace(1, *numbers, plan.dtype, plan.threads)
    plan.call(
        "ff_cpu_conv_backward",
        grad.at,
        grad.pixel,
        output.x.at,
        output.x.pixel,
        output.stats,
        sums,
        int(sums is not None),
        output.activation,
        output.slope,
        eps,
        source.x.at,
        source.x.pixel,
        source.stats,
        source.activation,
        source.slope,
        conv.weight,
        None if grad_x is None else grad_x.at,
        0 if grad_x is None else grad_x.pixel,
        x_sums,
        grad_weight,
        *numbers,
        plan.workspace(size),
    )


def given_stats(plan: Plan, link: Link, channels: int, stats: At) -> None:
    """``stats`` of a link's running statistics."""
    plan.call_single(
        "ff_cpu_batch_norm_coefficients",
        link.running_mean,
        link.running_var,
        link.bn_weight,
        link.bn_bias,
        link.eps,
        channels,
        stats,
    )


def apply(plan: Plan, source: Operand, out: Map) -> None:
    """out = act((x - mean) * scale + shift) of a dense map; ``out`` may be it."""
    z = source.x
    plan.call(
        "ff_cpu_batch_norm_apply",
        z.at,
        source.stats,
        source.activation,
        source.slope,
        out.at,
        z.pixels,
        z.shape[1],
        plan.workspace(plan.native.ff_cpu_batch_norm_workspace(z.shape[1], plan.dtype, plan.threads)),
    )


def reduce(plan: Plan, grad: Map, output: Operand) -> At:
    """``sums`` of g = grad * act'(y), y = (z - mean) * scale + shift."""
    z = output.x
    sums = sums_of(plan, z.shape[1])
    plan.call(
        "ff_cpu_batch_norm_reduce",
        grad.at,
        z.at,
        output.stats,
        output.activation,
        output.slope,
        None,
        sums,
        z.pixels,
        z.shape[1],
        plan.workspace(plan.native.ff_cpu_batch_norm_workspace(z.shape[1], plan.dtype, plan.threads)),
    )
    return sums


def affine_gradients(
    plan: Plan, link: Link, stats: At | None, row: int, sums: At, sums_row: int, channels: int, grads: list[At | None]
) -> None:
    """Gradients of bias, bn_weight and bn_bias of a link, into the three of ``grads`` that are there.

    The gradient of a bias whose mean is subtracted is zero and not written: see :func:`zero_gradient`."""
    bias, bn_weight, bn_bias = grads
    bias = None if link.batch_statistics else bias
    if bias or bn_weight or bn_bias:
        plan.call_single(
            "ff_cpu_batch_norm_gradients",
            sums,
            sums_row,
            stats,
            row,
            link.eps,
            channels,
            bn_weight,
            bn_bias,
            bias,
        )
