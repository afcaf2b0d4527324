"""Memory of NHWC tensors, and calls into csrc/cpu/batch_norm.cpp, one at a time.

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
    """act((x - mean) * scale + shift) of an NHWC tensor; without stats and activation, x itself."""

    x: Tensor
    stats: Tensor | None = None
    activation: int = 0
    slope: float = 0.0


LARGE = 1 << 15
"""Elements from which on a tensor lies in a kept buffer."""


_scratch = threading.local()


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def empty_nhwc(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An NHWC tensor of float32 or float64; a large one on the CPU lies in a kept buffer (csrc/buffers.h)."""
    if math.prod(shape) < LARGE or not like.is_cpu:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    native, _ = module()
    return torch.from_dlpack(native.buffer_nhwc(*shape, like.itemsize))


def workspace(size: int) -> Tensor:
    """Scratch memory of at least ``size`` bytes, the thread's own; the next call may return the same."""
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.nbytes < size:
        memory = _scratch.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory


def batch_norm_stats(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``stats`` of given statistics, such as the running ones."""
    native, _ = module()
    stats = mean.new_empty((4, mean.shape[0]))
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


def batch_norm_update(uses: Sequence[tuple[BatchNorm, int, int, int]]) -> None:
    """Running statistics of (bn, address of the mean, of the biased variance, values per channel)."""
    native, _ = module()
    changed = []
    for bn, mean, var, count in uses:
        if bn.running_mean is None:
            continue
        code = native.ff_cpu_batch_norm_update(
            mean,
            var,
            count / (count - 1),
            bn.momentum,
            bn.running_mean.data_ptr(),
            bn.running_var.data_ptr(),
            bn.running_mean.shape[0],
            DTYPES[bn.running_mean.dtype],
        )
        check(code, "batch_norm_update", bn.running_mean)
        changed += [bn.running_mean, bn.running_var]
    torch.autograd.graph.increment_version(changed)


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
        0,
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
    sums = z.new_empty((2, z.shape[1]), dtype=torch.float64)
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
