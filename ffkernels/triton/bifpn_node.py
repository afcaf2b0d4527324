"""One node of a bidirectional feature pyramid in Triton: the fusion here, the convolutions in conv_chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu.bifpn_node import SILU, in_order_of_convolution
from ..ops.bifpn_node import Fusion
from ..ops.conv_chain import Link, nhwc
from . import conv_chain
from .blocks import block, power_of_two
from .channel_shuffle import channel_shuffle
from .common import empty_nhwc, launch, on_device, pixels, program_tile

UP, DOWN = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def fusion_factor(weight_ptr, index, count, epsilon, COUNT: tl.constexpr):
    """relu(w_index) / (sum(relu(w)) + epsilon)."""
    at = tl.arange(0, COUNT)
    w = tl.load(weight_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    w = tl.where(w < 0, 0.0, w)
    return tl.sum(tl.where(at == index, w, 0.0), 0) / (tl.sum(w, 0) + epsilon)


@triton.jit
def pooled(x_ptr, image, i, j, height, width, channels, channel, mask, SAME: tl.constexpr):
    """The maximum of a window, and the place (0 to 8) of the value that PyTorch sends the gradient to."""
    top = 2 * i - 1
    left = 2 * j - 1
    if SAME:
        top = 2 * i - height % 2
        left = 2 * j - width % 2
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    place = tl.full(mask.shape, -1, tl.int32)
    for k in tl.static_range(9):
        y = top + k // 3
        x = left + k % 3
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = ((image * height + y) * width + x).to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x_ptr + at, mask=mask & inside[:, None], other=0.0).to(tl.float32)
        wins = (value > best) | (value != value) | (place < 0)
        if not SAME:
            wins = wins & inside[:, None]
        best = tl.where(wins, value, best)
        place = tl.where(wins, k, place)
    return best, place


@triton.jit
def nearest(i, size, target):
    """The source of place i of ``target``, in the float32 arithmetic of torch.nn.functional.interpolate."""
    scale = tl.math.div_rn(tl.full((), size, tl.float32), tl.full((), target, tl.float32))
    return tl.minimum(tl.floor(i.to(tl.float32) * scale).to(tl.int32), size - 1)


@triton.jit
def resampled(x_ptr, image, i, j, in_h, in_w, height, width, channels, channel, mask, HOW: tl.constexpr, SAME):
    """A tile of the input as the node adds it: the pixels i, j of the node's map."""
    if HOW == DOWN:
        value, _ = pooled(x_ptr, image, i, j, in_h, in_w, channels, channel, mask, SAME)
    else:
        if HOW == UP:
            i = nearest(i, in_h, height)
            j = nearest(j, in_w, width)
        at = ((image * in_h + i) * in_w + j).to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def fuse_kernel(
    a_ptr,  # (batch, a_h, a_w, channels), and so the other inputs; the third may be None
    a_h,
    a_w,
    b_ptr,
    b_h,
    b_w,
    c_ptr,
    c_h,
    c_w,
    weight_ptr,  # (count,)
    count,
    epsilon,
    v_ptr,  # (batch, height, width, channels)
    rows,  # batch * height * width
    height,
    width,
    channels,
    A: tl.constexpr,  # how each input is resampled
    B: tl.constexpr,
    C: tl.constexpr,
    SAME: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, _channel_mask, mask = program_tile(rows, channels, ROWS, COLUMNS)
    image = row // (height * width)
    i = row // width % height
    j = row % width
    v = resampled(a_ptr, image, i, j, a_h, a_w, height, width, channels, channel, mask, A, SAME)
    v = v * fusion_factor(weight_ptr, 0, count, epsilon, COUNT)
    u = resampled(b_ptr, image, i, j, b_h, b_w, height, width, channels, channel, mask, B, SAME)
    v += u * fusion_factor(weight_ptr, 1, count, epsilon, COUNT)
    if c_ptr is not None:
        u = resampled(c_ptr, image, i, j, c_h, c_w, height, width, channels, channel, mask, C, SAME)
        v += u * fusion_factor(weight_ptr, 2, count, epsilon, COUNT)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fuse_sums_kernel(
    x_ptr,  # (batch, in_h, in_w, channels)
    in_h,
    in_w,
    grad_ptr,  # (batch, height, width, channels)
    partial_ptr,  # (tiles,): sums of grad * resampled(x)
    rows,  # batch * height * width
    height,
    width,
    channels,
    HOW: tl.constexpr,
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, channel, _channel_mask, mask = program_tile(rows, channels, ROWS, COLUMNS)
    i = row // width % height
    u = resampled(
        x_ptr, row // (height * width), i, row % width, in_h, in_w, height, width, channels, channel, mask, HOW, SAME
    )
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(tl.where(mask, g * u, 0.0).to(tl.float64), 1), 0)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def fusion_gradient_kernel(
    partial_ptr,  # (inputs, tiles), float64
    weight_ptr,  # (count,)
    out_ptr,  # (count,)
    tiles,
    inputs,
    count,
    epsilon,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The gradient of the weights through relu(w) / (sum(relu(w)) + epsilon)."""
    at = tl.arange(0, COUNT)
    direct = tl.zeros((COUNT,), tl.float64)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (at < inputs)[:, None] & (tile < tiles)[None, :]
        direct += tl.sum(tl.load(partial_ptr + at[:, None] * tiles + tile[None, :], mask=mask, other=0.0), 1)
    w = tl.load(weight_ptr + at, mask=at < count, other=0.0).to(tl.float64)
    positive = tl.where(w < 0, 0.0, w)
    total = tl.sum(positive, 0) + epsilon
    share = direct / total  # the only use of the loop's result: triton 3.6 does not compile two
    g = share - tl.sum(share * positive, 0) / total
    g = tl.where(w <= 0, 0.0, g)
    tl.store(out_ptr + at, g.to(tl.float32).to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def fuse_input_gradient_kernel(
    x_ptr,  # (batch, in_h, in_w, channels)
    in_h,
    in_w,
    weight_ptr,  # (count,)
    index,  # of this input
    count,
    epsilon,
    grad_ptr,  # (batch, height, width, channels)
    out_ptr,  # (batch, in_h, in_w, channels)
    rows,  # batch * in_h * in_w
    height,
    width,
    channels,
    HOW: tl.constexpr,
    MARGIN: tl.constexpr,  # 1 where a rounded scale may move what reads a pixel by a place, 0 where it cannot
    SAME: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every input pixel gathers from the pixels that read it."""
    row, channel, _channel_mask, mask = program_tile(rows, channels, ROWS, COLUMNS)
    image = row // (in_h * in_w)
    y = row // in_w % in_h
    x = row % in_w
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HOW == DOWN:
        top = y + 1
        left = x + 1
        if SAME:
            top = y + in_h % 2
            left = x + in_w % 2
        for k in range(4):
            i = top // 2 - k // 2
            j = left // 2 - k % 2
            row_of = top - 2 * i
            column_of = left - 2 * j
            reads = (row_of < 3) & (column_of < 3) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            inside = mask & reads[:, None]
            _, place = pooled(x_ptr, image, i, j, in_h, in_w, channels, channel, inside, SAME)
            at = ((image * height + i) * width + j).to(tl.int64)[:, None] * channels + channel[None, :]
            g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(place == (row_of * 3 + column_of)[:, None], g, 0.0)
    else:
        first_i = y
        first_j = x
        down = 1
        right = 1
        if HOW == UP:
            first_i = (y * height + in_h - 1) // in_h - MARGIN
            first_j = (x * width + in_w - 1) // in_w - MARGIN
            down = (height + in_h - 1) // in_h + 2 * MARGIN
            right = (width + in_w - 1) // in_w + 2 * MARGIN
        for k in range(down * right):
            i = first_i + k // right
            j = first_j + k % right
            reads = (i >= 0) & (j >= 0) & (i < height) & (j < width)
            if HOW == UP:
                reads = reads & (nearest(i, in_h, height) == y) & (nearest(j, in_w, width) == x)
            at = ((image * height + i) * width + j).to(tl.int64)[:, None] * channels + channel[None, :]
            total += tl.load(grad_ptr + at, mask=mask & reads[:, None], other=0.0).to(tl.float32)
    total = total * fusion_factor(weight_ptr, index, count, epsilon, COUNT)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def fuse(inputs: Sequence[Tensor], weight: Tensor, fusion: Fusion) -> Tensor:
    """The sum of the resampled NHWC inputs with normalised weights."""
    v = empty_nhwc(inputs[fusion.resample.index(0)].shape, inputs[0])
    rows, channels = pixels(v), v.shape[1]
    size = block("pooling", v, channels)
    arguments = [value for x in inputs for value in (x, *x.shape[2:])] + [None, 0, 0] * (3 - len(inputs))
    how = (*fusion.resample, 0)
    launch(
        fuse_kernel,
        (triton.cdiv(rows, size.rows), triton.cdiv(channels, size.columns)),
        *arguments,
        weight,
        len(weight),
        fusion.epsilon,
        v,
        rows,
        *v.shape[2:],
        channels,
        A=how[0],
        B=how[1],
        C=how[2],
        SAME=fusion.same,
        COUNT=power_of_two(len(weight), 2),
        ROWS=size.rows,
        COLUMNS=size.columns,
        warps=size.warps,
    )
    return v


def fuse_backward(
    grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, fusion: Fusion, needs: Sequence[bool], needs_weight: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of the inputs that ``needs`` marks, and of the weights."""
    channels, count = grad.shape[1], power_of_two(len(weight), 2)
    size = block("pooling", grad, channels)
    constants = {"ROWS": size.rows, "COLUMNS": size.columns, "SAME": fusion.same, "warps": size.warps}
    columns = triton.cdiv(channels, size.columns)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, x in enumerate(inputs):
        if not needs[i]:
            continue
        grads[i] = empty_nhwc(x.shape, x)
        launch(
            fuse_input_gradient_kernel,
            (triton.cdiv(pixels(x), size.rows), columns),
            x,
            *x.shape[2:],
            weight,
            i,
            len(weight),
            fusion.epsilon,
            grad,
            grads[i],
            pixels(x),
            *grad.shape[2:],
            channels,
            HOW=fusion.resample[i],
            MARGIN=int(any(large != 2 * small for large, small in zip(grad.shape[2:], x.shape[2:]))),
            COUNT=count,
            **constants,
        )
    if not needs_weight:
        return grads, None
    rows = triton.cdiv(pixels(grad), size.rows)
    partial = torch.empty((len(inputs), rows * columns), dtype=torch.float64, device=grad.device)
    for i, x in enumerate(inputs):
        launch(
            fuse_sums_kernel,
            (rows, columns),
            x,
            *x.shape[2:],
            grad,
            partial[i],
            pixels(grad),
            *grad.shape[2:],
            channels,
            HOW=fusion.resample[i],
            **constants,
        )
    out = torch.empty_like(weight)
    tiles = partial.shape[1]
    sizes = (tiles, len(inputs), len(weight), fusion.epsilon)
    launch(fusion_gradient_kernel, (1,), partial, weight, out, *sizes, TILES=256, COUNT=count)
    return grads, out


def forward(
    inputs: Sequence[Tensor], fusion_weight: Tensor, links: list[Link], fusion: Fusion, save: bool
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), the fused map v, and ``stats`` and raw outputs of the convolutions before the shuffle."""
    with on_device(inputs[0]):
        v = fuse([nhwc(x) for x in inputs], fusion_weight, fusion)
        links = [*links[:-1], in_order_of_convolution(links[-1], fusion.shuffle_groups)]
        y, stats, raw = conv_chain.forward(v, links, save, SILU)
        return channel_shuffle(y, fusion.shuffle_groups) if fusion.shuffle_groups > 1 else y, v, stats, raw


def backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    fusion_weight: Tensor,
    v: Tensor,
    links: list[Link],
    stats: list[Tensor | None],
    raw: list[Tensor],
    fusion: Fusion,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs, of fusion_weight, and of the parameters of the links; None where ``needs`` is False."""
    count, groups = len(inputs), fusion.shuffle_groups
    needs_inputs, needs_weight, needs_links = needs[:count], needs[count], needs[count + 1 :]
    with on_device(grad):
        grad = nhwc(grad)
        if groups > 1:
            grad = channel_shuffle(grad, grad.shape[1] // groups)
        links = [*links[:-1], in_order_of_convolution(links[-1], groups)]
        wanted = needs_weight or any(needs_inputs)
        found = iter(conv_chain.backward(grad, v, links, stats, raw, [wanted, *needs_links], SILU))
        grad_v = next(found) if wanted else None
        grad_links = [next(found) if needed else None for needed in needs_links]
        for i in (-2, -1):
            if grad_links[i] is not None and groups > 1:
                grad_links[i] = grad_links[i].view(groups, -1).T.flatten()
        if not wanted:
            return [None] * (count + 1) + grad_links
        grads, grad_weight = fuse_backward(
            grad_v, [nhwc(x) for x in inputs], fusion_weight, fusion, needs_inputs, needs_weight
        )
        return [*grads, grad_weight, *grad_links]
