"""Calls into csrc/cpu/cbam.cpp; the batch normalisation of the few spatial maps is PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from ..ops.cbam import Application
from ..ops.conv_chain import nhwc
from .conv import empty_nhwc, pointer, workspace


def _shape(x: Tensor, app: Application) -> tuple[int, ...]:
    hidden, width = app.fc1_weight.shape
    groups, _, kernel, _ = app.conv_weight.shape
    return (*x.shape, hidden, width, groups, kernel, app.order)


def _mlp(app: Application) -> tuple[int, ...]:
    return tuple(pointer(t) for t in (app.fc1_weight, app.fc1_bias, app.fc2_weight, app.fc2_bias, app.conv_weight))


def forward(x: Tensor, residual: Tensor | None, app: Application) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output (NHWC), the running statistics after it, and what the backward pass needs."""
    native, _ = module()
    x = nhwc(x)
    residual = x if app.residual_is_x else None if residual is None else nhwc(residual)
    batch, channels, height, width = x.shape
    groups = app.conv_weight.shape[0]
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    pooled, gate = x.new_empty((2, batch, channels)), x.new_empty((batch, channels))
    maps, z = x.new_empty((batch, 2 * groups, height, width)), x.new_empty((batch, groups, height, width))
    memory = workspace(native.ff_cpu_cbam_workspace(0, *_shape(x, app), dtype, threads))
    code = native.ff_cpu_cbam_maps(
        x.data_ptr(),
        *_mlp(app),
        pooled.data_ptr(),
        gate.data_ptr(),
        maps.data_ptr(),
        z.data_ptr(),
        *_shape(x, app),
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "cbam", x)
    running = [t.clone() if app.training else t for t in (app.running_mean, app.running_var) if t is not None]
    normalised, mean, invstd = torch.native_batch_norm(
        z, app.bn_weight, app.bn_bias, *(running or (None, None)), app.training, app.momentum, app.eps
    )
    spatial = normalised.sigmoid_()
    y = empty_nhwc(x.shape, x)
    code = native.ff_cpu_cbam_apply(
        x.data_ptr(),
        gate.data_ptr(),
        spatial.data_ptr(),
        pointer(residual),
        app.relu,
        y.data_ptr(),
        batch,
        channels,
        height * width,
        groups,
        dtype,
        threads,
    )
    check(code, "cbam", x)
    return y, running if app.training else [], [pooled, gate, maps, z, mean, invstd, spatial]


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, app: Application, saved: list[Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, bn_weight, bn_bias.

    ``y`` is the output where it ended in a ReLU."""
    native, _ = module()
    grad, x = nhwc(grad), nhwc(x)
    y = None if y is None else nhwc(y)
    pooled, gate, maps, z, mean, invstd, spatial = saved
    batch, channels, height, width = x.shape
    groups = app.conv_weight.shape[0]
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    grad_residual = None
    if needs[1]:
        grad_residual = grad.clone() if y is None else torch.ops.aten.threshold_backward(grad, y, 0)
    if not any((needs[0], *needs[2:])):
        return [None, grad_residual, *[None] * 7]
    grad_spatial = torch.empty_like(spatial)
    code = native.ff_cpu_cbam_spatial_gradient(
        grad.data_ptr(),
        pointer(y),
        x.data_ptr(),
        gate.data_ptr(),
        grad_spatial.data_ptr(),
        batch,
        channels,
        height * width,
        groups,
        dtype,
        threads,
    )
    check(code, "cbam backward", x)
    grad_z, bn_weight, bn_bias = torch.ops.aten.native_batch_norm_backward(
        torch.ops.aten.sigmoid_backward(grad_spatial, spatial),
        z,
        app.bn_weight,
        app.running_mean,
        app.running_var,
        mean,
        invstd,
        app.training,
        app.eps,
        [True, needs[7], needs[8]],
    )
    grad_z = grad_z.contiguous()
    grad_x = empty_nhwc(x.shape, x) if needs[0] else None
    hidden, mlp_width = app.fc1_weight.shape
    sizes = ((hidden, mlp_width), (hidden,), (mlp_width, hidden), (mlp_width,))
    params = [torch.empty(size, dtype=torch.float64) for size in sizes]
    conv = torch.empty(app.conv_weight.shape, dtype=torch.float64) if needs[6] else None
    memory = workspace(native.ff_cpu_cbam_workspace(1, *_shape(x, app), dtype, threads))
    code = native.ff_cpu_cbam_backward(
        grad.data_ptr(),
        pointer(y),
        x.data_ptr(),
        *_mlp(app),
        pooled.data_ptr(),
        gate.data_ptr(),
        maps.data_ptr(),
        spatial.data_ptr(),
        grad_z.data_ptr(),
        app.residual_is_x,
        pointer(grad_x),
        *(p.data_ptr() for p in params),
        pointer(conv),
        *_shape(x, app),
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "cbam backward", x)
    found = [grad_x, grad_residual, *params, conv, bn_weight, bn_bias]
    return [g.to(x.dtype) if needed else None for g, needed in zip(found, needs)]
