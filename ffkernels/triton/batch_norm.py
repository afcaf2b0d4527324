"""Batch normalisation around the convolutions: statistics, sums of gradients, and the pass that ends a chain."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block, power_of_two
from .common import (
    activation_gradient,
    launch,
    load_source,
    normalise,
    pixel,
    pixels,
    program_tile,
    store_sums,
)


class Source(NamedTuple):
    """A tensor as kernels read it: act((x - mean) * scale + shift); without stats and activation, x itself.

    ``x`` is channels_last, or a slice of the channels of such a tensor; ``stats`` may be sliced likewise.
    """

    x: Tensor
    stats: Tensor | None = None
    activation: int = 0
    slope: float = 0.0

    @property
    def plain(self) -> bool:
        return self.stats is None and self.activation == 0

    @property
    def stats_row(self) -> int:
        return 0 if self.stats is None else self.stats.stride(0)


@triton.jit
def statistics_kernel(
    partial_ptr,  # (3, tiles, channels): pivot, mean less pivot, squared deviations
    weight_ptr,  # (channels,) or None
    bias_ptr,  # (channels,) or None
    stats_ptr,  # (4, channels)
    stats_row,
    tiles,
    rows,  # of every tile but the last
    total,  # rows of all tiles
    channels,
    eps,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Joins the statistics of tiles in a fixed order, in float64."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    plane = tiles * channels
    total_sum = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = partial_ptr + tile[:, None] * channels + channel[None, :]
        inside = (tile < tiles)[:, None] & mask[None, :]
        count = tl.minimum(total - tile * rows, rows).to(tl.float64)[:, None]
        mean = tl.load(at, mask=inside, other=0.0).to(tl.float64) + tl.load(at + plane, mask=inside, other=0.0)
        total_sum += tl.sum(tl.where(inside, mean * count, 0.0), 0)
    joint = total_sum / total
    squares = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = partial_ptr + tile[:, None] * channels + channel[None, :]
        inside = (tile < tiles)[:, None] & mask[None, :]
        count = tl.minimum(total - tile * rows, rows).to(tl.float64)[:, None]
        mean = tl.load(at, mask=inside, other=0.0).to(tl.float64) + tl.load(at + plane, mask=inside, other=0.0)
        d = mean - joint[None, :]
        within = tl.load(at + 2 * plane, mask=inside, other=0.0).to(tl.float64)
        squares += tl.sum(tl.where(inside, within + d * d * count, 0.0), 0)
    var = squares / total
    store_coefficients(joint, var, weight_ptr, bias_ptr, stats_ptr, stats_row, channel, mask, eps)


@triton.jit
def given_statistics_kernel(
    mean_ptr,  # (channels,)
    var_ptr,  # (channels,)
    weight_ptr,  # (channels,) or None
    bias_ptr,  # (channels,) or None
    stats_ptr,  # (4, channels)
    stats_row,
    channels,
    eps,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    mean = tl.load(mean_ptr + channel, mask=mask, other=0.0).to(tl.float64)
    var = tl.load(var_ptr + channel, mask=mask, other=1.0).to(tl.float64)
    store_coefficients(mean, var, weight_ptr, bias_ptr, stats_ptr, stats_row, channel, mask, eps)


@triton.jit
def store_coefficients(mean, var, weight_ptr, bias_ptr, stats_ptr, stats_row, channel, mask, eps):
    """The shift makes up for the rounding of the mean to float32."""
    scale = 1.0 / tl.sqrt(var + eps)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float64)
    rounded = mean.to(tl.float32)
    shift = (rounded.to(tl.float64) - mean) * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float64)
    at = stats_ptr + channel
    tl.store(at, rounded, mask=mask)
    tl.store(at + stats_row, var.to(tl.float32), mask=mask)
    tl.store(at + 2 * stats_row, scale.to(tl.float32), mask=mask)
    tl.store(at + 3 * stats_row, shift.to(tl.float32), mask=mask)


@triton.jit
def sums_kernel(
    partial_ptr,  # (2, tiles, channels): sums of g and of g * (z - mean)
    stats_ptr,  # (4, channels) or None
    stats_row,
    sums_ptr,  # (2, channels), float64
    coefficients_ptr,  # (2, channels) or None, see gradient_before
    tiles,
    total,  # values per channel
    channels,
    eps,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Joins the sums of tiles in a fixed order, in float64."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    first = tl.zeros((COLUMNS,), tl.float64)
    second = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = partial_ptr + tile[:, None] * channels + channel[None, :]
        inside = (tile < tiles)[:, None] & mask[None, :]
        first += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), 0)
        second += tl.sum(tl.load(at + tiles * channels, mask=inside, other=0.0).to(tl.float64), 0)
    tl.store(sums_ptr + channel, first, mask=mask)
    tl.store(sums_ptr + channels + channel, second, mask=mask)
    if coefficients_ptr is not None:
        var = tl.load(stats_ptr + stats_row + channel, mask=mask, other=1.0).to(tl.float64)
        tl.store(coefficients_ptr + channel, (first / total).to(tl.float32), mask=mask)
        second /= total * (var + eps)
        tl.store(coefficients_ptr + channels + channel, second.to(tl.float32), mask=mask)


@triton.jit
def apply_kernel(
    x_ptr,  # (rows, channels)
    x_pixel,
    stats_ptr,  # (4, channels) or None
    stats_row,
    slope,
    y_ptr,  # (rows, channels)
    y_pixel,
    rows,
    channels,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, channel_mask, mask = program_tile(rows, channels, ROWS, COLUMNS)
    row = row.to(tl.int64)[:, None]
    y = load_source(
        x_ptr,
        row * x_pixel + channel[None, :],
        mask,
        stats_ptr,
        stats_row,
        channel[None, :],
        channel_mask[None, :],
        slope,
        ACTIVATION,
    )
    tl.store(y_ptr + row * y_pixel + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    grad_ptr,  # (rows, channels)
    grad_pixel,
    z_ptr,  # (rows, channels)
    z_pixel,
    stats_ptr,  # (4, channels) or None
    stats_row,
    slope,
    partial_ptr,  # (2, tiles, channels)
    rows,
    channels,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, channel_mask, mask = program_tile(rows, channels, ROWS, COLUMNS)
    row = row.to(tl.int64)[:, None]
    g = tl.load(grad_ptr + row * grad_pixel + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_pixel + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != 0:
        u = normalise(z, stats_ptr, stats_row, channel[None, :], channel_mask[None, :])
        g = activation_gradient(g, u, slope, ACTIVATION)
    store_sums(g, z, stats_ptr, channel, channel_mask, channels, partial_ptr)


TILES = 64
"""Tiles that the kernels which join them read at once."""


class Affine(NamedTuple):
    """Weight and bias of a batch normalisation, and its eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def join_statistics(partial: Tensor, rows: int, total: int, affine: Affine, stats: Tensor) -> None:
    """Writes ``stats`` from what :func:`store_statistics` left of tiles of ``rows`` rows."""
    tiles, channels = partial.shape[1:]
    columns = min(16, power_of_two(channels))
    launch(
        statistics_kernel,
        (triton.cdiv(channels, columns),),
        partial,
        affine.weight,
        affine.bias,
        stats,
        stats.stride(0),
        tiles,
        rows,
        total,
        channels,
        affine.eps,
        TILES=TILES,
        COLUMNS=columns,
    )


