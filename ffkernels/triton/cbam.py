"""Channel and spatial attention in Triton. The convolution of the spatial maps and its normalisation are those of conv.

Everything but x, the output and their gradients is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..cuda.cbam import _link, _updated
from ..ops.cbam import Application
from ..ops.conv_chain import nhwc
from .batch_norm import Source, given_statistics, reduce
from .blocks import block, power_of_two
from .common import empty_nhwc, launch, normalise, on_device, pixels
from .conv import Output, conv_forward, conv_input_gradient, conv_weight_gradient
from .conv_chain import affine_of, geometry_of

PIXELS = 1024
"""Most pixels of an image that one program of a sum over pixels reads."""


@triton.jit
def hidden_layer(v, weight_ptr, bias_ptr, h, width, column, mask):
    """Neuron h of the first layer for every chunk of v, (CHUNKS, WIDTH), before its ReLU."""
    w = tl.load(weight_ptr + h * width + column, mask=mask, other=0.0)
    a = tl.sum(v * w, 1)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + h)
    return a


@triton.jit
def group_tile(rows, each, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's group, its rows, the group's ``each`` channels, and which elements exist."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    return group, row, group * each + column, (row < rows)[:, None] & (column < each)


@triton.jit
def chunk_tile(chunks, width, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a chunk and which exist, channels of all chunks, (CHUNKS, WIDTH), and which exist."""
    column = tl.arange(0, WIDTH)[None, :]
    column_mask = column < width
    chunk = tl.arange(0, CHUNKS)[:, None]
    return column, column_mask, chunk * width + column, (chunk < chunks) & column_mask


@triton.jit
def load_gated_gradient(grad_ptr, y_ptr, at, mask):
    """The gradient in front of the ReLU that ended the op, if one did (``y`` is its result)."""
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        g = tl.where(tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) <= 0, 0.0, g)
    return g


