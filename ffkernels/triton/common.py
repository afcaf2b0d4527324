"""What the kernels share. Tensors are NHWC: a pixel is a row, a channel a column, ``pixel`` the elements between rows.

``stats`` is (4, C) in float32: mean, biased variance, scale, shift, with ``y = (z - mean) * scale + shift``;
``stats_row`` is the distance between its rows. ``coefficients`` is (2, C) in float32, see :func:`gradient_before`.
Arithmetic is in float32; what is stored is rounded to the tensor's dtype. An absent tensor is ``None``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import triton_interpreter

INTERPRETED = tl.constexpr(triton_interpreter())
NONE, RELU, LEAKY_RELU, SILU = (tl.constexpr(i) for i in range(4))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current for a launch."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Products and sums may be fused: FMA rounds once where the two round twice."""
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def empty_nhwc(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def pixel(x: Tensor) -> int:
    """Elements between neighbouring pixels of an NHWC tensor or of a slice of its channels."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


@triton.jit
def activate(u, slope, ACTIVATION: tl.constexpr):
    """NaN stays NaN."""
    if ACTIVATION == RELU:
        u = tl.where(u < 0, 0.0, u)
    elif ACTIVATION == LEAKY_RELU:
        u = tl.where(u > 0, u, u * slope)
    elif ACTIVATION == SILU:
        u = u / (1.0 + tl.exp(-u))
    return u


@triton.jit
def activation_gradient(g, u, slope, ACTIVATION: tl.constexpr):
    """``g`` times the derivative of the activation at ``u``."""
    if ACTIVATION == RELU:
        g = tl.where(u <= 0, 0.0, g)
    elif ACTIVATION == LEAKY_RELU:
        g = tl.where(u > 0, g, g * slope)
    elif ACTIVATION == SILU:
        s = 1.0 / (1.0 + tl.exp(-u))
        g = g * s * (1.0 + u * (1.0 - s))
    return g


@triton.jit
def normalise(z, stats_ptr, stats_row, channel, mask):
    if stats_ptr is not None:
        mean = tl.load(stats_ptr + channel, mask=mask, other=0.0)
        scale = tl.load(stats_ptr + 2 * stats_row + channel, mask=mask, other=0.0)
        shift = tl.load(stats_ptr + 3 * stats_row + channel, mask=mask, other=0.0)
        z = (z - mean) * scale + shift
    return z


@triton.jit
def load_source(x_ptr, at, mask, stats_ptr, stats_row, channel, channel_mask, slope, ACTIVATION: tl.constexpr):
    """act(normalise(x)) in float32; 0 where ``mask`` is false, which is the padding of a convolution."""
    u = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if stats_ptr is not None:
        u = normalise(u, stats_ptr, stats_row, channel, channel_mask)
    u = activate(u, slope, ACTIVATION)
    if stats_ptr is not None:
        u = tl.where(mask, u, 0.0)
    return u


@triton.jit
def gradient_before(
    grad_ptr,
    grad_pixel,
    z_ptr,
    z_pixel,
    stats_ptr,
    stats_row,
    coefficients_ptr,
    coefficients_row,
    slope,
    at,
    channel,
    mask,
    channel_mask,
    ACTIVATION: tl.constexpr,
):
    """A tile of the gradient of z from that of act(normalise(z)), in float32; 0 where ``mask`` is false.

    ``at`` (n, 1) or (n, channels) are its pixels. With batch statistics of n values, ``coefficients`` holds sum(g) / n
    and sum(g (z - mean)) / (n (var + eps)), and dz = scale (g - first - (z - mean) second); otherwise dz = scale g."""
    channel = channel[None, :]
    channel_mask = channel_mask[None, :]
    g = tl.load(grad_ptr + (at * grad_pixel + channel), mask=mask, other=0.0).to(tl.float32)
    if (ACTIVATION != NONE) or ((stats_ptr is not None) and (coefficients_ptr is not None)):
        z = tl.load(z_ptr + (at * z_pixel + channel), mask=mask, other=0.0).to(tl.float32)
    if stats_ptr is not None:
        scale = tl.load(stats_ptr + 2 * stats_row + channel, mask=channel_mask, other=0.0)
        if (ACTIVATION != NONE) or (coefficients_ptr is not None):
            centred = z - tl.load(stats_ptr + channel, mask=channel_mask, other=0.0)
            if ACTIVATION != NONE:
                shift = tl.load(stats_ptr + 3 * stats_row + channel, mask=channel_mask, other=0.0)
                g = activation_gradient(g, centred * scale + shift, slope, ACTIVATION)
            if coefficients_ptr is not None:
                first = tl.load(coefficients_ptr + channel, mask=channel_mask, other=0.0)
                second = tl.load(coefficients_ptr + coefficients_row + channel, mask=channel_mask, other=0.0)
                g = g - first - centred * second
        g = tl.where(mask, g * scale, 0.0)
    elif ACTIVATION != NONE:
        g = activation_gradient(g, z, slope, ACTIVATION)
    return g


@triton.jit
def program_tile(rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int32) and channels of a program's tile, which channels exist, and which elements do."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel_mask = channel < channels
    return row, channel, channel_mask, (row < rows)[:, None] & channel_mask[None, :]


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in float32. The interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def store_statistics(z, valid, rows, channel, channel_mask, channels, partial_ptr):
    """Pivot, mean less pivot, and squared deviations of a tile's ``rows`` rows of z, for ``statistics_kernel``.

    The pivot, a value of the tile, keeps what float32 can hold of a small variance around a large mean."""
    first = tl.arange(0, z.shape[0]) == 0
    pivot = tl.sum(tl.where(first[:, None], z, 0.0), 0)
    d = tl.where(valid[:, None], z - pivot[None, :], 0.0)
    mean = tl.sum(d, 0) / rows
    d = tl.where(valid[:, None], d - mean[None, :], 0.0)
    squares = tl.sum(d * d, 0)
    at = partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel
    plane = tl.num_programs(0).to(tl.int64) * channels
    tl.store(at, pivot, mask=channel_mask)
    tl.store(at + plane, mean, mask=channel_mask)
    tl.store(at + 2 * plane, squares, mask=channel_mask)


@triton.jit
def store_sums(g, z, stats_ptr, channel, channel_mask, channels, partial_ptr):
    """A tile's sums of g and of g * (z - mean), for ``sums_kernel``; rows that do not count have g = 0.

    An error of these sums falls on all pixels alike, and the next convolution's gradient adds it up: hence float64."""
    if stats_ptr is not None:
        z = z - tl.load(stats_ptr + channel, mask=channel_mask, other=0.0)[None, :]
    at = partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(at, tl.sum(g.to(tl.float64), 0).to(tl.float32), mask=channel_mask)
    tl.store(
        at + tl.num_programs(0).to(tl.int64) * channels,
        tl.sum((g * z).to(tl.float64), 0).to(tl.float32),
        mask=channel_mask,
    )