def given_statistics(mean: Tensor, var: Tensor, affine: Affine, stats: Tensor | None = None) -> Tensor:
    """``stats`` from running statistics."""
    channels = mean.shape[0]
    if stats is None:
        stats = torch.empty((4, channels), dtype=torch.float32, device=mean.device)
    columns = 64
    grid = (triton.cdiv(channels, columns),)
    launch(
        given_statistics_kernel,
        grid,
        mean,
        var,
        affine.weight,
        affine.bias,
        stats,
        stats.stride(0),
        channels,
        affine.eps,
        COLUMNS=columns,
    )
    return stats


class Sums(NamedTuple):
    """Sums of g and of g * (z - mean), (2, C) in float64, and the coefficients of :func:`gradient_before`."""

    sums: Tensor
    coefficients: Tensor | None


def join_sums(partial: Tensor, total: int, output: Source, eps: float, batch_statistics: bool) -> Sums:
    """Sums over all tiles; ``total`` values per channel."""
    tiles, channels = partial.shape[1:]
    sums = torch.empty((2, channels), dtype=torch.float64, device=partial.device)
    coefficients = partial.new_empty((2, channels)) if batch_statistics else None
    columns = min(16, power_of_two(channels))
    launch(
        sums_kernel,
        (triton.cdiv(channels, columns),),
        partial,
        output.stats,
        output.stats_row,
        sums,
        coefficients,
        tiles,
        total,
        channels,
        eps,
        TILES=TILES,
        COLUMNS=columns,
    )
    return Sums(sums, coefficients)


def reduce(grad: Tensor, output: Source, eps: float, batch_statistics: bool) -> Sums:
    """Sums where ``grad`` is the gradient of ``output.activation``'s result and ``output.x`` is z."""
    rows, channels = pixels(grad), grad.shape[1]
    size = block("reduction", grad, channels)
    tiles = triton.cdiv(rows, size.rows)
    partial = torch.empty((2, tiles, channels), dtype=torch.float32, device=grad.device)
    launch(
        reduce_kernel,
        (tiles, triton.cdiv(channels, size.columns)),
        grad,
        pixel(grad),
        output.x,
        pixel(output.x),
        output.stats,
        output.stats_row,
        output.slope,
        partial,
        rows,
        channels,
        ACTIVATION=output.activation,
        ROWS=size.rows,
        COLUMNS=size.columns,
        warps=size.warps,
    )
    return join_sums(partial, rows, output, eps, batch_statistics)


def apply(source: Source, out: Tensor) -> Tensor:
    """``out``, which may be ``source.x``, becomes what ``source`` describes."""
    rows, channels = pixels(out), out.shape[1]
    size = block("elementwise", out, channels)
    launch(
        apply_kernel,
        (triton.cdiv(rows, size.rows), triton.cdiv(channels, size.columns)),
        source.x,
        pixel(source.x),
        source.stats,
        source.stats_row,
        source.slope,
        out,
        pixel(out),
        rows,
        channels,
        ACTIVATION=source.activation,
        ROWS=size.rows,
        COLUMNS=size.columns,
        warps=size.warps,
    )
    return out
