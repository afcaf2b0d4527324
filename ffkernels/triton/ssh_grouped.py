"""The SSH block in Triton: five convolutions that write side by side, and one pass that joins and shuffles.

Three tensors hold the raw outputs: [conv3X3 | conv5X5_1], [conv5X5_2 | conv7X7_2] and conv7x7_3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..ops.conv_chain import Link, nhwc
from .batch_norm import Source, Sums, given_statistics, join_sums
from .blocks import block
from .common import RELU as RELU_CODE
from .common import (
    activate,
    activation_gradient,
    empty_nhwc,
    launch,
    normalise,
    on_device,
    pixel,
    pixels,
    program_tile,
    store_sums,
)
from .conv import Output, conv_forward, conv_input_gradient, conv_weight_gradient
from .conv_chain import affine_of, geometry_of

STAGES = ((0, 1), (2, 3), (4,))
OUTER = (0, 2, 4)
RELU = RELU_CODE.value


@triton.jit
def load_branch(z_ptr, row, z_pixel, stats_ptr, stats_row, column, row_mask, column_mask):
    z = tl.load(z_ptr + row * z_pixel + column, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    z = normalise(z, stats_ptr, stats_row, column, column_mask)
    return tl.where(column_mask, z, 0.0)


@triton.jit
def join_branches_kernel(
    z0_ptr,  # (rows, c0): three branches with a pixel each, and their (4, C) stats or None
    z0_pixel,
    stats0_ptr,
    stats0_row,
    z1_ptr,
    z1_pixel,
    stats1_ptr,
    stats1_row,
    z2_ptr,
    z2_pixel,
    stats2_ptr,
    stats2_row,
    y_ptr,  # (rows, channels)
    rows,
    c0,
    c1,
    channels,
    groups,  # of the shuffle
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, out, inside, mask = program_tile(rows, channels, ROWS, COLUMNS)
    row_mask = (row < rows)[:, None]
    row = row.to(tl.int64)[:, None]
    c = (out % groups * (channels // groups) + out // groups)[None, :]
    inside = inside[None, :]
    y = load_branch(z0_ptr, row, z0_pixel, stats0_ptr, stats0_row, c, row_mask, inside & (c < c0))
    c = c - c0
    y += load_branch(z1_ptr, row, z1_pixel, stats1_ptr, stats1_row, c, row_mask, inside & (c >= 0) & (c < c1))
    c = c - c1
    y += load_branch(z2_ptr, row, z2_pixel, stats2_ptr, stats2_row, c, row_mask, inside & (c >= 0))
    y = activate(y, 0.0, RELU_CODE)
    tl.store(y_ptr + row * channels + out[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def split_branch_kernel(
    grad_ptr,  # (rows, total)
    z_ptr,  # (rows, channels)
    z_pixel,
    stats_ptr,  # (4, channels)
    stats_row,
    out_ptr,  # (rows, channels)
    out_pixel,
    partial_ptr,  # (2, tiles, channels)
    rows,
    channels,
    first,  # the branch's place in the concatenation of `total` channels
    total,
    groups,  # of the shuffle
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, channel_mask, mask = program_tile(rows, channels, ROWS, COLUMNS)
    row = row.to(tl.int64)[:, None]
    c = first + channel
    each = total // groups
    place = c % each * groups + c // each
    g = tl.load(grad_ptr + row * total + place[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_pixel + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    u = normalise(z, stats_ptr, stats_row, channel[None, :], channel_mask[None, :])
    stored = activation_gradient(g, u, 0.0, RELU_CODE).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_pixel + channel[None, :], stored, mask=mask)
    g = tl.where(mask, stored.to(tl.float32), 0.0)
    store_sums(g, z, stats_ptr, channel, channel_mask, channels, partial_ptr)


def slices(buffers: list[Tensor], links: list[Link]) -> list[Tensor]:
    """The part of every link in the three tensors, whose second dimension is the channel."""
    parts: list[Tensor] = []
    for buffer, stage in zip(buffers, STAGES):
        parts += buffer.split([len(links[i].weight) for i in stage], 1)
    return parts


def join_branches(branches: list[Source], shuffle_groups: int) -> Tensor:
    x = branches[0].x
    sizes = [b.x.shape[1] for b in branches]
    y = empty_nhwc((x.shape[0], sum(sizes), *x.shape[2:]), x)
    rows = pixels(y)
    size = block("elementwise", x, sum(sizes))
    launch(
        join_branches_kernel,
        (triton.cdiv(rows, size.rows), triton.cdiv(sum(sizes), size.columns)),
        *(argument for b in branches for argument in (b.x, pixel(b.x), b.stats, b.stats_row)),
        y,
        rows,
        *sizes[:2],
        sum(sizes),
        shuffle_groups,
        ROWS=size.rows,
        COLUMNS=size.columns,
        warps=size.warps,
    )
    return y


def split_branch(grad: Tensor, branch: Source, link: Link, first: int, shuffle_groups: int, out: Tensor) -> Sums:
    """``out`` becomes the gradient in front of a branch's ReLU."""
    rows, channels = pixels(grad), branch.x.shape[1]
    size = block("reduction", grad, channels)
    tiles = triton.cdiv(rows, size.rows)
    partial = torch.empty((2, tiles, channels), dtype=torch.float32, device=grad.device)
    launch(
        split_branch_kernel,
        (tiles, triton.cdiv(channels, size.columns)),
        grad,
        branch.x,
        pixel(branch.x),
        branch.stats,
        branch.stats_row,
        out,
        pixel(out),
        partial,
        rows,
        channels,
        first,
        grad.shape[1],
        shuffle_groups,
        ROWS=size.rows,
        COLUMNS=size.columns,
        warps=size.warps,
    )
    return join_sums(partial, rows, branch, link.eps, link.batch_statistics)


