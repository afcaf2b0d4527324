"""Chains of convolution, batch normalisation and activation on a CUDA device. See ops/conv_chain.py.

``stats`` is (4, C) in float32: mean, biased variance, scale, shift; ``sums`` is (2, C) in float64: the sums of g and of
g * (z - mean), g being the gradient of the normalisation's output. Tensors are NHWC.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..native import DTYPES, NOT_SERVED, check, module
from ..ops.conv_chain import Link, nhwc
from . import on_device, stream


class Source(NamedTuple):
    """An input as a kernel reads it: act((x - mean) * scale + shift); without stats and activation, x itself."""

    x: Tensor
    stats: Tensor | None = None
    activation: int = 0
    slope: float = 0.0

    @property
    def plain(self) -> bool:
        return self.stats is None and self.activation == 0

    def arguments(self) -> tuple[int, int, int, float]:
        return self.x.data_ptr(), *self.norm()

    def norm(self) -> tuple[int, int, float]:
        return pointer(self.stats), self.activation, self.slope


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pixels(x: Tensor) -> tuple[int, int]:
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]


def conv_shape(x: Tensor, link: Link) -> tuple[int, ...]:
    return *x.shape, link.weight.shape[0], link.weight.shape[2], link.stride, link.padding, link.groups


def empty_nhwc(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def conv_forward(source: Source, link: Link, after: Source | None) -> Tensor:
    """The convolution of ``source``; ``after`` gives the stats and activation to apply before it is stored."""
    native, _ = module()
    x = source.x
    z = empty_nhwc((x.shape[0], link.weight.shape[0], *link.output_size(*x.shape[2:])), x)
    code = native.ff_cuda_conv_forward(
        *source.arguments(),
        link.weight.data_ptr(),
        pointer(link.bias),
        z.data_ptr(),
        *(after.norm() if after else (0, 0, 0.0)),
        *conv_shape(x, link),
        DTYPES[x.dtype],
        stream(x),
    )
    check(code, "conv_chain", x, link.weight)
    return z


def block_forward(source: Source, links: list[Link], stats: list[Tensor | None]) -> Tensor | None:
    """The output of a 3x3 depthwise and a 1x1 convolution by one kernel; None where it does not serve them."""
    x = source.x
    if len(links) < 2 or x.dtype not in (torch.float16, torch.bfloat16) or not source.plain:
        return None
    depthwise, pointwise = links
    channels = x.shape[1]
    if not (
        depthwise.weight.shape == (channels, 1, 3, 3)
        and (depthwise.groups, depthwise.padding) == (channels, 1)
        and pointwise.weight.shape[1:] == (channels, 1, 1)
        and (pointwise.stride, pointwise.padding) == (1, 0)
        and not (depthwise.batch_statistics or pointwise.batch_statistics)
    ):
        return None
    native, _ = module()
    y = empty_nhwc((x.shape[0], pointwise.weight.shape[0], *depthwise.output_size(*x.shape[2:])), x)
    code = native.ff_cuda_depthwise_separable_eval(
        x.data_ptr(),
        depthwise.weight.data_ptr(),
        pointer(depthwise.bias),
        *Source(x, stats[0], depthwise.activation, depthwise.slope).norm(),
        pointwise.weight.data_ptr(),
        pointer(pointwise.bias),
        y.data_ptr(),
        *Source(y, stats[1], pointwise.activation, pointwise.slope).norm(),
        *x.shape,
        pointwise.weight.shape[0],
        depthwise.stride,
        DTYPES[x.dtype],
        stream(x),
    )
    if code == NOT_SERVED:
        return None
    check(code, "depthwise_separable", x, depthwise.weight, pointwise.weight)
    return y


def normalisation_dtype(link: Link) -> int:
    """The code of the dtype that a link's normalisation tensors share."""
    tensors = link.running_mean, link.bn_weight, link.bn_bias
    return next((DTYPES[t.dtype] for t in tensors if t is not None), DTYPES[torch.float32])


