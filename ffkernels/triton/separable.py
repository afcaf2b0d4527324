"""A depthwise convolution and the pointwise one behind it, each with given statistics and activation, as one kernel.

The map between the two stays in registers: a tile of it, rounded to the tensor's dtype, is the left factor of a matrix
product. Programs of other output channels compute it again, so that tiles are as wide as registers allow.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.conv_chain import Link
from .batch_norm import Source
from .blocks import block
from .common import activate, dot, empty_nhwc, launch, normalise, pixel, pixels
from .conv import Geometry, depthwise_sum, is_depthwise, pack, source_arguments, store_output


@triton.jit
def separable_kernel(
    x_ptr,  # (batch, in_h, in_w, groups * CHANNELS)
    x_pixel,
    stats_ptr,  # (4, groups * CHANNELS) or None: normalises x, activation and slope follow
    stats_row,
    slope,
    depthwise_ptr,  # (groups * CHANNELS, 1, KERNEL, KERNEL)
    depthwise_bias_ptr,  # (groups * CHANNELS,) or None
    middle_ptr,  # (4, groups * CHANNELS) or None: normalises the map between, activation and slope follow
    middle_row,
    middle_slope,
    weight_ptr,  # (groups * OUTPUTS, CHANNELS, 1, 1)
    bias_ptr,  # (groups * OUTPUTS,) or None
    z_ptr,  # (batch, out_h, out_w, groups * OUTPUTS)
    z_pixel,
    after_ptr,  # (4, groups * OUTPUTS) or None: normalises z, activation and slope follow
    after_row,
    after_slope,
    rows,  # batch * out_h * out_w
    in_h,
    in_w,
    out_h,
    out_w,
    groups,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PACK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MIDDLE: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    WIDTH: tl.constexpr = PACK * CHANNELS
    BLOCKS: tl.constexpr = (PACK * OUTPUTS + COLUMNS - 1) // COLUMNS
    pack = tl.program_id(1) // BLOCKS
    column = tl.program_id(1) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < PACK * OUTPUTS
    output = pack * (PACK * OUTPUTS) + column
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        c = start + tl.arange(0, DEPTH)
        inner_mask = c < WIDTH
        channel = pack * WIDTH + c
        u = depthwise_sum(
            x_ptr,
            x_pixel,
            stats_ptr,
            stats_row,
            slope,
            depthwise_ptr,
            row,
            rows,
            channel,
            inner_mask,
            in_h,
            in_w,
            out_h,
            out_w,
            KERNEL,
            STRIDE,
            PADDING,
            ACTIVATION,
        )
        if depthwise_bias_ptr is not None:
            u += tl.load(depthwise_bias_ptr + channel, mask=inner_mask, other=0.0).to(tl.float32)[None, :]
        u = normalise(u, middle_ptr, middle_row, channel[None, :], inner_mask[None, :])
        a = activate(u, middle_slope, MIDDLE).to(x_ptr.dtype.element_ty)
        mask = inner_mask[:, None] & column_mask[None, :]
        if PACK > 1:
            mask = mask & ((column // OUTPUTS)[None, :] == (c // CHANNELS)[:, None])
            c = c % CHANNELS
        b = tl.load(weight_ptr + output[None, :] * CHANNELS + c[:, None], mask=mask, other=0.0)
        acc = dot(a, b.to(a.dtype), acc)
    store_output(
        acc,
        row,
        rows,
        output,
        column_mask,
        groups * OUTPUTS,
        bias_ptr,
        z_ptr,
        z_pixel,
        after_ptr,
        after_row,
        after_slope,
        None,
        AFTER,
        ROWS,
    )


def fits(depthwise: Link, pointwise: Link) -> bool:
    """Whether one kernel serves both links: 3x3 at most, 1x1, and no statistics of a batch in the way."""
    kernel, groups = depthwise.weight.shape[2], pointwise.groups
    return (
        is_depthwise(depthwise.weight, Geometry(groups=depthwise.groups))
        and kernel <= 3
        and pointwise.weight.shape[1:] != (1, 1, 1)
        and (pointwise.weight.shape[2], pointwise.stride, pointwise.padding) == (1, 1, 0)
        and groups * pointwise.weight.shape[1] == depthwise.groups
        and not (depthwise.batch_statistics or pointwise.batch_statistics)
    )


def separable_forward(source: Source, depthwise: Link, middle: Source, pointwise: Link, after: Source) -> Tensor:
    """``middle`` and ``after`` give stats and activation behind the two convolutions; their ``x`` is not read."""
    x, weight = source.x, pointwise.weight
    kernel, groups = depthwise.weight.shape[2], pointwise.groups
    shape = Geometry(depthwise.stride, depthwise.padding).output(x, depthwise.weight)
    z = empty_nhwc((shape[0], weight.shape[0], *shape[2:]), x)
    channels, outputs = weight.shape[1], weight.shape[0] // groups
    shared = pack(Geometry(groups=groups), outputs)
    size = block("separable", weight, shared * outputs, shared * channels)
    launch(
        separable_kernel,
        (triton.cdiv(pixels(z), size.rows), groups // shared * triton.cdiv(shared * outputs, size.columns)),
        *source_arguments(source),
        depthwise.weight,
        depthwise.bias,
        middle.stats,
        middle.stats_row,
        middle.slope,
        weight,
        pointwise.bias,
        z,
        pixel(z),
        after.stats,
        after.stats_row,
        after.slope,
        pixels(z),
        *x.shape[2:],
        *z.shape[2:],
        groups,
        CHANNELS=channels,
        OUTPUTS=outputs,
        KERNEL=kernel,
        STRIDE=depthwise.stride,
        PADDING=depthwise.padding,
        PACK=shared,
        ACTIVATION=source.activation,
        MIDDLE=middle.activation,
        AFTER=after.activation,
        ROWS=size.rows,
        COLUMNS=size.columns,
        DEPTH=size.depth,
        warps=size.warps,
        stages=size.stages,
    )
    return z