@triton.jit
def pool_kernel(
    x_ptr,  # (batch, pixels, channels)
    partial_ptr,  # (2, tiles, batch, channels): sum and maximum
    pixels,
    batch,
    channels,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel_mask = channel < channels
    image = tl.program_id(2)
    total = tl.zeros((COLUMNS,), tl.float32)
    most = tl.full((COLUMNS,), float("-inf"), tl.float32)
    first = tl.program_id(0) * SPAN
    for start in range(first, tl.minimum(first + SPAN, pixels), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & channel_mask[None, :]
        at = (image.to(tl.int64) * pixels + row)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        most = tl.maximum(most, tl.max(tl.where(mask, x, float("-inf")), 0))
    at = (tl.program_id(0) * batch + image) * channels + channel
    tl.store(partial_ptr + at, total, mask=channel_mask)
    tl.store(partial_ptr + tl.num_programs(0) * batch * channels + at, most, mask=channel_mask)


@triton.jit
def gate_kernel(
    partial_ptr,  # (2, tiles, batch, chunks * width)
    fc1_weight_ptr,  # (hidden, width)
    fc1_bias_ptr,  # (hidden,) or None
    fc2_weight_ptr,  # (width, hidden)
    fc2_bias_ptr,  # (width,) or None
    pooled_ptr,  # (2, batch, chunks * width): mean and maximum
    gate_ptr,  # (batch, chunks * width)
    tiles,
    pixels,
    chunks,
    width,
    hidden,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Joins the tiles of one image and applies the MLP."""
    image, batch = tl.program_id(0), tl.num_programs(0)
    column, column_mask, channel, mask = chunk_tile(chunks, width, CHUNKS, WIDTH)
    channels = chunks * width
    mean = tl.zeros((CHUNKS, WIDTH), tl.float32)
    most = tl.full((CHUNKS, WIDTH), float("-inf"), tl.float32)
    for tile in range(tiles):
        at = partial_ptr + (tile * batch + image) * channels + channel
        mean += tl.load(at, mask=mask, other=0.0)
        most = tl.maximum(most, tl.load(at + tiles * batch * channels, mask=mask, other=0.0))
    mean = mean / pixels
    most = tl.where(mask, most, 0.0)
    at = image * channels + channel
    tl.store(pooled_ptr + at, mean, mask=mask)
    tl.store(pooled_ptr + batch * channels + at, most, mask=mask)
    logit = tl.zeros((CHUNKS, WIDTH), tl.float32)
    if fc2_bias_ptr is not None:
        logit += 2.0 * tl.load(fc2_bias_ptr + column, mask=column_mask, other=0.0)
    for h in range(hidden):
        a = hidden_layer(mean, fc1_weight_ptr, fc1_bias_ptr, h, width, column, column_mask)
        b = hidden_layer(most, fc1_weight_ptr, fc1_bias_ptr, h, width, column, column_mask)
        both = tl.where(a < 0, 0.0, a) + tl.where(b < 0, 0.0, b)
        logit += both[:, None] * tl.load(fc2_weight_ptr + column * hidden + h, mask=column_mask, other=0.0)
    tl.store(gate_ptr + at, 1.0 / (1.0 + tl.exp(-logit)), mask=mask)


@triton.jit
def maps_kernel(
    x_ptr,  # (rows, channels)
    gate_ptr,  # (batch, channels)
    maps_ptr,  # (rows, 2 * groups)
    rows,
    pixels,
    channels,
    each,  # channels per group
    ORDER: tl.constexpr,  # 1 puts the maximum first
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, row, channel, mask = group_tile(rows, each, ROWS, COLUMNS)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * channels + channel, mask=mask, other=0.0).to(tl.float32)
    u = x * tl.load(gate_ptr + (row // pixels)[:, None] * channels + channel, mask=mask, other=0.0)
    at = maps_ptr + (row.to(tl.int64) * tl.num_programs(1) + group) * 2
    tl.store(at + ORDER, tl.sum(u, 1) / each, mask=row < rows)
    tl.store(at + (1 - ORDER), tl.max(tl.where(mask, u, float("-inf")), 1), mask=row < rows)


@triton.jit
def attend_kernel(
    x_ptr,  # (rows, channels)
    gate_ptr,  # (batch, channels)
    z_ptr,  # (rows, groups)
    stats_ptr,  # (4, groups)
    stats_row,
    residual_ptr,  # (rows, channels) or None
    spatial_ptr,  # (rows, groups)
    y_ptr,  # (rows, channels)
    rows,
    pixels,
    channels,
    each,
    ACTIVATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, row, channel, mask = group_tile(rows, each, ROWS, COLUMNS)
    at = row.to(tl.int64)[:, None] * channels + channel
    spatial_at = row.to(tl.int64) * tl.num_programs(1) + group
    z = tl.load(z_ptr + spatial_at, mask=row < rows, other=0.0)
    s = 1.0 / (1.0 + tl.exp(-normalise(z, stats_ptr, stats_row, group, group >= 0)))
    tl.store(spatial_ptr + spatial_at, s, mask=row < rows)
    gate = tl.load(gate_ptr + (row // pixels)[:, None] * channels + channel, mask=mask, other=0.0)
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * gate * s[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATE:
        y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def spatial_gradient_kernel(
    grad_ptr,  # (rows, channels)
    y_ptr,  # (rows, channels) or None
    x_ptr,  # (rows, channels)
    gate_ptr,  # (batch, channels)
    maps_ptr,  # (rows, 2 * groups)
    spatial_ptr,  # (rows, groups)
    out_ptr,  # (rows, groups): the gradient in front of the sigmoid
    shares_ptr,  # (rows, groups): what each of several maxima of a group takes of the maximum's gradient
    rows,
    pixels,
    channels,
    each,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, row, channel, mask = group_tile(rows, each, ROWS, COLUMNS)
    at = row.to(tl.int64)[:, None] * channels + channel
    spatial_at = row.to(tl.int64) * tl.num_programs(1) + group
    g = load_gated_gradient(grad_ptr, y_ptr, at, mask)
    gate = tl.load(gate_ptr + (row // pixels)[:, None] * channels + channel, mask=mask, other=0.0)
    u = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * gate
    s = tl.load(spatial_ptr + spatial_at, mask=row < rows, other=0.0)
    most = tl.load(maps_ptr + 2 * spatial_at + (1 - ORDER), mask=row < rows, other=0.0)
    count = tl.sum(tl.where(mask & (u == most[:, None]), 1.0, 0.0), 1)
    tl.store(out_ptr + spatial_at, tl.sum(g * u, 1) * s * (1.0 - s), mask=row < rows)
    tl.store(shares_ptr + spatial_at, 1.0 / count, mask=row < rows)


@triton.jit
def gated_gradient(
    g, x, gate, row, mask, maps_ptr, grad_maps_ptr, spatial_ptr, shares_ptr, group, groups, each, ORDER: tl.constexpr
):
    """The gradient of u = x * gate: through the product with the spatial gate, the mean and the maximum."""
    at = row.to(tl.int64) * groups + group
    s = tl.load(spatial_ptr + at, mask=mask, other=0.0)
    share = tl.load(shares_ptr + at, mask=mask, other=0.0)
    most = tl.load(maps_ptr + 2 * at + (1 - ORDER), mask=mask, other=0.0)
    grad_mean = tl.load(grad_maps_ptr + 2 * at + ORDER, mask=mask, other=0.0)
    grad_most = tl.load(grad_maps_ptr + 2 * at + (1 - ORDER), mask=mask, other=0.0)
    du = g * s[:, None] + (grad_mean / each)[:, None]
    return du + tl.where(x * gate == most[:, None], (grad_most * share)[:, None], 0.0)


@triton.jit
def channel_sums_kernel(
    grad_ptr,  # (batch, pixels, channels)
    y_ptr,  # likewise, or None
    x_ptr,  # likewise
    gate_ptr,  # (batch, channels)
    pooled_ptr,  # (2, batch, channels)
    maps_ptr,  # (batch, pixels, 2 * groups)
    grad_maps_ptr,  # likewise
    spatial_ptr,  # (batch, pixels, groups)
    shares_ptr,  # likewise
    partial_ptr,  # (2, tiles, batch, channels): sums of du * x, numbers of maxima
    pixels,
    batch,
    channels,
    each,
    ORDER: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(1)
    image = tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    column_mask = column < each
    channel = group * each + column
    gate = tl.load(gate_ptr + image * channels + channel, mask=column_mask, other=0.0)[None, :]
    most = tl.load(pooled_ptr + (batch + image) * channels + channel, mask=column_mask, other=0.0)[None, :]
    total = tl.zeros((COLUMNS,), tl.float32)
    count = tl.zeros((COLUMNS,), tl.float32)
    first = tl.program_id(0) * SPAN
    for start in range(first, tl.minimum(first + SPAN, pixels), ROWS):
        at = start + tl.arange(0, ROWS)
        row = image * pixels + at
        mask = (at < pixels)[:, None] & column_mask[None, :]
        place = row.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        g = load_gated_gradient(grad_ptr, y_ptr, place, mask)
        du = gated_gradient(
            g,
            x,
            gate,
            row,
            at < pixels,
            maps_ptr,
            grad_maps_ptr,
            spatial_ptr,
            shares_ptr,
            group,
            tl.num_programs(1),
            each,
            ORDER,
        )
        total += tl.sum(du * x, 0)
        count += tl.sum(tl.where(mask & (x == most), 1.0, 0.0), 0)
    at = (tl.program_id(0) * batch + image) * channels + channel
    tl.store(partial_ptr + at, total, mask=column_mask)
    tl.store(partial_ptr + tl.num_programs(0) * batch * channels + at, count, mask=column_mask)


@triton.jit
def gate_gradient_kernel(
    partial_ptr,  # (2, tiles, batch, chunks * width), see channel_sums_kernel
    pooled_ptr,  # (2, batch, chunks * width)
    gate_ptr,  # (batch, chunks * width)
    fc1_weight_ptr,  # (hidden, width)
    fc1_bias_ptr,  # (hidden,) or None
    fc2_weight_ptr,  # (width, hidden)
    logit_ptr,  # (batch, chunks * width): the gradient of the MLP's output
    out_ptr,  # (2, batch, chunks * width): what every pixel, and every maximum, adds to the gradient of x
    tiles,
    pixels,
    chunks,
    width,
    hidden,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    image, batch = tl.program_id(0), tl.num_programs(0)
    column, column_mask, channel, mask = chunk_tile(chunks, width, CHUNKS, WIDTH)
    channels = chunks * width
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    count = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for tile in range(tiles):
        at = partial_ptr + (tile * batch + image) * channels + channel
        total += tl.load(at, mask=mask, other=0.0)
        count += tl.load(at + tiles * batch * channels, mask=mask, other=0.0)
    at = image * channels + channel
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
    mean = tl.load(pooled_ptr + at, mask=mask, other=0.0)
    most = tl.load(pooled_ptr + batch * channels + at, mask=mask, other=0.0)
    logit = total * gate * (1.0 - gate)
    tl.store(logit_ptr + at, logit, mask=mask)
    grad_mean = tl.zeros((CHUNKS, WIDTH), tl.float32)
    grad_most = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for h in range(hidden):
        w1 = tl.load(fc1_weight_ptr + h * width + column, mask=column_mask, other=0.0)
        w2 = tl.load(fc2_weight_ptr + column * hidden + h, mask=column_mask, other=0.0)
        back = tl.sum(logit * w2, 1)
        a = hidden_layer(mean, fc1_weight_ptr, fc1_bias_ptr, h, width, column, column_mask)
        b = hidden_layer(most, fc1_weight_ptr, fc1_bias_ptr, h, width, column, column_mask)
        grad_mean += tl.where(a <= 0, 0.0, back)[:, None] * w1
        grad_most += tl.where(b <= 0, 0.0, back)[:, None] * w1
    tl.store(out_ptr + at, grad_mean / pixels, mask=mask)
    tl.store(out_ptr + batch * channels + at, grad_most / count, mask=mask)


@triton.jit
def mlp_gradient_kernel(
    logit_ptr,  # (batch, chunks * width)
    pooled_ptr,  # (2, batch, chunks * width)
    fc1_weight_ptr,  # (hidden, width)
    fc1_bias_ptr,  # (hidden,) or None
    fc2_weight_ptr,  # (width, hidden)
    grad_fc1_weight_ptr,
    grad_fc1_bias_ptr,
    grad_fc2_weight_ptr,
    grad_fc2_bias_ptr,
    batch,
    chunks,
    width,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One neuron of the hidden layer: its gradients, summed over the images."""
    h, hidden = tl.program_id(0), tl.num_programs(0)
    column, column_mask, channel, mask = chunk_tile(chunks, width, CHUNKS, WIDTH)
    chunk = tl.arange(0, CHUNKS)
    w2 = tl.load(fc2_weight_ptr + column * hidden + h, mask=column_mask, other=0.0)
    first = tl.zeros((WIDTH,), tl.float64)
    second = tl.zeros((WIDTH,), tl.float64)
    outer = tl.zeros((WIDTH,), tl.float64)
    inner = tl.zeros((CHUNKS,), tl.float64)
    for image in range(batch):
        at = image * chunks * width + channel
        logit = tl.load(logit_ptr + at, mask=mask, other=0.0)
        back = tl.sum(logit * w2, 1)
        for branch in tl.static_range(2):
            v = tl.load(pooled_ptr + branch * batch * chunks * width + at, mask=mask, other=0.0)
            a = hidden_layer(v, fc1_weight_ptr, fc1_bias_ptr, h, width, column, column_mask)
            da = tl.where((a <= 0) | (chunk >= chunks), 0.0, back)
            first += tl.sum((da[:, None] * v).to(tl.float64), 0)
            second += tl.sum((tl.where(a < 0, 0.0, a)[:, None] * logit).to(tl.float64), 0)
            outer += tl.sum(logit.to(tl.float64), 0)
            inner += da.to(tl.float64)
    column = tl.arange(0, WIDTH)
    tl.store(grad_fc1_weight_ptr + h * width + column, first.to(tl.float32), mask=column < width)
    tl.store(grad_fc2_weight_ptr + column * hidden + h, second.to(tl.float32), mask=column < width)
    tl.store(grad_fc1_bias_ptr + h, tl.sum(inner, 0).to(tl.float32))
    if h == 0:
        tl.store(grad_fc2_bias_ptr + column, outer.to(tl.float32), mask=column < width)


@triton.jit
def input_gradient_kernel(
    grad_ptr,  # (rows, channels)
    y_ptr,  # likewise, or None
    x_ptr,  # likewise
    gate_ptr,  # (batch, channels)
    pooled_ptr,  # (2, batch, channels)
    grad_pooled_ptr,  # (2, batch, channels), see gate_gradient_kernel
    maps_ptr,  # (rows, 2 * groups)
    grad_maps_ptr,  # likewise
    spatial_ptr,  # (rows, groups)
    shares_ptr,  # likewise
    out_ptr,  # (rows, channels)
    rows,
    pixels,
    batch,
    channels,
    each,
    ORDER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group, row, channel, mask = group_tile(rows, each, ROWS, COLUMNS)
    at = row.to(tl.int64)[:, None] * channels + channel
    pooled_at = (row // pixels)[:, None] * channels + channel
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + pooled_at, mask=mask, other=0.0)
    g = load_gated_gradient(grad_ptr, y_ptr, at, mask)
    du = gated_gradient(
        g,
        x,
        gate,
        row,
        row < rows,
        maps_ptr,
        grad_maps_ptr,
        spatial_ptr,
        shares_ptr,
        group,
        tl.num_programs(1),
        each,
        ORDER,
    )
    most = tl.load(pooled_ptr + batch * channels + pooled_at, mask=mask, other=0.0)
    dx = du * gate + tl.load(grad_pooled_ptr + pooled_at, mask=mask, other=0.0)
    of_most = tl.load(grad_pooled_ptr + batch * channels + pooled_at, mask=mask, other=0.0)
    dx += tl.where(x == most, of_most, 0.0)
    if RESIDUAL:
        dx += g
    tl.store(out_ptr + at, dx.to(out_ptr.dtype.element_ty), mask=mask)


def _mlp_blocks(app: Application, channels: int) -> dict[str, int]:
    width = app.fc1_weight.shape[1]
    return {"CHUNKS": power_of_two(channels // width, 1), "WIDTH": power_of_two(width, 2)}


def _group_blocks(x: Tensor, each: int) -> dict[str, int]:
    """Tiles that hold all channels of a group, hence fewer rows where it has many."""
    size = block("elementwise", x, each)
    columns = power_of_two(each, 2)
    rows = max(4, size.rows * size.columns // max(size.columns, columns))
    return {"ROWS": rows, "COLUMNS": columns, "warps": size.warps}


def forward(x: Tensor, residual: Tensor | None, app: Application) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output (NHWC), the running statistics after it, and what the backward pass needs."""
    x = nhwc(x)
    residual = x if app.residual_is_x else None if residual is None else nhwc(residual)
    batch, channels, height, width = x.shape
    area, rows, groups, like = height * width, pixels(x), len(app.conv_weight), app.conv_weight
    each, link = channels // groups, _link(app)
    hidden, mlp_width = app.fc1_weight.shape
    with on_device(x):
        pooled, gate = like.new_empty((2, batch, channels)), like.new_empty((batch, channels))
        maps = empty_nhwc((batch, 2 * groups, height, width), like)
        size = block("reduction", x, channels)
        tiles = triton.cdiv(area, PIXELS)
        partial = like.new_empty((2, tiles, batch, channels))
        grid = (tiles, triton.cdiv(channels, size.columns), batch)
        constants = {"SPAN": PIXELS, "ROWS": size.rows, "COLUMNS": size.columns, "warps": size.warps}
        launch(pool_kernel, grid, x, partial, area, batch, channels, **constants)
        mlp = app.fc1_weight, app.fc1_bias, app.fc2_weight, app.fc2_bias
        sizes = (tiles, area, channels // mlp_width, mlp_width, hidden)
        launch(gate_kernel, (batch,), partial, *mlp, pooled, gate, *sizes, **_mlp_blocks(app, channels))
        blocks = _group_blocks(x, each)
        grid = (triton.cdiv(rows, blocks["ROWS"]), groups)
        launch(maps_kernel, grid, x, gate, maps, rows, area, channels, each, ORDER=app.order, **blocks)
        stats = torch.empty((4, groups), dtype=torch.float32, device=x.device)
        affine = affine_of(link) if app.training else None
        z = conv_forward(Source(maps), like, None, geometry_of(link)._replace(pack=False), affine=affine, stats=stats)
        if not app.training:
            given_statistics(app.running_mean, app.running_var, affine_of(link), stats)
        spatial, y = torch.empty_like(z), empty_nhwc(x.shape, x)
        tensors = (x, gate, z, stats, stats.stride(0), residual, spatial, y)
        launch(attend_kernel, grid, *tensors, rows, area, channels, each, ACTIVATE=app.relu, **blocks)
        running = _updated(app, stats, rows) if app.training else []
    return y, running, [pooled, gate, stats, maps, z, spatial]


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, app: Application, saved: list[Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, bn_weight, bn_bias.

    ``y`` is the output where it ended in a ReLU."""
    grad, x = nhwc(grad), nhwc(x)
    y = None if y is None else nhwc(y)
    pooled, gate, stats, maps, z, spatial = saved
    batch, channels, height, width = x.shape
    area, rows, groups = height * width, pixels(x), len(app.conv_weight)
    each, link = channels // groups, _link(app)
    grad_residual = None
    if needs[1]:
        grad_residual = grad.clone() if y is None else torch.ops.aten.threshold_backward(grad, y, 0)
    if not any((needs[0], *needs[2:])):
        return [None, grad_residual, *[None] * 7]
    with on_device(x):
        blocks = _group_blocks(x, each)
        grid = (triton.cdiv(rows, blocks["ROWS"]), groups)
        sizes = (area, batch, channels, each)
        grad_normalised, shares = torch.empty_like(z), torch.empty_like(z)
        tensors = (grad, y, x, gate, maps, spatial, grad_normalised, shares)
        launch(spatial_gradient_kernel, grid, *tensors, rows, area, channels, each, ORDER=app.order, **blocks)
        output = Source(z, stats)
        joined = reduce(grad_normalised, output, app.eps, app.training)
        _, bn_weight, bn_bias = link_gradients(link, stats, joined.sums, [False, *needs[7:]])
        behind, source = Output(grad_normalised, output, joined.coefficients), Source(maps)
        conv_weight = (
            conv_weight_gradient(behind, app.conv_weight, geometry_of(link)._replace(pack=False), source)
            if needs[6]
            else None
        )
        grad_x = empty_nhwc(x.shape, x) if needs[0] else None
        params: list[Tensor | None] = [None] * 4
        if needs[0] or any(needs[2:6]):
            grad_maps = torch.empty_like(maps)
            conv_input_gradient(behind, app.conv_weight, geometry_of(link)._replace(pack=False), source, grad_maps)
            tiles = triton.cdiv(area, PIXELS)
            partial = gate.new_empty((2, tiles, batch, channels))
            maps_and_gates = (maps, grad_maps, spatial, shares)
            tensors = (grad, y, x, gate, pooled, *maps_and_gates, partial)
            launch(
                channel_sums_kernel, (tiles, groups, batch), *tensors, *sizes, ORDER=app.order, SPAN=PIXELS, **blocks
            )
            hidden, mlp_width = app.fc1_weight.shape
            chunks, mlp_blocks = channels // mlp_width, _mlp_blocks(app, channels)
            mlp = app.fc1_weight, app.fc1_bias, app.fc2_weight
            logit, grad_pooled = torch.empty_like(gate), torch.empty_like(pooled)
            tensors = (partial, pooled, gate, *mlp, logit, grad_pooled)
            launch(gate_gradient_kernel, (batch,), *tensors, tiles, area, chunks, mlp_width, hidden, **mlp_blocks)
            if any(needs[2:6]):
                shapes = ((hidden, mlp_width), (hidden,), (mlp_width, hidden), (mlp_width,))
                params = [gate.new_empty(shape) for shape in shapes]
                tensors = (logit, pooled, *mlp, *params)
                launch(mlp_gradient_kernel, (hidden,), *tensors, batch, chunks, mlp_width, **mlp_blocks)
            if grad_x is not None:
                tensors = (grad, y, x, gate, pooled, grad_pooled, *maps_and_gates, grad_x)
                constants = {"ORDER": app.order, "RESIDUAL": app.residual_is_x, **blocks}
                launch(input_gradient_kernel, grid, *tensors, rows, *sizes, **constants)
    found = [grad_x, grad_residual, *params, conv_weight, bn_weight, bn_bias]
    return [g if needed else None for g, needed in zip(found, needs)]