def batch_statistics(z: Tensor, link: Link) -> Tensor:
    native, _ = module()
    stats = torch.empty((4, z.shape[1]), dtype=torch.float32, device=z.device)
    workspace = stats.new_empty(native.ff_cuda_batch_norm_workspace(*pixels(z)), dtype=torch.uint8)
    code = native.ff_cuda_batch_norm_statistics(
        z.data_ptr(),
        pointer(link.bn_weight),
        pointer(link.bn_bias),
        link.eps,
        stats.data_ptr(),
        *pixels(z),
        workspace.data_ptr(),
        DTYPES[z.dtype],
        normalisation_dtype(link),
        stream(z),
    )
    check(code, "batch_norm statistics", z)
    return stats


def given_statistics(links: Sequence[Link]) -> list[Tensor | None]:
    """``stats`` of every link by one kernel, None where they are not given."""
    given = [link for link in links if link.given_statistics]
    if not given:
        return [None] * len(links)
    native, _ = module()
    mean = given[0].running_mean
    all_stats = [mean.new_empty((4, link.weight.shape[0]), dtype=torch.float32) for link in given]
    layers = array("q")
    for link, stats in zip(given, all_stats):
        tensors = link.running_mean, link.running_var, link.bn_weight, link.bn_bias
        layers.extend([*(pointer(t) for t in tensors), stats.shape[1], normalisation_dtype(link), pointer(stats)])
    eps = array("d", [link.eps for link in given])
    code = native.ff_cuda_batch_norm_coefficients(
        layers.buffer_info()[0], eps.buffer_info()[0], len(given), stream(mean)
    )
    check(code, "batch_norm coefficients", mean)
    remaining = iter(all_stats)
    return [next(remaining) if link.given_statistics else None for link in links]


def batch_norm_apply(source: Source, out: Tensor) -> Tensor:
    """``out``, which may be ``source.x``, becomes what ``source`` describes."""
    native, _ = module()
    code = native.ff_cuda_batch_norm_apply(
        *source.arguments(), out.data_ptr(), *pixels(out), DTYPES[out.dtype], stream(out)
    )
    check(code, "batch_norm apply", out)
    return out


def batch_norm_reduce(grad: Tensor, output: Source) -> Tensor:
    """``sums`` where ``grad`` is the gradient of ``output.activation``'s result."""
    native, _ = module()
    sums = torch.empty((2, grad.shape[1]), dtype=torch.float64, device=grad.device)
    workspace = sums.new_empty(native.ff_cuda_batch_norm_workspace(*pixels(grad)), dtype=torch.uint8)
    code = native.ff_cuda_batch_norm_reduce(
        grad.data_ptr(),
        *output.arguments(),
        sums.data_ptr(),
        *pixels(grad),
        workspace.data_ptr(),
        DTYPES[grad.dtype],
        stream(grad),
    )
    check(code, "batch_norm reduce", grad)
    return sums


def batch_norm_backward(grad: Tensor, output: Source, sums: Tensor | None, eps: float) -> Tensor:
    """The gradient of z = ``output.x``; ``sums`` is None unless the statistics were the batch's own."""
    if output.plain:
        return grad
    native, _ = module()
    out = torch.empty_like(grad)
    x, stats, activation, slope = output.arguments()
    code = native.ff_cuda_batch_norm_backward(
        grad.data_ptr(),
        x,
        stats,
        pointer(sums),
        activation,
        slope,
        eps,
        out.data_ptr(),
        *pixels(grad),
        DTYPES[grad.dtype],
        stream(grad),
    )
    check(code, "batch_norm backward", grad)
    return out


def conv_input_gradient(grad: Tensor, source: Source, link: Link) -> Tensor:
    """The gradient of the argument of ``source.activation``."""
    native, _ = module()
    out = torch.empty_like(source.x)
    code = native.ff_cuda_conv_input_gradient(
        grad.data_ptr(),
        link.weight.data_ptr(),
        *source.arguments(),
        out.data_ptr(),
        *conv_shape(source.x, link),
        DTYPES[grad.dtype],
        stream(grad),
    )
    check(code, "conv_chain input gradient", grad, link.weight)
    return out


