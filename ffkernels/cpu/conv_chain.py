"""Chains of convolution, batch normalisation and activation on the CPU. See ops/conv_chain.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops.conv_chain import PARAMETERS, Link, needs_raw, nhwc
from ..ops.library import compact
from . import planned_conv as convs
from .op_plan import GRADIENTS, LinksPlan
from .plan import At, Map, Plan, cached
from .planned_conv import Conv, Operand


def record_forward(
    plan: Plan,
    x: Map,
    links: Sequence[Link],
    shapes: Sequence[tuple[int, ...]],
    stats: Sequence[At | None],
    raw: Sequence[Map | None] | None,
    y: Map,
    x_activation: int = 0,
) -> None:
    """y from x_activation(x). ``stats`` are to be computed, ``raw`` the raw outputs to be kept, None if none are."""
    source, last = Operand(x, None, x_activation), len(links) - 1
    turns: list[At] = []
    if raw is None and last > 0:
        sizes, size = [], x.shape
        for link, shape in zip(links[:-1], shapes):
            size = Conv.of(link, shape).output(size)
            sizes.append(math.prod(size))
        turns = [plan.scratch(max(sizes) * plan.itemsize) for _ in range(min(last, 2))]
    for i, link in enumerate(links):
        conv = Conv.of(link, shapes[i])
        size = conv.output(source.x.shape)
        z = None if raw is None else raw[i]
        if z is None:
            z = y if i == last else Map(turns[i % len(turns)], size, size[1])
        if link.given_statistics:
            convs.given_stats(plan, link, size[1], stats[i])
        result = Operand(z, stats[i], link.activation, link.slope)
        at_once = raw is None and not link.batch_statistics
        bn = (link.bn_weight, link.bn_bias, link.eps) if link.batch_statistics else (None, None, 0.0)
        computed = stats[i] if link.batch_statistics else None
        convs.forward(plan, source, conv, z, stats=computed, bn=bn, after=result if at_once else None)
        source = Operand(z) if at_once else result
    if not source.plain:
        convs.apply(plan, source, y)


def wants_sums(link: Link, needs: Sequence[bool]) -> bool:
    """Whether the backward pass of a link needs the sums of its gradient; ``needs`` are those of its tensors."""
    return link.batch_statistics or any(needs[1:])


def record_backward(
    plan: Plan,
    grad: Map,
    x: Map,
    links: Sequence[Link],
    shapes: Sequence[tuple[int, ...]],
    stats: Sequence[At | None],
    raw: Sequence[Map | None],
    grads: Sequence[At | None],
    x_activation: int = 0,
) -> None:
    """Fills ``grads``: of x, and of weight, bias, bn_weight and bn_bias of every link; None are not wanted."""
    # A last link without normalisation and activation has no use for z.
    outputs = [Operand(z or grad, s, link.activation, link.slope) for z, s, link in zip(raw, stats, links)]
    last = len(links) - 1
    # Gradients inside the chain take turns in two buffers, which stay in the cache.
    largest = max((math.prod(z.shape) for z in raw[:-1]), default=0)
    turns = [plan.scratch(largest * plan.itemsize) for _ in range(min(last, 2))]
    marks = [grads[1 + GRADIENTS * i : 1 + GRADIENTS * (i + 1)] for i in range(len(links))]
    # The gradient of the last output still has its activation in front of it; the convolution undoes it as it reads.
    sums = convs.reduce(plan, grad, outputs[last]) if wants_sums(links[last], marks[last]) else None
    for i in range(last, -1, -1):
        link, output = links[i], outputs[i]
        channels = output.x.shape[1]
        if i < last:
            output = output._replace(activation=0)
        if sums is not None:
            convs.affine_gradients(plan, link, output.stats, channels, sums, channels, channels, marks[i][1:])
        source = Operand(x, None, x_activation) if i == 0 else outputs[i - 1]
        wanted = any(g is not None for g in grads[: 1 + GRADIENTS * i])
        if not wanted and marks[i][0] is None:
            break
        size = source.x.shape
        grad_x = Map(turns[i % len(turns)] if i else grads[0], size, size[1]) if wanted else None
        x_sums = convs.sums_of(plan, size[1]) if i and wanted and wants_sums(links[i - 1], marks[i - 1]) else None
        convs.backward(
            plan,
            grad,
            output,
            sums if link.batch_statistics else None,
            link.eps,
            source,
            Conv.of(link, shapes[i]),
            grad_x=grad_x,
            grad_weight=marks[i][0],
            x_sums=x_sums,
        )
        if not wanted:
            break
        grad, sums = grad_x, x_sums


class ChainPlan(LinksPlan):
    """A chain for one size of its input. What it keeps: ``stats`` of every link, then its raw output, where needed."""

    op = "conv_chain"

    def __init__(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        integers: tuple[int, ...],
        floats: tuple[float, ...],
        shapes: tuple[tuple[int, ...], ...],
        present: tuple[bool, ...],
        save: bool,
    ) -> None:
        super().__init__(dtype, 1, present, integers, floats, shapes)
        self.size = size
        self.plan = plan = Plan(dtype)
        x, *_ = places = self.places(plan)
        y = plan.base()
        links = self.links(places)
        self.outputs = []
        for link, shape in zip(links, shapes):
            size = Conv.of(link, shape).output(size)
            self.outputs.append(size)
        self.output = size
        self.keeps_stats = [link.batch_statistics or (save and link.given_statistics) for link in links]
        self.keeps_raw = [save and needs_raw(links, i) for i in range(len(links))]
        stats = self._kept_stats(plan)
        raw = self._kept_raw(plan)
        for i, link in enumerate(links):
            if link.given_statistics and not save:
                stats[i] = plan.scratch(4 * shapes[i][0] * plan.itemsize)
        y = Map(y, size, size[1])
        record_forward(plan, Map(x, self.size, self.size[1]), links, shapes, stats, raw if save else None, y)
        for i, shape in enumerate(shapes):
            if self.keeps_stats[i]:
                self.kept.add(4, shape[0])
        for i, size in enumerate(self.outputs):
            if self.keeps_raw[i]:
                self.kept.add(*size)
        self.batch_statistics = [link.batch_statistics for link, keep in zip(links, self.keeps_stats) if keep]

    def statistics(self, kept: Tensor) -> list[tuple[int, int]]:
        """Addresses of the mean and variance of every link that normalises with those of the batch."""
        start = kept.data_ptr()
        return [
            (start + offset, start + offset + shape[1] * kept.itemsize)
            for offset, shape, used in zip(self.kept.offsets, self.kept.shapes, self.batch_statistics)
            if used
        ]

    def _kept_stats(self, plan: Plan) -> list[At | None]:
        return [plan.base() if keep else None for keep in self.keeps_stats]

    def _kept_raw(self, plan: Plan) -> list[Map | None]:
        return [Map(plan.base(), s, s[1]) if keep else None for s, keep in zip(self.outputs, self.keeps_raw)]

    def _plan_backward(self, needs: tuple[bool, ...]) -> Plan:
        plan = Plan(self.dtype)
        size = self.outputs[-1]
        grad = Map(plan.base(), size, size[1])
        x, *_ = places = self.places(plan)
        stats, raw = self._kept_stats(plan), self._kept_raw(plan)
        grads = self.gradients(self.wanted(plan, needs))
        x = Map(x, self.size, self.size[1])
        record_backward(plan, grad, x, self.links(places), self.shapes, stats, raw, grads)
        return plan


def chain_plan(
    x: Tensor, integers: Sequence[int], floats: Sequence[float], params: Sequence[Tensor | None], save: bool
) -> ChainPlan:
    return cached(
        ChainPlan,
        x.shape,
        x.dtype,
        tuple(integers),
        tuple(floats),
        tuple([w.shape for w in params[::PARAMETERS]]),
        (True, *[p is not None for p in params]),
        save,
    )


def numbers_of(links: Sequence[Link]) -> tuple[list[int], list[float], list[Tensor | None]]:
    """Links as the flat integers, floats and tensors of a raw op."""
    integers = [n for k in links for n in (k.stride, k.padding, k.groups, k.activation, k.normalisation)]
    floats = [v for k in links for v in (k.slope, k.eps)]
    return integers, floats, [p for link in links for p in link[:PARAMETERS]]


def forward(x: Tensor, links: list[Link], save: bool) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of every link, and with ``save`` the raw output z of every link."""
    x = nhwc(x)
    integers, floats, params = numbers_of(links)
    chain = chain_plan(x, integers, floats, params, save)
    y, kept = chain.raw_run([x, *params])
    remaining = iter(kept)
    stats = [next(remaining) if keep else None for keep in chain.keeps_stats]
    return y, stats, list(remaining)


def backward(
    grad: Tensor,
    x: Tensor,
    links: list[Link],
    stats: list[Tensor | None],
    raw: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x and of weight, bias, bn_weight, bn_bias of every link, those that ``needs`` marks."""
    x = nhwc(x)
    kept = [t.data_ptr() for t in (*stats, *raw) if t is not None]
    integers, floats, params = numbers_of(links)
    chain = chain_plan(x, integers, floats, params, True)
    return compact(chain.raw_backward(grad, [x, *params], kept, needs))


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
    found = zip((bias, weight, bn_bias), (link.bias, link.bn_weight, link.bn_bias))
    return [g if g is None else g.to(parameter.dtype) for g, parameter in found]
