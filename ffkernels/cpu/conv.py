"""Calls into csrc/cpu/grouped_conv_bn_act.cpp and batch_norm.cpp: one convolution or normalisation at a time, NHWC.

A tensor called ``stats`` is (4, C): mean, biased variance, scale, shift, with ``y = (z - mean) * scale + shift``.
A tensor called ``sums`` is (2, C) in float64: the sums of g and of g * (z - mean), g the gradient of y.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch_norm import BatchNorm
from ..native import DTYPES, check, module

ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3}
"""``ff_activation`` of csrc/ff_api.h."""


class Source(NamedTuple):
    """An input as a convolution reads it: act((x - mean) * scale + shift); without stats and activation, x itself.

    ``x`` is a channels_last (B, C, H, W) tensor, or a slice of the channels of one.
    """

    x: Tensor
    stats: Tensor | None = None
    activation: int = 0
    slope: float = 0.0


class Geometry(NamedTuple):
    """Stride, padding and groups of a square convolution."""

    stride: int = 1
    padding: int = 0
    groups: int = 1

    def output(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        kernel = weight.shape[2]
        height, width = ((n + 2 * self.padding - kernel) // self.stride + 1 for n in x.shape[2:])
        return x.shape[0], weight.shape[0], height, width


LARGE = 1 << 15
"""Elements from which on a tensor lies in a kept buffer."""


_scratch = threading.local()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def empty_nhwc(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An NHWC tensor of float32 or float64; a large one lies in a kept buffer (csrc/buffers.h)."""
    if math.prod(shape) < LARGE:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    native, _ = module()
    return torch.from_dlpack(native.buffer_nhwc(*shape, like.itemsize))


