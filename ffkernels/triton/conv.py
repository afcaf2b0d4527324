"""Convolutions of NHWC tensors: one launch each for the output, the gradient of the input and that of the weight.

Grouped and dense convolutions are matrix products over pixels (rows) whose inner dimension runs over taps, then input
channels. ``PACK`` neighbouring groups share a tile, with zeros where a group does not read a channel: narrow groups
cost no more than the padding of the matrix unit would. Depthwise convolutions are sums of shifted loads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import Affine, Source, Sums, join_statistics, join_sums
from .blocks import SPLIT, Block, block, power_of_two, splits_of
from .common import (
    activate,
    activation_gradient,
    dot,
    empty_nhwc,
    gradient_before,
    launch,
    load_source,
    normalise,
    pixel,
    pixels,
    program_tile,
    store_statistics,
    store_sums,
)


@triton.jit
def split_depth(start, WIDTH: tl.constexpr, KERNEL: tl.constexpr, DEPTH: tl.constexpr):
    """Row and column of the tap, and the channel, of ``DEPTH`` places in the inner dimension."""
    if WIDTH % DEPTH == 0:
        tap = tl.zeros((DEPTH,), tl.int32) + start // WIDTH
        channel = start % WIDTH + tl.arange(0, DEPTH)
    else:
        at = start + tl.arange(0, DEPTH)
        tap = at // WIDTH
        channel = at % WIDTH
    return tap // KERNEL, tap % KERNEL, channel


@triton.jit
def store_output(
    z,
    row,
    rows,
    channel,
    channel_mask,
    channels,
    bias_ptr,
    z_ptr,
    z_pixel,
    after_ptr,
    after_row,
    after_slope,
    partial_ptr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Bias, then what follows: normalisation and activation with given statistics, or statistics of the tile."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if after_ptr is not None:
        z = normalise(z, after_ptr, after_row, channel[None, :], channel_mask[None, :])
    stored = activate(z, after_slope, AFTER).to(z_ptr.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * z_pixel + channel[None, :]
    tl.store(z_ptr + at, stored, mask=(row < rows)[:, None] & channel_mask[None, :])
    if partial_ptr is not None:
        count = tl.minimum(rows - tl.program_id(0) * ROWS, ROWS)
        store_statistics(stored.to(tl.float32), row < rows, count, channel, channel_mask, channels, partial_ptr)


@triton.jit
def store_input_gradient(
    g,
    row,
    rows,
    channel,
    channel_mask,
    channels,
    x_ptr,
    x_pixel,
    stats_ptr,
    stats_row,
    slope,
    add_ptr,
    add_pixel,
    out_ptr,
    out_pixel,
    partial_ptr,
    ACTIVATION: tl.constexpr,
):
    """The gradient of the activation's argument, and the sums of it that the convolution before needs."""
    at = row.to(tl.int64)[:, None]
    mask = (row < rows)[:, None] & channel_mask[None, :]
    if add_ptr is not None:
        g += tl.load(add_ptr + at * add_pixel + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if (ACTIVATION != 0) or (partial_ptr is not None):
        x = tl.load(x_ptr + at * x_pixel + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            u = normalise(x, stats_ptr, stats_row, channel[None, :], channel_mask[None, :])
            g = activation_gradient(g, u, slope, ACTIVATION)
    stored = g.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * out_pixel + channel[None, :], stored, mask=mask)
    if partial_ptr is not None:
        g = tl.where(mask, stored.to(tl.float32), 0.0)
        store_sums(g, x, stats_ptr, channel, channel_mask, channels, partial_ptr)


@triton.jit
def conv_kernel(
    x_ptr,  # (batch, in_h, in_w, groups * CHANNELS)
    x_pixel,
    stats_ptr,  # (4, groups * CHANNELS) or None: normalises x, activation and slope follow
    stats_row,
    slope,
    weight_ptr,  # (groups * OUTPUTS, CHANNELS, KERNEL, KERNEL)
    bias_ptr,  # (groups * OUTPUTS,) or None
    z_ptr,  # (batch, out_h, out_w, groups * OUTPUTS)
    z_pixel,
    after_ptr,  # (4, groups * OUTPUTS) or None: normalises z before it is stored
    after_row,
    after_slope,
    partial_ptr,  # (3, tiles, groups * OUTPUTS) or None, see store_statistics
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
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL * KERNEL
    WIDTH: tl.constexpr = PACK * CHANNELS
    BLOCKS: tl.constexpr = (PACK * OUTPUTS + COLUMNS - 1) // COLUMNS
    pack = tl.program_id(1) // BLOCKS
    column = tl.program_id(1) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < PACK * OUTPUTS
    channel = pack * (PACK * OUTPUTS) + column
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = row // (out_h * out_w)
    top = row // out_w % out_h * STRIDE - PADDING
    left = row % out_w * STRIDE - PADDING
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, TAPS * WIDTH, DEPTH):
        i, j, c = split_depth(start, WIDTH, KERNEL, DEPTH)
        inner_mask = i < KERNEL
        y = top[:, None] + i[None, :]
        x = left[:, None] + j[None, :]
        mask = (row < rows)[:, None] & inner_mask[None, :] & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
        at = ((image[:, None] * in_h + y) * in_w + x).to(tl.int64) * x_pixel + (pack * WIDTH + c)[None, :]
        a = load_source(
            x_ptr,
            at,
            mask,
            stats_ptr,
            stats_row,
            (pack * WIDTH + c)[None, :],
            inner_mask[None, :],
            slope,
            ACTIVATION,
        ).to(x_ptr.dtype.element_ty)
        own = (column // OUTPUTS)[None, :] == (c // CHANNELS)[:, None]
        b = tl.load(
            weight_ptr + (channel[None, :] * CHANNELS + (c % CHANNELS)[:, None]) * TAPS + (i * KERNEL + j)[:, None],
            mask=own & inner_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = dot(a, b.to(a.dtype), acc)
    store_output(
        acc,
        row,
        rows,
        channel,
        column_mask,
        groups * OUTPUTS,
        bias_ptr,
        z_ptr,
        z_pixel,
        after_ptr,
        after_row,
        after_slope,
        partial_ptr,
        AFTER,
        ROWS,
    )


@triton.jit
def conv_input_gradient_kernel(
    grad_ptr,  # (batch, out_h, out_w, groups * OUTPUTS)
    grad_pixel,
    z_ptr,  # likewise
    z_pixel,
    z_stats_ptr,  # (4, groups * OUTPUTS) or None
    z_stats_row,
    coefficients_ptr,  # (2, groups * OUTPUTS) or None, see gradient_before
    coefficients_row,
    z_slope,
    weight_ptr,  # (groups * OUTPUTS, CHANNELS, KERNEL, KERNEL)
    x_ptr,  # (batch, in_h, in_w, groups * CHANNELS)
    x_pixel,
    stats_ptr,  # (4, groups * CHANNELS) or None
    stats_row,
    slope,
    add_ptr,  # like out, or None: added to the gradient before the activation is undone
    add_pixel,
    out_ptr,  # (batch, in_h, in_w, groups * CHANNELS)
    out_pixel,
    partial_ptr,  # (2, tiles, groups * CHANNELS) or None, see store_sums
    rows,  # batch * in_h * in_w
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
    Z_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL * KERNEL
    WIDTH: tl.constexpr = PACK * OUTPUTS
    BLOCKS: tl.constexpr = (PACK * CHANNELS + COLUMNS - 1) // COLUMNS
    pack = tl.program_id(1) // BLOCKS
    column = tl.program_id(1) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < PACK * CHANNELS
    channel = pack * (PACK * CHANNELS) + column
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = row // (in_h * in_w)
    bottom = row // in_w % in_h + PADDING
    right = row % in_w + PADDING
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, TAPS * WIDTH, DEPTH):
        i, j, o = split_depth(start, WIDTH, KERNEL, DEPTH)
        inner_mask = i < KERNEL
        y = bottom[:, None] - i[None, :]
        x = right[:, None] - j[None, :]
        mask = (row < rows)[:, None] & inner_mask[None, :] & (y >= 0) & (x >= 0)
        if STRIDE > 1:
            mask = mask & (y % STRIDE == 0) & (x % STRIDE == 0)
            y = y // STRIDE
            x = x // STRIDE
        mask = mask & (y < out_h) & (x < out_w)
        at = ((image[:, None] * out_h + y) * out_w + x).to(tl.int64)
        output = pack * WIDTH + o
        a = gradient_before(
            grad_ptr,
            grad_pixel,
            z_ptr,
            z_pixel,
            z_stats_ptr,
            z_stats_row,
            coefficients_ptr,
            coefficients_row,
            z_slope,
            at,
            output,
            mask,
            inner_mask,
            Z_ACTIVATION,
        ).to(grad_ptr.dtype.element_ty)
        own = (column // CHANNELS)[None, :] == (o // OUTPUTS)[:, None]
        b = tl.load(
            weight_ptr + (output[:, None] * CHANNELS + (column % CHANNELS)[None, :]) * TAPS + (i * KERNEL + j)[:, None],
            mask=own & inner_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = dot(a, b.to(a.dtype), acc)
    store_input_gradient(
        acc,
        row,
        rows,
        channel,
        column_mask,
        groups * CHANNELS,
        x_ptr,
        x_pixel,
        stats_ptr,
        stats_row,
        slope,
        add_ptr,
        add_pixel,
        out_ptr,
        out_pixel,
        partial_ptr,
        ACTIVATION,
    )


@triton.jit
def conv_weight_gradient_kernel(
    grad_ptr,  # (batch, out_h, out_w, groups * OUTPUTS)
    grad_pixel,
    z_ptr,  # likewise
    z_pixel,
    z_stats_ptr,  # (4, groups * OUTPUTS) or None
    z_stats_row,
    coefficients_ptr,  # (2, groups * OUTPUTS) or None, see gradient_before
    coefficients_row,
    z_slope,
    x_ptr,  # (batch, in_h, in_w, groups * CHANNELS)
    x_pixel,
    stats_ptr,  # (4, groups * CHANNELS) or None
    stats_row,
    slope,
    partial_ptr,  # (splits, groups * OUTPUTS, CHANNELS, KERNEL, KERNEL), float32
    rows,  # batch * out_h * out_w
    split_rows,  # rows that one program sums
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
    Z_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL * KERNEL
    WIDTH: tl.constexpr = PACK * CHANNELS
    BLOCKS: tl.constexpr = (PACK * OUTPUTS + ROWS - 1) // ROWS
    pack = tl.program_id(1) // BLOCKS
    o = tl.program_id(1) % BLOCKS * ROWS + tl.arange(0, ROWS)
    o_mask = o < PACK * OUTPUTS
    output = pack * (PACK * OUTPUTS) + o
    i, j, c = split_depth(tl.program_id(0) * COLUMNS, WIDTH, KERNEL, COLUMNS)
    c_mask = i < KERNEL
    channel = pack * WIDTH + c
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(2) * split_rows
    for start in range(first, tl.minimum(first + split_rows, rows), DEPTH):
        row = start + tl.arange(0, DEPTH)
        row_mask = row < rows
        at = row.to(tl.int64)[:, None]
        a = gradient_before(
            grad_ptr,
            grad_pixel,
            z_ptr,
            z_pixel,
            z_stats_ptr,
            z_stats_row,
            coefficients_ptr,
            coefficients_row,
            z_slope,
            at,
            output,
            row_mask[:, None] & o_mask[None, :],
            o_mask,
            Z_ACTIVATION,
        ).to(grad_ptr.dtype.element_ty)
        y = (row // out_w % out_h * STRIDE - PADDING)[:, None] + i[None, :]
        x = (row % out_w * STRIDE - PADDING)[:, None] + j[None, :]
        mask = row_mask[:, None] & c_mask[None, :] & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
        at = (((row // (out_h * out_w))[:, None] * in_h + y) * in_w + x).to(tl.int64) * x_pixel + channel[None, :]
        b = load_source(x_ptr, at, mask, stats_ptr, stats_row, channel[None, :], c_mask[None, :], slope, ACTIVATION).to(
            grad_ptr.dtype.element_ty
        )
        acc = dot(tl.trans(a), b, acc)
    own = (o // OUTPUTS)[:, None] == (c // CHANNELS)[None, :]
    size = groups * OUTPUTS * CHANNELS * TAPS
    at = (output[:, None] * CHANNELS + (c % CHANNELS)[None, :]) * TAPS + (i * KERNEL + j)[None, :]
    tl.store(partial_ptr + tl.program_id(2).to(tl.int64) * size + at, acc, mask=own & o_mask[:, None] & c_mask[None, :])


@triton.jit
def depthwise_sum(
    x_ptr,
    x_pixel,
    stats_ptr,
    stats_row,
    slope,
    weight_ptr,
    row,
    rows,
    channel,
    channel_mask,
    in_h,
    in_w,
    out_h,
    out_w,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A tile of a depthwise convolution, rows by channels, in float32."""
    image = row // (out_h * out_w) * in_h
    top = row // out_w % out_h * STRIDE - PADDING
    left = row % out_w * STRIDE - PADDING
    acc = tl.zeros((row.shape[0], channel.shape[0]), tl.float32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            y = top + i
            x = left + j
            mask = (row < rows) & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
            at = ((image + y) * in_w + x).to(tl.int64)[:, None] * x_pixel + channel[None, :]
            u = load_source(
                x_ptr,
                at,
                mask[:, None] & channel_mask[None, :],
                stats_ptr,
                stats_row,
                channel[None, :],
                channel_mask[None, :],
                slope,
                ACTIVATION,
            )
            w = tl.load(weight_ptr + channel * (KERNEL * KERNEL) + (i * KERNEL + j), mask=channel_mask, other=0.0)
            acc += u * w.to(tl.float32)[None, :]
    return acc


@triton.jit
def depthwise_kernel(
    x_ptr,  # (batch, in_h, in_w, channels)
    x_pixel,
    stats_ptr,  # (4, channels) or None
    stats_row,
    slope,
    weight_ptr,  # (channels, 1, KERNEL, KERNEL)
    bias_ptr,  # (channels,) or None
    z_ptr,  # (batch, out_h, out_w, channels)
    z_pixel,
    after_ptr,  # (4, channels) or None
    after_row,
    after_slope,
    partial_ptr,  # (3, tiles, channels) or None
    rows,  # batch * out_h * out_w
    in_h,
    in_w,
    out_h,
    out_w,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, channel_mask, _ = program_tile(rows, channels, ROWS, COLUMNS)
    acc = depthwise_sum(
        x_ptr,
        x_pixel,
        stats_ptr,
        stats_row,
        slope,
        weight_ptr,
        row,
        rows,
        channel,
        channel_mask,
        in_h,
        in_w,
        out_h,
        out_w,
        KERNEL,
        STRIDE,
        PADDING,
        ACTIVATION,
    )
    store_output(
        acc,
        row,
        rows,
        channel,
        channel_mask,
        channels,
        bias_ptr,
        z_ptr,
        z_pixel,
        after_ptr,
        after_row,
        after_slope,
        partial_ptr,
        AFTER,
        ROWS,
    )


@triton.jit
def depthwise_input_gradient_kernel(
    grad_ptr,  # (batch, out_h, out_w, channels)
    grad_pixel,
    z_ptr,  # likewise
    z_pixel,
    z_stats_ptr,  # (4, channels) or None
    z_stats_row,
    coefficients_ptr,  # (2, channels) or None
    coefficients_row,
    z_slope,
    weight_ptr,  # (channels, 1, KERNEL, KERNEL)
    x_ptr,  # (batch, in_h, in_w, channels)
    x_pixel,
    stats_ptr,  # (4, channels) or None
    stats_row,
    slope,
    add_ptr,  # like out, or None
    add_pixel,
    out_ptr,  # (batch, in_h, in_w, channels)
    out_pixel,
    partial_ptr,  # (2, tiles, channels) or None
    rows,  # batch * in_h * in_w
    in_h,
    in_w,
    out_h,
    out_w,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    Z_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, channel_mask, _ = program_tile(rows, channels, ROWS, COLUMNS)
    image = row // (in_h * in_w) * out_h
    bottom = row // in_w % in_h + PADDING
    right = row % in_w + PADDING
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            y = bottom - i
            x = right - j
            mask = (row < rows) & (y >= 0) & (x >= 0)
            if STRIDE > 1:
                mask = mask & (y % STRIDE == 0) & (x % STRIDE == 0)
                y = y // STRIDE
                x = x // STRIDE
            mask = mask & (y < out_h) & (x < out_w)
            at = ((image + y) * out_w + x).to(tl.int64)[:, None]
            g = gradient_before(
                grad_ptr,
                grad_pixel,
                z_ptr,
                z_pixel,
                z_stats_ptr,
                z_stats_row,
                coefficients_ptr,
                coefficients_row,
                z_slope,
                at,
                channel,
                mask[:, None] & channel_mask[None, :],
                channel_mask,
                Z_ACTIVATION,
            )
            w = tl.load(weight_ptr + channel * (KERNEL * KERNEL) + (i * KERNEL + j), mask=channel_mask, other=0.0)
            acc += g * w.to(tl.float32)[None, :]
    store_input_gradient(
        acc,
        row,
        rows,
        channel,
        channel_mask,
        channels,
        x_ptr,
        x_pixel,
        stats_ptr,
        stats_row,
        slope,
        add_ptr,
        add_pixel,
        out_ptr,
        out_pixel,
        partial_ptr,
        ACTIVATION,
    )


@triton.jit
def depthwise_weight_gradient_kernel(
    grad_ptr,  # (batch, out_h, out_w, channels)
    grad_pixel,
    z_ptr,  # likewise
    z_pixel,
    z_stats_ptr,  # (4, channels) or None
    z_stats_row,
    coefficients_ptr,  # (2, channels) or None
    coefficients_row,
    z_slope,
    x_ptr,  # (batch, in_h, in_w, channels)
    x_pixel,
    stats_ptr,  # (4, channels) or None
    stats_row,
    slope,
    partial_ptr,  # (splits, channels, KERNEL, KERNEL), float32
    rows,  # batch * out_h * out_w
    split_rows,  # rows that one program sums
    in_h,
    in_w,
    out_h,
    out_w,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TAPS: tl.constexpr,  # a power of two that holds KERNEL * KERNEL
    Z_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel_mask = channel < channels
    tap = tl.arange(0, TAPS)
    acc = tl.zeros((TAPS, COLUMNS), tl.float32)
    first = tl.program_id(0) * split_rows
    for start in range(first, tl.minimum(first + split_rows, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None]
        g = gradient_before(
            grad_ptr,
            grad_pixel,
            z_ptr,
            z_pixel,
            z_stats_ptr,
            z_stats_row,
            coefficients_ptr,
            coefficients_row,
            z_slope,
            at,
            channel,
            (row < rows)[:, None] & channel_mask[None, :],
            channel_mask,
            Z_ACTIVATION,
        )
        image = row // (out_h * out_w) * in_h
        top = row // out_w % out_h * STRIDE - PADDING
        left = row % out_w * STRIDE - PADDING
        for i in tl.static_range(KERNEL):
            for j in tl.static_range(KERNEL):
                y = top + i
                x = left + j
                mask = (row < rows) & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
                at = ((image + y) * in_w + x).to(tl.int64)[:, None] * x_pixel + channel[None, :]
                u = load_source(
                    x_ptr,
                    at,
                    mask[:, None] & channel_mask[None, :],
                    stats_ptr,
                    stats_row,
                    channel[None, :],
                    channel_mask[None, :],
                    slope,
                    ACTIVATION,
                )
                acc += tl.where((tap == i * KERNEL + j)[:, None], tl.sum(g * u, 0)[None, :], 0.0)
    at = (tl.program_id(0) * channels + channel)[None, :] * (KERNEL * KERNEL) + tap[:, None]
    tl.store(partial_ptr + at, acc, mask=(tap < KERNEL * KERNEL)[:, None] & channel_mask[None, :])


@triton.jit
def join_kernel(
    partial_ptr,  # (parts, size), float32
    out_ptr,  # (size,)
    parts,
    size,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over parts in a fixed order, in float64."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (at < size)[None, :]
        value = tl.load(partial_ptr + part.to(tl.int64)[:, None] * size + at[None, :], mask=inside, other=0.0)
        total += tl.sum(value.to(tl.float64), 0)
    tl.store(out_ptr + at, total.to(tl.float32).to(out_ptr.dtype.element_ty), mask=at < size)


class Geometry(NamedTuple):
    """Stride, padding and groups of a square convolution.

    Groups that share a tile meet in zeros, and zero times NaN is NaN; ``pack`` False keeps a NaN within its group.
    """

    stride: int = 1
    padding: int = 0
    groups: int = 1
    pack: bool = True

    def output(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        kernel = weight.shape[2]
        height, width = ((n + 2 * self.padding - kernel) // self.stride + 1 for n in x.shape[2:])
        return x.shape[0], weight.shape[0], height, width


class Output(NamedTuple):
    """The output of a convolution with a gradient in front of it, see :func:`gradient_before`."""

    grad: Tensor
    source: Source
    coefficients: Tensor | None = None

    def arguments(self) -> tuple:
        z, stats = self.source.x, self.source.stats
        row = 0 if self.coefficients is None else self.coefficients.stride(0)
        return (
            self.grad,
            pixel(self.grad),
            z,
            pixel(z),
            stats,
            self.source.stats_row,
            self.coefficients,
            row,
            self.source.slope,
        )


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    return weight.shape[1] == 1 and weight.shape[0] == geometry.groups


def pack(geometry: Geometry, columns: int) -> int:
    """How many groups of ``columns`` columns share a tile: a divisor of the groups, 16 columns in all at most."""
    groups = geometry.groups if geometry.pack else 1
    return max(n for n in range(1, groups + 1) if geometry.groups % n == 0 and (n == 1 or n * columns <= 16))


class Plan(NamedTuple):
    """How a convolution or the gradient of its input is launched: ``blocks`` programs for every tile of rows."""

    kernel: object
    size: Block
    blocks: int
    constants: dict[str, int]


def plan(weight: Tensor, geometry: Geometry, backward: bool) -> Plan:
    kernel, groups = weight.shape[2], geometry.groups
    constants = {"KERNEL": kernel, "STRIDE": geometry.stride, "PADDING": geometry.padding}
    if is_depthwise(weight, geometry):
        size = block("depthwise", weight, groups)
        chosen = depthwise_input_gradient_kernel if backward else depthwise_kernel
        blocks = triton.cdiv(groups, size.columns)
    else:
        channels, outputs = weight.shape[1], weight.shape[0] // groups
        columns, terms = (channels, outputs) if backward else (outputs, channels)
        shared = pack(geometry, columns)
        size = block("conv", weight, shared * columns, shared * terms * kernel * kernel)
        chosen = conv_input_gradient_kernel if backward else conv_kernel
        blocks = groups // shared * triton.cdiv(shared * columns, size.columns)
        constants |= {"CHANNELS": channels, "OUTPUTS": outputs, "PACK": shared, "DEPTH": size.depth}
    return Plan(chosen, size, blocks, constants | {"ROWS": size.rows, "COLUMNS": size.columns})


def source_arguments(source: Source) -> tuple:
    return source.x, pixel(source.x), source.stats, source.stats_row, source.slope


def conv_forward(
    source: Source,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    out: Tensor | None = None,
    affine: Affine | None = None,
    stats: Tensor | None = None,
    after: Source | None = None,
) -> Tensor:
    """z = conv(source), into ``out`` where given; where ``affine`` is given, ``stats`` (4, O) becomes z's statistics.

    ``after`` gives the stats and activation to apply before z is stored; its ``x`` is not read.
    """
    x = source.x
    shape = geometry.output(x, weight)
    z = empty_nhwc(shape, x) if out is None else out
    rows = pixels(z)
    kernel, size, blocks, constants = plan(weight, geometry, backward=False)
    tiles = triton.cdiv(rows, size.rows)
    partial = None
    if affine is not None:
        partial = torch.empty((3, tiles, shape[1]), dtype=torch.float32, device=x.device)
    launch(
        kernel,
        (tiles, blocks),
        *source_arguments(source),
        weight,
        bias,
        z,
        pixel(z),
        None if after is None else after.stats,
        0 if after is None else after.stats_row,
        0.0 if after is None else after.slope,
        partial,
        rows,
        *x.shape[2:],
        *shape[2:],
        geometry.groups,
        ACTIVATION=source.activation,
        AFTER=0 if after is None else after.activation,
        warps=size.warps,
        stages=size.stages,
        **constants,
    )
    if affine is not None:
        join_statistics(partial, size.rows, rows, affine, stats)
    return z


def conv_input_gradient(
    output: Output,
    weight: Tensor,
    geometry: Geometry,
    source: Source,
    out: Tensor,
    *,
    add: Tensor | None = None,
    sums_for: tuple[float, bool] | None = None,
) -> Sums | None:
    """``out`` becomes the gradient of the argument of ``source.activation``, after ``add`` is added to that of its
    result; ``sums_for`` (eps, batch statistics) of the normalisation of ``source.x`` asks for its sums.
    """
    x = source.x
    rows = pixels(x)
    kernel, size, blocks, constants = plan(weight, geometry, backward=True)
    tiles = triton.cdiv(rows, size.rows)
    partial = None
    if sums_for is not None:
        partial = torch.empty((2, tiles, x.shape[1]), dtype=torch.float32, device=x.device)
    launch(
        kernel,
        (tiles, blocks),
        *output.arguments(),
        weight,
        *source_arguments(source),
        add,
        0 if add is None else pixel(add),
        out,
        pixel(out),
        partial,
        rows,
        *x.shape[2:],
        *output.grad.shape[2:],
        geometry.groups,
        Z_ACTIVATION=output.source.activation,
        ACTIVATION=source.activation,
        warps=size.warps,
        stages=size.stages,
        **constants,
    )
    return None if sums_for is None else join_sums(partial, rows, source, *sums_for)


def conv_weight_gradient(output: Output, weight: Tensor, geometry: Geometry, source: Source) -> Tensor:
    rows, groups, kernel = pixels(output.grad), geometry.groups, weight.shape[2]
    constants = {"KERNEL": kernel, "STRIDE": geometry.stride, "PADDING": geometry.padding}
    splits, each = splits_of(rows)
    if is_depthwise(weight, geometry):
        size = block("depthwise", weight, groups)
        chosen, grid = depthwise_weight_gradient_kernel, (splits, triton.cdiv(groups, size.columns))
        constants["TAPS"] = power_of_two(kernel * kernel, 1)
    else:
        channels, outputs = weight.shape[1], weight.shape[0] // groups
        shared = pack(geometry, outputs)
        size = block("weight_gradient", weight, shared * channels * kernel * kernel, SPLIT)
        size = size._replace(rows=min(size.rows, power_of_two(shared * outputs)))
        chosen = conv_weight_gradient_kernel
        columns = triton.cdiv(shared * channels * kernel * kernel, size.columns)
        grid = (columns, groups // shared * triton.cdiv(shared * outputs, size.rows), splits)
        constants |= {"CHANNELS": channels, "OUTPUTS": outputs, "PACK": shared, "DEPTH": size.depth}
    partial = torch.empty((splits, *weight.shape), dtype=torch.float32, device=weight.device)
    launch(
        chosen,
        grid,
        *output.arguments(),
        *source_arguments(source),
        partial,
        rows,
        each,
        *source.x.shape[2:],
        *output.grad.shape[2:],
        groups,
        Z_ACTIVATION=output.source.activation,
        ACTIVATION=source.activation,
        ROWS=size.rows,
        COLUMNS=size.columns,
        warps=size.warps,
        stages=size.stages,
        **constants,
    )
    return join(partial, weight.dtype)


def join(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, ...) in float32 -> their sum, in ``dtype``."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    columns = 64
    launch(
        join_kernel,
        (triton.cdiv(out.numel(), columns),),
        partial,
        out,
        partial.shape[0],
        out.numel(),
        PARTS=32,
        COLUMNS=columns,
    )
    return out