def conv_weight_gradient(grad: Tensor, source: Source, link: Link) -> Tensor:
    native, _ = module()
    shape = conv_shape(source.x, link)
    out = torch.empty_like(link.weight)
    size = native.ff_cuda_conv_weight_gradient_workspace(*shape, DTYPES[grad.dtype])
    workspace = grad.new_empty(size, dtype=torch.uint8)
    code = native.ff_cuda_conv_weight_gradient(
        grad.data_ptr(),
        *source.arguments(),
        out.data_ptr(),
        *shape,
        workspace.data_ptr(),
        DTYPES[grad.dtype],
        stream(grad),
    )
    check(code, "conv_chain weight gradient", grad, link.weight)
    return out


def deferred(
    x: Tensor, links: list[Link], save: bool, x_activation: int = 0
) -> tuple[Source, list[Tensor | None], list[Tensor]]:
    """What :func:`forward` returns, the output's normalisation and activation yet to be applied."""
    source = Source(nhwc(x), None, x_activation)
    all_stats = given_statistics(links)
    raw: list[Tensor] = []
    i = 0
    while i < len(links):
        if not save and (y := block_forward(source, links[i : i + 2], all_stats[i : i + 2])) is not None:
            source = Source(y)
            i += 2
            continue
        link, stats = links[i], all_stats[i]
        at_once = not save and not link.batch_statistics
        z = conv_forward(source, link, Source(x, stats, link.activation, link.slope) if at_once else None)
        if link.batch_statistics:
            all_stats[i] = stats = batch_statistics(z, link)
        source = Source(z) if at_once else Source(z, stats, link.activation, link.slope)
        if save and (i + 1 < len(links) or not source.plain):
            raw.append(z)
        i += 1
    return source, all_stats, raw


def forward(
    x: Tensor, links: list[Link], save: bool, x_activation: int = 0
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of every link, and with ``save`` the raw output z of every link.

    The first link reads x_activation(x)."""
    with on_device(x):
        source, all_stats, raw = deferred(x, links, save, x_activation)
        if source.plain:
            return source.x, all_stats, raw
        return batch_norm_apply(source, torch.empty_like(source.x) if save else source.x), all_stats, raw


def backward(
    grad: Tensor,
    x: Tensor,
    links: list[Link],
    stats: list[Tensor | None],
    raw: list[Tensor],
    needs: list[bool],
    x_activation: int = 0,
) -> list[Tensor]:
    """Gradients of x and of weight, bias, bn_weight, bn_bias of every link, those that ``needs`` marks."""
    with on_device(x):
        x, grad = nhwc(x), nhwc(grad)
        raw = [*raw, grad][: len(links)]  # a last link without normalisation and activation has no use for z
        outputs = [Source(z, s, link.activation, link.slope) for z, s, link in zip(raw, stats, links)]
        grads: list[Tensor | None] = [None] * len(needs)
        for i in range(len(links) - 1, -1, -1):
            link, output, marks = links[i], outputs[i], needs[2 + 4 * i : 5 + 4 * i]
            if i + 1 < len(links):
                output = output._replace(activation=0)  # the next link's input gradient has undone it
            sums = batch_norm_reduce(grad, output) if link.batch_statistics or any(marks) else None
            if sums is not None:
                grads[2 + 4 * i : 5 + 4 * i] = link_gradients(link, output.stats, sums, marks)
            source = Source(x, None, x_activation) if i == 0 else outputs[i - 1]
            onward = any(needs[: 1 + 4 * i])
            if not onward and not needs[1 + 4 * i]:
                break
            grad_z = batch_norm_backward(grad, output, sums if link.batch_statistics else None, link.eps)
            if needs[1 + 4 * i]:
                grads[1 + 4 * i] = conv_weight_gradient(grad_z, source, link)
            if not onward:
                break
            grad = conv_input_gradient(grad_z, source, link)
        else:
            grads[0] = grad
    return [g for g, needed in zip(grads, needs) if needed]