def nhwc_view(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An NHWC tensor at the beginning of ``memory``, which is flat."""
    batch, channels, height, width = shape
    return memory[: math.prod(shape)].view(batch, height, width, channels).permute(0, 3, 1, 2)


def pixel(x: Tensor) -> int:
    """Elements between neighbouring pixels of an NHWC tensor or of a slice of its channels."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def workspace(size: int) -> Tensor:
    """Scratch memory of at least ``size`` bytes, the thread's own; the next call may return the same."""
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.nbytes < size:
        memory = _scratch.memory = torch.empty(size, dtype=torch.uint8)
    return memory


def conv_forward(
    source: Source,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    bn: tuple[Tensor | None, Tensor | None, float] | None = None,
    after: Source | None = None,
) -> tuple[Tensor, Tensor | None]:
    """z = conv(source), and its statistics where ``bn`` (weight, bias, eps) asks for them.

    ``after`` gives the stats and activation to apply before z is stored; its ``x`` is not read.
    """
    native, _ = module()
    x = source.x
    shape = (*x.shape, weight.shape[0], weight.shape[2], *geometry)
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    z = empty_nhwc(geometry.output(x, weight), x)
    stats = None if bn is None else torch.empty((4, z.shape[1]), dtype=x.dtype)
    bn_weight, bn_bias, eps = bn or (None, None, 0.0)
    memory = workspace(native.ff_cpu_conv_workspace(0, *shape, dtype, threads))
    code = native.ff_cpu_conv_forward(
        x.data_ptr(),
        pixel(x),
        pointer(source.stats),
        source.activation,
        source.slope,
        weight.data_ptr(),
        pointer(bias),
        z.data_ptr(),
        pointer(stats),
        pointer(bn_weight),
        pointer(bn_bias),
        eps,
        pointer(after.stats) if after else 0,
        after.activation if after else 0,
        after.slope if after else 0.0,
        *shape,
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "grouped_conv_bn_act", x, weight)
    return z, stats


def conv_backward(
    grad: Tensor,
    output: Source,
    sums: Tensor | None,
    eps: float,
    source: Source,
    weight: Tensor,
    geometry: Geometry,
    *,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    x_sums: Tensor | None = None,
) -> None:
    """The backward pass of :func:`conv_forward`; fills ``grad_x``, ``grad_weight`` and ``x_sums``.

    ``grad`` is the gradient of the normalisation's output, or of ``output.activation`` behind it where that is not 0.
    ``output.x`` is z and ``output.stats`` its statistics (None: no normalisation); ``sums`` is None unless those were
    the batch's own. ``grad_x`` is the gradient of the argument of ``source.activation``.
    """
    native, _ = module()
    x, z = source.x, output.x
    shape = (*x.shape, weight.shape[0], weight.shape[2], *geometry)
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    memory = workspace(native.ff_cpu_conv_workspace(1, *shape, dtype, threads))
    code = native.ff_cpu_conv_backward(
        grad.data_ptr(),
        pixel(grad),
        z.data_ptr(),
        pixel(z),
        pointer(output.stats),
        pointer(sums),
        sums is not None,
        output.activation,
        output.slope,
        eps,
        x.data_ptr(),
        pixel(x),
        pointer(source.stats),
        source.activation,
        source.slope,
        weight.data_ptr(),
        pointer(grad_x),
        0 if grad_x is None else pixel(grad_x),
        pointer(x_sums),
        pointer(grad_weight),
        *shape,
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "grouped_conv_bn_act backward", x, weight)


def batch_norm_stats(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``stats`` of given statistics, such as the running ones."""
    native, _ = module()
    stats = torch.empty((4, mean.shape[0]), dtype=mean.dtype)
    code = native.ff_cpu_batch_norm_coefficients(
        mean.data_ptr(),
        var.data_ptr(),
        pointer(weight),
        pointer(bias),
        eps,
        mean.shape[0],
        stats.data_ptr(),
        DTYPES[mean.dtype],
    )
    check(code, "batch_norm_stats", mean)
    return stats


def batch_norm_update(uses: Sequence[tuple[BatchNorm, Tensor, Tensor, int]]) -> None:
    """:func:`ffkernels.batch_norm.update_running_statistics` of dense tensors of one dtype per normalisation."""
    native, _ = module()
    for bn, mean, var, count in uses:
        code = native.ff_cpu_batch_norm_update(
            mean.data_ptr(),
            var.data_ptr(),
            count / (count - 1),
            bn.momentum,
            bn.running_mean.data_ptr(),
            bn.running_var.data_ptr(),
            mean.shape[0],
            DTYPES[mean.dtype],
        )
        check(code, "batch_norm_update", mean)
    torch.autograd.graph.increment_version([t for bn, *_ in uses for t in (bn.running_mean, bn.running_var)])


def batch_norm_gradients(
    sums: Tensor, stats: Tensor, eps: float, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the normalisation's weight and bias, those that are wanted."""
    native, _ = module()
    channels = stats.shape[1]
    weight, bias = (stats.new_empty(channels) if needed else None for needed in (needs_weight, needs_bias))
    code = native.ff_cpu_batch_norm_gradients(
        sums.data_ptr(),
        sums.stride(0),
        stats.data_ptr(),
        stats.stride(0),
        eps,
        channels,
        pointer(weight),
        pointer(bias),
        DTYPES[stats.dtype],
    )
    check(code, "batch_norm_gradients", stats)
    return weight, bias


def _pixels(z: Tensor) -> tuple[int, int]:
    return z.shape[0] * z.shape[2] * z.shape[3], z.shape[1]


def batch_norm_apply(source: Source, out: Tensor) -> Tensor:
    """out = act((x - mean) * scale + shift); ``out`` is NHWC like ``source.x``, and may be it."""
    native, _ = module()
    z, dtype, threads = source.x, DTYPES[source.x.dtype], torch.get_num_threads()
    memory = workspace(native.ff_cpu_batch_norm_workspace(z.shape[1], dtype, threads))
    code = native.ff_cpu_batch_norm_apply(
        z.data_ptr(),
        pointer(source.stats),
        source.activation,
        source.slope,
        out.data_ptr(),
        *_pixels(z),
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "batch_norm_apply", z)
    return out


def batch_norm_reduce(grad: Tensor, output: Source, g: Tensor | None = None) -> Tensor:
    """``sums`` of g = grad * act'(y), y = (z - mean) * scale + shift; g itself into ``g`` if given."""
    native, _ = module()
    z, dtype, threads = output.x, DTYPES[output.x.dtype], torch.get_num_threads()
    sums = torch.empty((2, z.shape[1]), dtype=torch.float64)
    memory = workspace(native.ff_cpu_batch_norm_workspace(z.shape[1], dtype, threads))
    code = native.ff_cpu_batch_norm_reduce(
        grad.data_ptr(),
        z.data_ptr(),
        pointer(output.stats),
        output.activation,
        output.slope,
        pointer(g),
        sums.data_ptr(),
        *_pixels(z),
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "batch_norm_reduce", z)
    return sums
