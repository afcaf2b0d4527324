"""Modulated deformable convolution on a CUDA device (csrc/cuda/deform_conv2d.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..fixed_point import scatter_sum
from ..native import DTYPES, check, module
from ..ops.conv_chain import Link, nhwc
from . import on_device, stream
from .conv_chain import (
    Source,
    batch_norm_apply,
    batch_norm_backward,
    batch_norm_reduce,
    batch_statistics,
    empty_nhwc,
    given_statistics,
    pointer,
)


def _shape(x: Tensor, link: Link) -> tuple[int, ...]:
    return *x.shape, link.weight.shape[0], *link.weight.shape[2:], link.stride, link.padding


def forward(x: Tensor, offset: Tensor, mask: Tensor, link: Link, save: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output (NHWC), its ``stats``, and the raw output z of the convolution, which may be the output itself."""
    native, _ = module()
    with on_device(x):
        x, offset, mask = nhwc(x), nhwc(offset), nhwc(mask)
        z = empty_nhwc((x.shape[0], link.weight.shape[0], *offset.shape[2:]), x)
        (stats,) = given_statistics([link])
        at_once = not save and not link.batch_statistics
        after = Source(z, stats, link.activation, link.slope) if at_once else Source(z)
        code = native.ff_cuda_deform_conv_forward(
            x.data_ptr(),
            offset.data_ptr(),
            mask.data_ptr(),
            link.weight.data_ptr(),
            pointer(link.bias),
            z.data_ptr(),
            *after.norm(),
            *_shape(x, link),
            DTYPES[x.dtype],
            stream(x),
        )
        check(code, "deform_conv2d", x, offset, mask, link.weight)
        if link.batch_statistics:
            stats = batch_statistics(z, link)
        source = Source(z, stats, link.activation, link.slope)
        if at_once or source.plain:
            return z, stats, z
        return batch_norm_apply(source, torch.empty_like(z) if save else z), stats, z


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
        sums = batch_norm_reduce(grad, output) if link.batch_statistics or any(needs[4:]) else None
        grads: list[Tensor | None] = [None] * 7
        if any(needs[:4]):
            grad_z = batch_norm_backward(grad, output, sums if link.batch_statistics else None, link.eps)
            if any(needs[:3]):
                grads[:3] = _sample_gradients(grad_z, x, offset, mask, link, needs[0])
            if needs[3]:
                grads[3] = _weight_gradient(grad_z, x, offset, mask, link)
        if sums is not None:
            grads[4:] = link_gradients(link, stats, sums, needs[4:])
        return [g for g, needed in zip(grads, needs) if needed]


def _sample_gradients(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, link: Link, needs_x: bool
) -> list[Tensor | None]:
    native, _ = module()
    grad_offset, grad_mask = torch.empty_like(offset), torch.empty_like(mask)
    largest = torch.zeros((), dtype=torch.int32, device=x.device)

    def run(scale: Tensor | None, total: Tensor | None) -> None:
        code = native.ff_cuda_deform_conv_sample_gradient(
            *(t.data_ptr() for t in (grad, x, offset, mask, link.weight, grad_offset, grad_mask, largest)),
            pointer(scale),
            pointer(total),
            *_shape(x, link),
            DTYPES[x.dtype],
            stream(x),
        )
        check(code, "deform_conv2d sample gradient", grad, x, offset, mask, link.weight)

    run(None, None)
    if not needs_x:
        return [None, grad_offset, grad_mask]
    return [scatter_sum(x, largest.view(torch.float32), 4 * mask.numel(), run), grad_offset, grad_mask]


def _weight_gradient(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, link: Link) -> Tensor:
    native, _ = module()
    shape = _shape(x, link)
    out = torch.empty_like(link.weight)
    workspace = grad.new_empty(native.ff_cuda_deform_conv_weight_workspace(*shape), dtype=torch.uint8)
    code = native.ff_cuda_deform_conv_weight_gradient(
        *(t.data_ptr() for t in (grad, x, offset, mask, out)),
        *shape,
        workspace.data_ptr(),
        DTYPES[grad.dtype],
        stream(grad),
    )
    check(code, "deform_conv2d weight gradient", grad, x, offset, mask)
    return out