def forward(
    x: Tensor, links: list[Link], shuffle_groups: int, save: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of the three raw outputs, and with ``save`` these themselves."""
    with on_device(x):
        x = nhwc(x)
        widths = [sum(len(links[i].weight) for i in stage) for stage in STAGES]
        raw = [empty_nhwc((x.shape[0], n, *x.shape[2:]), x) for n in widths]
        all_stats = [torch.empty((4, n), dtype=torch.float32, device=x.device) for n in widths]
        z, stats = slices(raw, links), slices(all_stats, links)
        at_once = not save and not links[0].batch_statistics
        outputs: list[Source] = []
        for i, link in enumerate(links):
            source = Source(x) if i < 2 else outputs[1 if i < 4 else 3]
            affine, after = affine_of(link), None
            if link.given_statistics:
                given_statistics(link.running_mean, link.running_var, affine, stats[i])
                affine = None
            if at_once:
                after = Source(x, stats[i], RELU)
            geometry = geometry_of(link)
            conv_forward(source, link.weight, link.bias, geometry, out=z[i], affine=affine, stats=stats[i], after=after)
            outputs.append(Source(z[i]) if at_once else Source(z[i], stats[i], RELU))
        y = join_branches([outputs[i] for i in OUTER], shuffle_groups)
        return y, all_stats, raw if save else []


def backward(
    grad: Tensor,
    x: Tensor,
    links: list[Link],
    stats: list[Tensor],
    raw: list[Tensor],
    shuffle_groups: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x and of weight, bias, bn_weight, bn_bias of every link, those that ``needs`` marks."""
    with on_device(x):
        x, grad = nhwc(x), nhwc(grad)
        outputs = [Source(z, s, RELU) for z, s in zip(slices(raw, links), slices(stats, links))]
        g = slices([torch.empty_like(z) for z in raw], links)
        joined: list[Sums | None] = [None] * 5
        first = 0
        for i in OUTER:
            joined[i] = split_branch(grad, outputs[i], links[i], first, shuffle_groups, g[i])
            first += len(links[i].weight)
        grad_x = empty_nhwc(x.shape, x)
        grads: list[Tensor | None] = [None] * len(needs)
        for i in (4, 3, 2, 1, 0):
            link, marks = links[i], needs[1 + 4 * i : 5 + 4 * i]
            behind = Output(g[i], outputs[i]._replace(activation=0), joined[i].coefficients)
            grads[2 + 4 * i : 5 + 4 * i] = link_gradients(link, outputs[i].stats, joined[i].sums, marks[1:])
            before = (None, None, 1, 1, 3)[i]
            source = Source(x) if before is None else outputs[before]
            if marks[0]:
                grads[1 + 4 * i] = conv_weight_gradient(behind, link.weight, geometry_of(link), source)
            if before is None and not needs[0]:
                continue
            # Of the two convolutions that read a map, the second adds its gradient to the first one's.
            out, shared = (grad_x if before is None else g[before]), i in (0, 1, 2, 3)
            begins = shared and i in (1, 3)
            total = conv_input_gradient(
                behind,
                link.weight,
                geometry_of(link),
                Source(source.x) if begins else source,
                out,
                add=out if shared and not begins else None,
                sums_for=None if begins or before is None else (links[before].eps, links[before].batch_statistics),
            )
            if total is not None:
                joined[before] = total
        grads[0] = grad_x
    return [value for value, needed in zip(grads, needs) if needed]
