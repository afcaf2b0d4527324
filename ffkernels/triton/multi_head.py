"""Rows of all anchors from the maps of the joined predictors, in Triton: see ops/multi_head.py.

A pixel of a map holds A * 4 numbers of boxes, A * 2 of classes and A * 10 of landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common import empty_nhwc, launch, on_device, pixels

ANCHORS = 128
"""Anchors that one program moves."""


@triton.jit
def places(anchor, level_rows, first, rows, anchors):
    """The pixel and the anchor in it, in the level's map, and the row in the outputs."""
    image = anchor // level_rows
    return anchor // anchors, anchor % anchors, image.to(tl.int64) * rows + first + anchor % level_rows


@triton.jit
def scatter_kernel(
    z_ptr,  # (batch, height, width, anchors * 16)
    bbox_ptr,  # (batch, rows, 4)
    cls_ptr,  # (batch, rows, 2)
    landmarks_ptr,  # (batch, rows, 10)
    total,  # batch * height * width * anchors
    level_rows,  # height * width * anchors
    first,  # the level's first row
    rows,
    anchors,
    SOFTMAX: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < total
    at, a, row = places(anchor, level_rows, first, rows, anchors)
    z = z_ptr + at.to(tl.int64) * (anchors * 16)
    k = tl.arange(0, 4)[None, :]
    mask = inside[:, None] & (k < 4)
    tl.store(bbox_ptr + row[:, None] * 4 + k, tl.load(z[:, None] + a[:, None] * 4 + k, mask=mask), mask=mask)
    zero = tl.load(z + anchors * 4 + a * 2, mask=inside, other=0.0)
    one = tl.load(z + anchors * 4 + a * 2 + 1, mask=inside, other=0.0)
    if SOFTMAX:
        u, v = zero.to(tl.float32), one.to(tl.float32)
        most = tl.maximum(u, v)
        u, v = tl.exp(u - most), tl.exp(v - most)
        zero = (u / (u + v)).to(zero.dtype)
        one = (v / (u + v)).to(one.dtype)
    tl.store(cls_ptr + row * 2, zero, mask=inside)
    tl.store(cls_ptr + row * 2 + 1, one, mask=inside)
    k = tl.arange(0, 16)[None, :]
    mask = inside[:, None] & (k < 10)
    value = tl.load(z[:, None] + anchors * 6 + a[:, None] * 10 + k, mask=mask)
    tl.store(landmarks_ptr + row[:, None] * 10 + k, value, mask=mask)


@triton.jit
def gather_kernel(
    bbox_ptr,  # (batch, rows, 4) or None, as are the next two: gradients
    cls_ptr,  # (batch, rows, 2) or None
    landmarks_ptr,  # (batch, rows, 10) or None
    probabilities_ptr,  # (batch, rows, 2) where a softmax ended the forward pass, or None
    z_ptr,  # (batch, height, width, anchors * 16), the gradient of the map
    total,  # batch * height * width * anchors
    level_rows,  # height * width * anchors
    first,  # the level's first row
    rows,
    anchors,
    ANCHORS: tl.constexpr,
):
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < total
    at, a, row = places(anchor, level_rows, first, rows, anchors)
    z = z_ptr + at.to(tl.int64) * (anchors * 16)
    k = tl.arange(0, 4)[None, :]
    mask = inside[:, None] & (k < 4)
    value = tl.zeros((ANCHORS, 4), z_ptr.dtype.element_ty)
    if bbox_ptr is not None:
        value = tl.load(bbox_ptr + row[:, None] * 4 + k, mask=mask)
    tl.store(z[:, None] + a[:, None] * 4 + k, value, mask=mask)
    u = tl.zeros((ANCHORS,), tl.float32)
    v = u
    if cls_ptr is not None:
        u = tl.load(cls_ptr + row * 2, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(cls_ptr + row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        if probabilities_ptr is not None:
            p = tl.load(probabilities_ptr + row * 2, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(probabilities_ptr + row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
            mean = u * p + v * q
            u = p * (u - mean)
            v = q * (v - mean)
    tl.store(z + anchors * 4 + a * 2, u.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(z + anchors * 4 + a * 2 + 1, v.to(z_ptr.dtype.element_ty), mask=inside)
    k = tl.arange(0, 16)[None, :]
    mask = inside[:, None] & (k < 10)
    value = tl.zeros((ANCHORS, 16), z_ptr.dtype.element_ty)
    if landmarks_ptr is not None:
        value = tl.load(landmarks_ptr + row[:, None] * 10 + k, mask=mask)
    tl.store(z[:, None] + anchors * 6 + a[:, None] * 10 + k, value, mask=mask)


def scatter(maps: Sequence[Tensor], softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """NHWC maps (B, A * 16, H, W) of all levels -> bbox (B, N, 4), cls (B, N, 2), landmarks (B, N, 10)."""
    batch = maps[0].shape[0]
    rows = sum(z.shape[1] // 16 * z.shape[2] * z.shape[3] for z in maps)
    outputs = [maps[0].new_empty((batch, rows, k)) for k in (4, 2, 10)]
    first = 0
    with on_device(maps[0]):
        for z in maps:
            anchors, total = z.shape[1] // 16, pixels(z) * (z.shape[1] // 16)
            grid = (triton.cdiv(total, ANCHORS),)
            sizes = (total, total // batch, first, rows, anchors)
            launch(scatter_kernel, grid, z, *outputs, *sizes, SOFTMAX=bool(softmax), ANCHORS=ANCHORS)
            first += total // batch
    return tuple(outputs)


def gather(
    grads: Sequence[Tensor | None], probabilities: Tensor | None, shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Gradients of the maps of ``shapes`` from those of bbox, cls and landmarks; None is zero."""
    like = next(g for g in grads if g is not None)
    rows, first, maps = like.shape[1], 0, []
    with on_device(like):
        for shape in shapes:
            z = empty_nhwc(tuple(shape), like)
            anchors, total = z.shape[1] // 16, pixels(z) * (z.shape[1] // 16)
            sizes = (total, total // shape[0], first, rows, anchors)
            grid = (triton.cdiv(total, ANCHORS),)
            launch(gather_kernel, grid, *grads, probabilities, z, *sizes, ANCHORS=ANCHORS)
            first += total // shape[0]
            maps.append(z)
    return maps
