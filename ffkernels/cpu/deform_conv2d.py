"""Calls into csrc/cpu/deform_conv2d.cpp. ``stats`` and ``sums`` are those of ffkernels/cpu/conv.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from ..ops.conv_chain import Link, nhwc
from .conv import (
    Source,
    batch_norm_apply,
    batch_norm_gradients,
    batch_norm_reduce,
    batch_norm_stats,
    empty_nhwc,
    pointer,
    workspace,
)
from .conv_chain import link_gradients


def forward(x: Tensor, offset: Tensor, mask: Tensor, link: Link, save: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output (NHWC), its ``stats``, and the raw output z of the convolution, which may be the output itself."""
    native, _ = module()
    x, offset, mask = nhwc(x), nhwc(offset), nhwc(mask)
    weight = link.weight
    shape = (*x.shape, *weight.shape[:1], *weight.shape[2:], link.stride, link.padding)
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    z = empty_nhwc((x.shape[0], weight.shape[0], *offset.shape[2:]), x)
    stats = x.new_empty((4, weight.shape[0])) if link.batch_statistics else None
    given = None
    if link.given_statistics:
        given = batch_norm_stats(link.running_mean, link.running_var, link.bn_weight, link.bn_bias, link.eps)
    at_once = not save and not link.batch_statistics
    memory = workspace(native.ff_cpu_deform_conv_workspace(0, *shape, dtype, threads))
    code = native.ff_cpu_deform_conv_forward(
        x.data_ptr(),
        offset.data_ptr(),
        mask.data_ptr(),
        weight.data_ptr(),
        pointer(link.bias),
        z.data_ptr(),
        pointer(stats),
        pointer(link.bn_weight),
        pointer(link.bn_bias),
        link.eps,
        pointer(given) if at_once else 0,
        link.activation if at_once else 0,
        link.slope,
        *shape,
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "deform_conv2d", x, offset, mask, weight)
    stats = given if stats is None else stats
    if at_once or (stats is None and link.activation == 0):
        return z, stats, z
    y = empty_nhwc(z.shape, z) if save else z
    return batch_norm_apply(Source(z, stats, link.activation, link.slope), y), stats, z


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
    native, _ = module()
    grad, x, offset, mask = nhwc(grad), nhwc(x), nhwc(offset), nhwc(mask)
    weight = link.weight
    z = grad if z is None else z
    sums = None
    if link.batch_statistics or any(needs[4:]):
        sums = batch_norm_reduce(grad, Source(z, stats, link.activation, link.slope))
    grads = [
        torch.empty_like(t) if needed else None for t, needed in zip((x, offset, mask, weight), needs)
    ]  # x, offset and mask are NHWC
    if any(needs[:4]):
        shape = (*x.shape, *weight.shape[:1], *weight.shape[2:], link.stride, link.padding)
        dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
        memory = workspace(native.ff_cpu_deform_conv_workspace(1, *shape, dtype, threads))
        code = native.ff_cpu_deform_conv_backward(
            grad.data_ptr(),
            z.data_ptr(),
            pointer(stats),
            pointer(sums),
            link.batch_statistics,
            link.activation,
            link.slope,
            link.eps,
            x.data_ptr(),
            offset.data_ptr(),
            mask.data_ptr(),
            weight.data_ptr(),
            *(pointer(g) for g in grads),
            *shape,
            memory.data_ptr(),
            dtype,
            threads,
        )
        check(code, "deform_conv2d backward", x, offset, mask, weight)
    grads += [None] * 3 if sums is None else link_gradients(link, stats, sums, needs[4:], batch_norm_gradients)
    return [g for g, needed in zip(grads, needs) if needed]
