"""Modulated deformable convolution in Triton: matrix products over pixels whose left factor is sampled as it is loaded.

The gradient of x scatters, in an order that nobody knows. It is summed in 64-bit integers, whose sum does not depend on
the order, in a unit that the largest summand decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..fixed_point import scatter_sum
from ..ops.conv_chain import Link, nhwc
from .batch_norm import Source, apply, given_statistics, join_statistics, reduce
from .blocks import SPLIT, block, power_of_two, splits_of
from .common import dot, empty_nhwc, gradient_before, launch, on_device, pixel, pixels
from .conv import Output, join, store_output
from .conv_chain import affine_of


@triton.jit
def position(offset_ptr, row, row_mask, tap, in_h, in_w, out_h, out_w, KERNEL, STRIDE, PADDING):
    """Top left neighbour of where a tap reads, and the weights of the lower and the right ones."""
    at = offset_ptr + row.to(tl.int64) * (2 * KERNEL * KERNEL) + 2 * tap
    y = tl.load(at, mask=row_mask, other=0.0).to(tl.float32)
    x = tl.load(at + 1, mask=row_mask, other=0.0).to(tl.float32)
    y += (row // out_w % out_h * STRIDE - PADDING + tap // KERNEL).to(tl.float32)
    x += (row % out_w * STRIDE - PADDING + tap % KERNEL).to(tl.float32)
    top = tl.floor(y)
    left = tl.floor(x)
    i = tl.minimum(tl.maximum(top, -2.0), in_h + 1.0).to(tl.int32)
    j = tl.minimum(tl.maximum(left, -2.0), in_w + 1.0).to(tl.int32)
    return i, j, y - top, x - left


@triton.jit
def corner(image, i, j, in_h, in_w, row_mask):
    """The pixel at i, j, and whether it lies inside the image."""
    return ((image * in_h + i) * in_w + j).to(tl.int64), row_mask & (i >= 0) & (i < in_h) & (j >= 0) & (j < in_w)


@triton.jit
def load_corner(x_ptr, image, i, j, in_h, in_w, row_mask, channel, channel_mask, channels):
    at, inside = corner(image, i, j, in_h, in_w, row_mask)
    mask = inside[:, None] & channel_mask[None, :]
    return tl.load(x_ptr + at[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sample(x_ptr, image, i, j, below, right, in_h, in_w, row_mask, channel, channel_mask, channels):
    """Bilinear values, rows by channels."""
    a = load_corner(x_ptr, image, i, j, in_h, in_w, row_mask, channel, channel_mask, channels)
    b = load_corner(x_ptr, image, i, j + 1, in_h, in_w, row_mask, channel, channel_mask, channels)
    c = load_corner(x_ptr, image, i + 1, j, in_h, in_w, row_mask, channel, channel_mask, channels)
    d = load_corner(x_ptr, image, i + 1, j + 1, in_h, in_w, row_mask, channel, channel_mask, channels)
    upper = a * (1.0 - right)[:, None] + b * right[:, None]
    lower = c * (1.0 - right)[:, None] + d * right[:, None]
    return upper * (1.0 - below)[:, None] + lower * below[:, None]


@triton.jit
def deform_kernel(
    x_ptr,  # (batch, in_h, in_w, channels)
    offset_ptr,  # (batch, out_h, out_w, 2 * KERNEL * KERNEL)
    mask_ptr,  # (batch, out_h, out_w, KERNEL * KERNEL)
    weight_ptr,  # (outputs, channels, KERNEL, KERNEL)
    bias_ptr,  # (outputs,) or None
    z_ptr,  # (batch, out_h, out_w, outputs)
    z_pixel,
    after_ptr,  # (4, outputs) or None: normalises z before it is stored
    after_row,
    after_slope,
    partial_ptr,  # (3, tiles, outputs) or None, see store_statistics
    rows,  # batch * out_h * out_w
    in_h,
    in_w,
    out_h,
    out_w,
    channels,
    outputs,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = row < rows
    image = row // (out_h * out_w)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tap in range(KERNEL * KERNEL):
        i, j, below, right = position(offset_ptr, row, row_mask, tap, in_h, in_w, out_h, out_w, KERNEL, STRIDE, PADDING)
        factor = tl.load(mask_ptr + row.to(tl.int64) * (KERNEL * KERNEL) + tap, mask=row_mask, other=0.0)
        for start in range(0, channels, DEPTH):
            c = start + tl.arange(0, DEPTH)
            a = sample(x_ptr, image, i, j, below, right, in_h, in_w, row_mask, c, c < channels, channels)
            a = tl.where((c < channels)[None, :], a * factor.to(tl.float32)[:, None], 0.0).to(x_ptr.dtype.element_ty)
            b = tl.load(
                weight_ptr + (output[None, :] * channels + c[:, None]) * (KERNEL * KERNEL) + tap,
                mask=(c < channels)[:, None] & (output < outputs)[None, :],
                other=0.0,
            )
            acc = dot(a, b, acc)
    store_output(
        acc,
        row,
        rows,
        output,
        output < outputs,
        outputs,
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
def deform_sample_gradient_kernel(
    grad_ptr,  # (batch, out_h, out_w, outputs), followed by what gradient_before needs
    grad_pixel,
    z_ptr,
    z_pixel,
    z_stats_ptr,
    z_stats_row,
    coefficients_ptr,
    coefficients_row,
    z_slope,
    x_ptr,  # (batch, in_h, in_w, channels)
    offset_ptr,  # (batch, out_h, out_w, 2 * KERNEL * KERNEL)
    mask_ptr,  # (batch, out_h, out_w, KERNEL * KERNEL)
    weight_ptr,  # (outputs, channels, KERNEL, KERNEL)
    grad_offset_ptr,  # like offset
    grad_mask_ptr,  # like mask
    largest_ptr,  # (programs,): the largest summand of the gradient of x
    scale_ptr,  # () or None: units per 1; with it, the gradient of x is summed and nothing else is written
    sum_ptr,  # (batch, in_h, in_w, channels), int64, or None
    rows,  # batch * out_h * out_w
    in_h,
    in_w,
    out_h,
    out_w,
    channels,
    outputs,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    Z_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tap = tl.program_id(1)
    row_mask = row < rows
    image = row // (out_h * out_w)
    i, j, below, right = position(offset_ptr, row, row_mask, tap, in_h, in_w, out_h, out_w, KERNEL, STRIDE, PADDING)
    mask_at = row.to(tl.int64) * (KERNEL * KERNEL) + tap
    factor = tl.load(mask_ptr + mask_at, mask=row_mask, other=0.0).to(tl.float32)
    grad_mask = tl.zeros((ROWS,), tl.float32)
    grad_y = tl.zeros((ROWS,), tl.float32)
    grad_x = tl.zeros((ROWS,), tl.float32)
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        g = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, outputs, DEPTH):
            o = first + tl.arange(0, DEPTH)
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
                o,
                row_mask[:, None] & (o < outputs)[None, :],
                o < outputs,
                Z_ACTIVATION,
            ).to(grad_ptr.dtype.element_ty)
            b = tl.load(
                weight_ptr + (o[:, None] * channels + c[None, :]) * (KERNEL * KERNEL) + tap,
                mask=(o < outputs)[:, None] & (c < channels)[None, :],
                other=0.0,
            )
            g = dot(a, b, g)
        if scale_ptr is None:
            upper_left = load_corner(x_ptr, image, i, j, in_h, in_w, row_mask, c, c < channels, channels)
            upper_right = load_corner(x_ptr, image, i, j + 1, in_h, in_w, row_mask, c, c < channels, channels)
            lower_left = load_corner(x_ptr, image, i + 1, j, in_h, in_w, row_mask, c, c < channels, channels)
            lower_right = load_corner(x_ptr, image, i + 1, j + 1, in_h, in_w, row_mask, c, c < channels, channels)
            upper = upper_left + (upper_right - upper_left) * right[:, None]
            lower = lower_left + (lower_right - lower_left) * right[:, None]
            side = (upper_right - upper_left) * (1.0 - below)[:, None]
            side += (lower_right - lower_left) * below[:, None]
            grad_mask += tl.sum(g * (upper + (lower - upper) * below[:, None]), 1)
            grad_y += tl.sum(g * (lower - upper), 1)
            grad_x += tl.sum(g * side, 1)
            size = tl.abs(g * factor[:, None])
            largest = tl.maximum(largest, tl.max(tl.where(size == size, size, float("inf")), 1))
        else:
            scale = tl.load(scale_ptr)
            g = g * factor[:, None]
            for k in tl.static_range(4):
                vertical = below if k // 2 else 1.0 - below
                horizontal = right if k % 2 else 1.0 - right
                at, inside = corner(image, i + k // 2, j + k % 2, in_h, in_w, row_mask)
                value = (g * (vertical * horizontal)[:, None]).to(tl.float64) * scale
                tl.atomic_add(
                    sum_ptr + at[:, None] * channels + c[None, :],
                    value.to(tl.int64),
                    mask=inside[:, None] & (c < channels)[None, :],
                    sem="relaxed",
                )
    if scale_ptr is None:
        tl.store(grad_mask_ptr + mask_at, grad_mask.to(grad_mask_ptr.dtype.element_ty), mask=row_mask)
        at = grad_offset_ptr + 2 * mask_at
        tl.store(at, (grad_y * factor).to(grad_offset_ptr.dtype.element_ty), mask=row_mask)
        tl.store(at + 1, (grad_x * factor).to(grad_offset_ptr.dtype.element_ty), mask=row_mask)
        tl.store(largest_ptr + tl.program_id(0) * (KERNEL * KERNEL) + tap, tl.max(largest, 0))


@triton.jit
def deform_weight_gradient_kernel(
    grad_ptr,  # (batch, out_h, out_w, outputs), followed by what gradient_before needs
    grad_pixel,
    z_ptr,
    z_pixel,
    z_stats_ptr,
    z_stats_row,
    coefficients_ptr,
    coefficients_row,
    z_slope,
    x_ptr,  # (batch, in_h, in_w, channels)
    offset_ptr,  # (batch, out_h, out_w, 2 * KERNEL * KERNEL)
    mask_ptr,  # (batch, out_h, out_w, KERNEL * KERNEL)
    partial_ptr,  # (splits, outputs, channels, KERNEL, KERNEL), float32
    rows,  # batch * out_h * out_w
    split_rows,  # rows that one program sums
    in_h,
    in_w,
    out_h,
    out_w,
    channels,
    outputs,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    Z_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tap = tl.program_id(0) % (KERNEL * KERNEL)
    c = tl.program_id(0) // (KERNEL * KERNEL) * COLUMNS + tl.arange(0, COLUMNS)
    o = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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
            o,
            row_mask[:, None] & (o < outputs)[None, :],
            o < outputs,
            Z_ACTIVATION,
        ).to(grad_ptr.dtype.element_ty)
        i, j, below, right = position(offset_ptr, row, row_mask, tap, in_h, in_w, out_h, out_w, KERNEL, STRIDE, PADDING)
        factor = tl.load(mask_ptr + row.to(tl.int64) * (KERNEL * KERNEL) + tap, mask=row_mask, other=0.0)
        b = sample(x_ptr, row // (out_h * out_w), i, j, below, right, in_h, in_w, row_mask, c, c < channels, channels)
        acc = dot(tl.trans(a), (b * factor.to(tl.float32)[:, None]).to(a.dtype), acc)
    size = outputs * channels * (KERNEL * KERNEL)
    at = (o[:, None] * channels + c[None, :]) * (KERNEL * KERNEL) + tap
    mask = (o < outputs)[:, None] & (c < channels)[None, :]
    tl.store(partial_ptr + tl.program_id(2).to(tl.int64) * size + at, acc, mask=mask)


def _constants(link: Link) -> dict[str, int]:
    return {"KERNEL": link.weight.shape[2], "STRIDE": link.stride, "PADDING": link.padding}


def forward(x: Tensor, offset: Tensor, mask: Tensor, link: Link, save: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output (NHWC), its ``stats``, and the raw output z of the convolution, which may be the output itself."""
    with on_device(x):
        x, offset, mask = nhwc(x), nhwc(offset), nhwc(mask)
        outputs, channels = link.weight.shape[:2]
        z = empty_nhwc((x.shape[0], outputs, *offset.shape[2:]), x)
        rows = pixels(z)
        size = block("deform", x, outputs, channels)
        tiles = triton.cdiv(rows, size.rows)
        stats = partial = after = None
        if link.given_statistics:
            stats = given_statistics(link.running_mean, link.running_var, affine_of(link))
        if link.batch_statistics:
            stats = torch.empty((4, outputs), dtype=torch.float32, device=x.device)
            partial = stats.new_empty((3, tiles, outputs))
        elif not save:
            after = stats
        at_once = not save and not link.batch_statistics
        launch(
            deform_kernel,
            (tiles, triton.cdiv(outputs, size.columns)),
            *(x, offset, mask, link.weight, link.bias, z, pixel(z)),
            after,
            0 if after is None else after.stride(0),
            link.slope,
            partial,
            rows,
            *x.shape[2:],
            *z.shape[2:],
            channels,
            outputs,
            AFTER=link.activation if at_once else 0,
            ROWS=size.rows,
            COLUMNS=size.columns,
            DEPTH=size.depth,
            warps=size.warps,
            stages=size.stages,
            **_constants(link),
        )
        if partial is not None:
            join_statistics(partial, size.rows, rows, affine_of(link), stats)
        source = Source(z, stats, link.activation, link.slope)
        if at_once or source.plain:
            return z, stats, z
        return apply(source, empty_nhwc(z.shape, z) if save else z), stats, z


def backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    link: Link,
    stats: Tensor | None,
    z: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, offset, mask, weight, bias, bn_weight, bn_bias, those that ``needs`` marks."""
    with on_device(x):
        grad, x, offset, mask = nhwc(grad), nhwc(x), nhwc(offset), nhwc(mask)
        output = Source(grad if z is None else z, stats, link.activation, link.slope)
        joined = None
        if link.batch_statistics or any(needs[4:]):
            joined = reduce(grad, output, link.eps, link.batch_statistics)
        behind = Output(grad, output, None if joined is None else joined.coefficients)
        grads: list[Tensor | None] = [None] * 7
        if any(needs[:3]):
            grads[:3] = _sample_gradients(behind, x, offset, mask, link, needs[0])
        if needs[3]:
            grads[3] = _weight_gradient(behind, x, offset, mask, link)
        if joined is not None:
            grads[4:] = link_gradients(link, stats, joined.sums, needs[4:])
        return [g for g, needed in zip(grads, needs) if needed]


def _sample_gradients(
    behind: Output, x: Tensor, offset: Tensor, mask: Tensor, link: Link, needs_x: bool
) -> list[Tensor | None]:
    outputs, channels = link.weight.shape[:2]
    rows, taps = pixels(offset), mask.shape[1]
    size = block("deform", x, channels, outputs)
    tiles = triton.cdiv(rows, size.rows)
    grad_offset, grad_mask = torch.empty_like(offset), torch.empty_like(mask)
    largest = torch.empty(tiles * taps, dtype=torch.float32, device=x.device)

    def run(scale: Tensor | None, total: Tensor | None) -> None:
        launch(
            deform_sample_gradient_kernel,
            (tiles, taps),
            *behind.arguments(),
            *(x, offset, mask, link.weight, grad_offset, grad_mask, largest, scale, total),
            rows,
            *x.shape[2:],
            *offset.shape[2:],
            channels,
            outputs,
            Z_ACTIVATION=behind.source.activation,
            ROWS=size.rows,
            COLUMNS=size.columns,
            DEPTH=size.depth,
            warps=size.warps,
            stages=size.stages,
            **_constants(link),
        )

    run(None, None)
    if not needs_x:
        return [None, grad_offset, grad_mask]
    return [scatter_sum(x, largest, 4 * rows * taps, run), grad_offset, grad_mask]


def _weight_gradient(behind: Output, x: Tensor, offset: Tensor, mask: Tensor, link: Link) -> Tensor:
    outputs, channels = link.weight.shape[:2]
    rows, taps = pixels(offset), mask.shape[1]
    size = block("deform", x, channels, SPLIT)
    output_rows = min(size.rows, power_of_two(outputs))
    splits, each = splits_of(rows)
    partial = torch.empty((splits, *link.weight.shape), dtype=torch.float32, device=x.device)
    launch(
        deform_weight_gradient_kernel,
        (taps * triton.cdiv(channels, size.columns), triton.cdiv(outputs, output_rows), splits),
        *behind.arguments(),
        *(x, offset, mask, partial, rows, each),
        *x.shape[2:],
        *offset.shape[2:],
        channels,
        outputs,
        Z_ACTIVATION=behind.source.activation,
        ROWS=output_rows,
        COLUMNS=size.columns,
        DEPTH=size.depth,
        warps=size.warps,
        stages=size.stages,
        **_constants(link),
    )
    return join(partial, link.weight.dtype)
