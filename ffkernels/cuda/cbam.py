"""Calls into csrc/cuda/cbam.cu, and the convolution and batch normalisation of the spatial maps between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..native import DTYPES, check, module
from ..ops.cbam import Application
from ..ops.conv_chain import BATCH_STATISTICS, GIVEN_STATISTICS, Link, nhwc
from . import on_device, stream
from .conv_chain import (
    Source,
    batch_norm_backward,
    batch_norm_reduce,
    batch_statistics,
    conv_forward,
    conv_input_gradient,
    conv_weight_gradient,
    empty_nhwc,
    given_statistics,
    pointer,
)


def _link(app: Application) -> Link:
    """The spatial convolution and its normalisation."""
    weight = app.conv_weight
    mode = BATCH_STATISTICS if app.training else GIVEN_STATISTICS
    norm = app.bn_weight, app.bn_bias, app.running_mean, app.running_var
    return Link(weight, None, *norm, 1, weight.shape[2] // 2, len(weight), 0, mode, 0.0, app.eps)


def _sizes(x: Tensor, app: Application) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    return batch, channels, height * width, *app.fc1_weight.shape


def _mlp(app: Application) -> tuple[int, ...]:
    return tuple(pointer(t) for t in (app.fc1_weight, app.fc1_bias, app.fc2_weight, app.fc2_bias))


def _workspace(x: Tensor, app: Application) -> Tensor:
    native, _ = module()
    return torch.empty(native.ff_cuda_cbam_workspace(*_sizes(x, app)), dtype=torch.uint8, device=x.device)


def _updated(app: Application, stats: Tensor, values: int) -> list[Tensor]:
    batch = stats[0], stats[1] * (values / (values - 1))
    running = app.running_mean, app.running_var
    return [torch.lerp(old, new, app.momentum) for old, new in zip(running, batch) if old is not None]


def forward(x: Tensor, residual: Tensor | None, app: Application) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output (NHWC), the running statistics after it, and what the backward pass needs."""
    native, _ = module()
    x = nhwc(x)
    residual = x if app.residual_is_x else None if residual is None else nhwc(residual)
    batch, channels, height, width = x.shape
    link, groups, dtype = _link(app), len(app.conv_weight), DTYPES[x.dtype]
    like = app.conv_weight
    with on_device(x):
        pooled, gate = like.new_empty((2, batch, channels)), like.new_empty((batch, channels))
        maps = empty_nhwc((batch, 2 * groups, height, width), like)
        memory = _workspace(x, app)
        code = native.ff_cuda_cbam_maps(
            x.data_ptr(),
            *_mlp(app),
            pooled.data_ptr(),
            gate.data_ptr(),
            maps.data_ptr(),
            *_sizes(x, app),
            groups,
            app.order,
            memory.data_ptr(),
            dtype,
            stream(x),
        )
        check(code, "cbam", x)
        z = conv_forward(Source(maps), link, None)
        stats = batch_statistics(z, link) if app.training else given_statistics([link])[0]
        spatial, y = torch.empty_like(z), empty_nhwc(x.shape, x)
        code = native.ff_cuda_cbam_apply(
            x.data_ptr(),
            gate.data_ptr(),
            z.data_ptr(),
            stats.data_ptr(),
            pointer(residual),
            app.relu,
            spatial.data_ptr(),
            y.data_ptr(),
            batch,
            channels,
            height * width,
            groups,
            dtype,
            stream(x),
        )
        check(code, "cbam", x)
        running = _updated(app, stats, batch * height * width) if app.training else []
    return y, running, [pooled, gate, stats, maps, z, spatial]


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, app: Application, saved: list[Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, bn_weight, bn_bias.

    ``y`` is the output where it ended in a ReLU."""
    native, _ = module()
    grad, x = nhwc(grad), nhwc(x)
    y = None if y is None else nhwc(y)
    pooled, gate, stats, maps, z, spatial = saved
    batch, channels, height, width = x.shape
    link, groups, dtype = _link(app), len(app.conv_weight), DTYPES[x.dtype]
    grad_residual = None
    if needs[1]:
        grad_residual = grad.clone() if y is None else torch.ops.aten.threshold_backward(grad, y, 0)
    if not any((needs[0], *needs[2:])):
        return [None, grad_residual, *[None] * 7]
    with on_device(x):
        grad_normalised, shares = torch.empty_like(z), torch.empty_like(z)
        code = native.ff_cuda_cbam_spatial_gradient(
            grad.data_ptr(),
            pointer(y),
            x.data_ptr(),
            gate.data_ptr(),
            maps.data_ptr(),
            spatial.data_ptr(),
            grad_normalised.data_ptr(),
            shares.data_ptr(),
            batch,
            channels,
            height * width,
            groups,
            app.order,
            dtype,
            stream(x),
        )
        check(code, "cbam backward", x)
        output = Source(z, stats)
        sums = batch_norm_reduce(grad_normalised, output)
        _, bn_weight, bn_bias = link_gradients(link, stats, sums, [False, *needs[7:]])
        grad_z = batch_norm_backward(grad_normalised, output, sums if app.training else None, app.eps)
        conv_weight = conv_weight_gradient(grad_z, Source(maps), link) if needs[6] else None
        grad_x = empty_nhwc(x.shape, x) if needs[0] else None
        params = [None] * 4
        if needs[0] or any(needs[2:6]):
            grad_maps = conv_input_gradient(grad_z, Source(maps), link)
            hidden, mlp_width = app.fc1_weight.shape
            params = [gate.new_empty(size) for size in ((hidden, mlp_width), hidden, (mlp_width, hidden), mlp_width)]
            memory = _workspace(x, app)
            code = native.ff_cuda_cbam_backward(
                grad.data_ptr(),
                pointer(y),
                x.data_ptr(),
                *_mlp(app),
                pooled.data_ptr(),
                gate.data_ptr(),
                maps.data_ptr(),
                grad_maps.data_ptr(),
                spatial.data_ptr(),
                shares.data_ptr(),
                app.residual_is_x,
                pointer(grad_x),
                *(p.data_ptr() for p in params),
                *_sizes(x, app),
                groups,
                app.order,
                memory.data_ptr(),
                dtype,
                stream(x),
            )
            check(code, "cbam backward", x)
    found = [grad_x, grad_residual, *params, conv_weight, bn_weight, bn_bias]
    return [g if needed else None for g, needed in zip(found, needs)]
