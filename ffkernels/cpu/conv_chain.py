"""Chains of convolution, batch normalisation and activation on the CPU. See ops/conv_chain.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.conv_chain import Link, nhwc
from .conv import (
    Geometry,
    Source,
    batch_norm_apply,
    batch_norm_gradients,
    batch_norm_reduce,
    batch_norm_stats,
    conv_backward,
    conv_forward,
    empty_nhwc,
    nhwc_view,
)


def forward(
    x: Tensor, links: list[Link], save: bool, x_activation: int = 0
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of every link, and with ``save`` the raw output z of every link.

    The first link reads x_activation(x)."""
    source = Source(nhwc(x), None, x_activation)
    all_stats: list[Tensor | None] = []
    raw: list[Tensor] = []
    for i, link in enumerate(links):
        geometry = Geometry(link.stride, link.padding, link.groups)
        bn = (link.bn_weight, link.bn_bias, link.eps) if link.batch_statistics else None
        stats = None
        if link.given_statistics:
            stats = batch_norm_stats(link.running_mean, link.running_var, link.bn_weight, link.bn_bias, link.eps)
        after = None
        if not save and bn is None:
            after = Source(x, stats, link.activation, link.slope)
        z, batch_stats = conv_forward(source, link.weight, link.bias, geometry, bn=bn, after=after)
        stats = batch_stats if bn else stats
        all_stats.append(stats)
        if after is not None or (stats is None and link.activation == 0):
            source = Source(z)
        else:
            source = Source(z, stats, link.activation, link.slope)
        if save and (i + 1 < len(links) or source.stats is not None or source.activation):
            raw.append(z)
    if source.stats is None and source.activation == 0:
        return source.x, all_stats, raw
    return batch_norm_apply(source, empty_nhwc(source.x.shape, x) if save else source.x), all_stats, raw


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
    x = nhwc(x)
    grad = nhwc(grad)
    raw = [*raw, grad][: len(links)]  # a last link without normalisation and activation has no use for z
    outputs = [Source(z, s, link.activation, link.slope) for z, s, link in zip(raw, stats, links)]
    grads: list[Tensor | None] = [None] * len(needs)

    def wants_sums(i: int) -> bool:
        return links[i].batch_statistics or any(needs[2 + 4 * i : 5 + 4 * i])

    last = len(links) - 1
    # Gradients inside the chain take turns in two buffers, which stay in the cache.
    largest = max((z.numel() for z in raw[:-1]), default=0)
    turns = [empty_nhwc((1, 1, 1, largest), x).flatten() for _ in range(min(last, 2))]
    # The gradient of the last output still has its activation in front of it; the convolution undoes it as it reads.
    sums = batch_norm_reduce(grad, outputs[last]) if wants_sums(last) else None
    for i in range(last, -1, -1):
        link, output = links[i], outputs[i]
        if i < last:
            output = output._replace(activation=0)
        if sums is not None:
            marks = slice(2 + 4 * i, 5 + 4 * i)
            grads[marks] = link_gradients(link, output.stats, sums, needs[marks], batch_norm_gradients)
        source = Source(x, None, x_activation) if i == 0 else outputs[i - 1]
        wanted = any(needs[: 1 + 4 * i])
        if not wanted and not needs[1 + 4 * i]:
            break
        grad_x = None
        if wanted:
            grad_x = nhwc_view(turns[i % len(turns)], source.x.shape) if i else empty_nhwc(source.x.shape, x)
        grad_weight = torch.empty_like(link.weight) if needs[1 + 4 * i] else None
        x_sums = (
            torch.empty((2, source.x.shape[1]), dtype=torch.float64) if i and wanted and wants_sums(i - 1) else None
        )
        conv_backward(
            grad,
            output,
            sums if link.batch_statistics else None,
            link.eps,
            source,
            link.weight,
            Geometry(link.stride, link.padding, link.groups),
            grad_x=grad_x,
            grad_weight=grad_weight,
            x_sums=x_sums,
        )
        grads[1 + 4 * i] = grad_weight
        if not wanted:
            break
        grad, sums = grad_x, x_sums
    else:
        grads[0] = grad
    return [g for g, needed in zip(grads, needs) if needed]


def affine_gradients(
    sums: Tensor, stats: Tensor, eps: float, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`ffkernels.cpu.conv.batch_norm_gradients` on any device, in float64."""
    weight = sums[1] * (stats[1].double() + eps).rsqrt_() if needs_weight else None
    return weight, sums[0] if needs_bias else None


def link_gradients(
    link: Link,
    stats: Tensor | None,
    sums: Tensor,
    needs: list[bool],
    affine: Callable[..., tuple[Tensor | None, Tensor | None]] = affine_gradients,
) -> list[Tensor | None]:
    """Gradients of bias, bn_weight and bn_bias from the sums of g and of g * (z - mean); ``affine`` makes the two."""
    bias = weight = bn_bias = None
    if needs[0]:
        if link.batch_statistics:
            bias = torch.zeros_like(link.bias)  # a constant per channel vanishes when the mean is subtracted
        else:
            bias = sums[0] if stats is None else sums[0] * stats[2]
    if stats is not None:
        weight, bn_bias = affine(sums, stats, link.eps, needs[1], needs[2])
    return [g if g is None else g.to(link.weight.dtype) for g in (bias, weight, bn_bias)]
