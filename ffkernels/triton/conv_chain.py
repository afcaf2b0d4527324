"""Chains of convolution, batch normalisation and activation in Triton. See ops/conv_chain.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..ops.conv_chain import Link, nhwc
from .batch_norm import Affine, Source, apply, given_statistics, reduce
from .common import empty_nhwc, on_device
from .conv import Geometry, Output, conv_forward, conv_input_gradient, conv_weight_gradient
from .separable import fits, separable_forward


def affine_of(link: Link) -> Affine:
    return Affine(link.bn_weight, link.bn_bias, link.eps)


def geometry_of(link: Link) -> Geometry:
    return Geometry(link.stride, link.padding, link.groups)


def forward(
    x: Tensor, links: list[Link], save: bool, x_activation: int = 0
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of every link, and with ``save`` the raw output z of every link.

    The first link reads x_activation(x)."""
    with on_device(x):
        source = Source(nhwc(x), None, x_activation)
        all_stats: list[Tensor | None] = []
        raw: list[Tensor] = []
        held: Source | None = None  # what follows the link before, which runs in one kernel with this one
        for i, link in enumerate(links):
            stats = affine = after = None
            if link.given_statistics:
                stats = given_statistics(link.running_mean, link.running_var, affine_of(link))
            if link.batch_statistics:
                stats = torch.empty((4, link.weight.shape[0]), dtype=torch.float32, device=x.device)
                affine = affine_of(link)
            elif not save:
                after = Source(x, stats, link.activation, link.slope)
            all_stats.append(stats)
            if held is not None:
                source, held = Source(separable_forward(source, links[i - 1], held, link, after)), None
                continue
            if not save and i + 1 < len(links) and fits(link, links[i + 1]):
                held = after
                continue
            z = conv_forward(source, link.weight, link.bias, geometry_of(link), affine=affine, stats=stats, after=after)
            source = Source(z) if after is not None else Source(z, stats, link.activation, link.slope)
            if save and (i + 1 < len(links) or not source.plain):
                raw.append(z)
        if source.plain:
            return source.x, all_stats, raw
        return apply(source, empty_nhwc(source.x.shape, x) if save else source.x), all_stats, raw


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

        def sums_for(i: int) -> tuple[float, bool] | None:
            wanted = links[i].batch_statistics or any(needs[2 + 4 * i : 5 + 4 * i])
            return (links[i].eps, links[i].batch_statistics) if wanted else None

        last = len(links) - 1
        # The gradient of the last output still has its activation in front of it; the convolution undoes it.
        joined = reduce(grad, outputs[last], *sums_for(last)) if sums_for(last) else None
        for i in range(last, -1, -1):
            link, output, marks = links[i], outputs[i], needs[2 + 4 * i : 5 + 4 * i]
            if i < last:
                output = output._replace(activation=0)
            if joined is not None:
                grads[2 + 4 * i : 5 + 4 * i] = link_gradients(link, output.stats, joined.sums, marks)
            source = Source(x, None, x_activation) if i == 0 else outputs[i - 1]
            behind = Output(grad, output, None if joined is None else joined.coefficients)
            if needs[1 + 4 * i]:
                grads[1 + 4 * i] = conv_weight_gradient(behind, link.weight, geometry_of(link), source)
            if not any(needs[: 1 + 4 * i]):
                break
            grad = empty_nhwc(source.x.shape, x)
            joined = conv_input_gradient(
                behind, link.weight, geometry_of(link), source, grad, sums_for=sums_for(i - 1) if i else None
            )
        else:
            grads[0] = grad
    return [g for g, needed in zip(grads, needs) if needed]
