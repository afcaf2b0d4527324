"""Calls into csrc/cpu/bifpn_node.cpp, and the convolutions behind the fusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import NHWC
from ..ops.bifpn_node import Fusion
from ..ops.conv_chain import PARAMETERS, Link, needs_raw, nhwc
from .conv import ACTIVATIONS
from .conv_chain import numbers_of, record_backward, record_forward
from .op_plan import LinksPlan
from .plan import At, Map, Plan, cached

SILU = ACTIVATIONS["silu"]
INPUTS = 3
AFFINE = ("bn_weight", "bn_bias", "running_mean", "running_var")


def arguments(inputs: Sequence[Tensor], fusion_weight: Tensor, fusion: Fusion) -> list[int | float]:
    """What the native entries begin with; inputs are NHWC, absent ones NULL."""
    pointers = [x.data_ptr() for x in inputs] + [0] * (INPUTS - len(inputs))
    return _arguments(pointers, [tuple(x.shape) for x in inputs], fusion_weight.data_ptr(), len(fusion_weight), fusion)


def _arguments(pointers: Sequence, sizes: Sequence[tuple], fusion_weight: object, weights: int, fusion: Fusion) -> list:
    missing = [0] * (INPUTS - len(sizes))
    return [
        *pointers,
        *fusion.resample,
        *missing,
        *[n for size in sizes for n in size[2:]],
        *missing,
        *missing,
        fusion_weight,
        weights,
        fusion.epsilon,
        int(fusion.same),
        *sizes[fusion.resample.index(0)],
    ]


def in_order_of_convolution(link: Link, groups: int) -> Link:
    """The normalisation of shuffled channels, for use in front of the shuffle."""
    if groups == 1:
        return link
    moved = {name: getattr(link, name) for name in AFFINE if getattr(link, name) is not None}
    return link._replace(**{name: t.view(-1, groups).T.flatten() for name, t in moved.items()})


class NodePlan(LinksPlan):
    """A node for one size of its inputs.

    Its tensors are the inputs, the fusion weight, and the parameters of the links. What it keeps: ``stats`` of the last
    link, in the order of the convolution and shuffled, the fused map, and the raw outputs of the links.
    """

    op = "bifpn_node"

    def __init__(
        self,
        sizes: tuple[tuple[int, ...], ...],
        dtype: torch.dtype,
        weights: int,
        fusion: Fusion,
        integers: tuple[int, ...],
        floats: tuple[float, ...],
        shapes: tuple[tuple[int, ...], ...],
        present: tuple[bool, ...],
        save: bool,
    ) -> None:
        super().__init__(dtype, len(sizes), present, integers, floats, shapes)
        self.sizes, self.weights, self.fusion, self.saves = sizes, weights, fusion, save
        self.target = sizes[fusion.resample.index(0)]
        self.plan = plan = Plan(dtype)
        places = self.places(plan)
        y, links = plan.base(), self.links(places)
        self.outputs = [(self.target[0], shape[0], *self.target[2:]) for shape in shapes]
        last = links[-1]
        channels = shapes[-1][0]
        self.output = self.outputs[-1]
        self.keeps_stats = last.batch_statistics or (save and last.given_statistics)
        self.keeps_raw = [save and needs_raw(links, i) for i in range(len(shapes))]
        stats, shuffled, v, raw = self._kept(plan)
        if last.given_statistics and not save:
            stats = plan.scratch(4 * channels * plan.itemsize)
        v = v or plan.scratch_map(self.target)
        plan.call("ff_cpu_bifpn_fuse", *self._arguments(places), v.at)
        links = self._in_order(plan, links)
        groups = fusion.shuffle_groups
        result = plan.scratch_map(self.output) if groups > 1 else Map(y, self.output, channels)
        every = [None] * (len(links) - 1) + [stats]
        record_forward(plan, v, links, shapes, every, raw if save else None, result, SILU)
        if groups > 1:
            self._shuffle(plan, result.at, y, self.output, groups)
            if last.batch_statistics:
                self._shuffle(plan, stats, shuffled, (1, channels, 1, 4), groups)
        if self.keeps_stats:
            self.kept.add(4, channels)
        if self.keeps_stats and groups > 1:
            self.kept.add(4, channels)
        if save:
            self.kept.add(*self.target)
            for size, keep in zip(self.outputs, self.keeps_raw):
                if keep:
                    self.kept.add(*size)

    def _arguments(self, places: Sequence[At | None]) -> list:
        count = len(self.sizes)
        pointers = [*places[:count], *[None] * (INPUTS - count)]
        return _arguments(pointers, self.sizes, places[count], self.weights, self.fusion)

    def _kept(self, plan: Plan) -> tuple[At | None, At | None, Map | None, list[Map | None]]:
        stats = plan.base() if self.keeps_stats else None
        shuffled = plan.base() if self.keeps_stats and self.fusion.shuffle_groups > 1 else None
        v = Map(plan.base(), self.target, self.target[1]) if self.saves else None
        raw = [Map(plan.base(), s, s[1]) if keep else None for s, keep in zip(self.outputs, self.keeps_raw)]
        return stats, shuffled, v, raw

    def _in_order(self, plan: Plan, links: Sequence[Link]) -> list[Link]:
        """Links whose last normalises in front of the shuffle."""
        groups, channels = self.fusion.shuffle_groups, self.shapes[-1][0]
        if groups == 1:
            return list(links)
        moved = {}
        for name in AFFINE:
            value = getattr(links[-1], name)
            if value is not None:
                moved[name] = plan.scratch(channels * plan.itemsize)
                self._shuffle(plan, value, moved[name], (1, channels, 1, 1), channels // groups)
        return [*links[:-1], links[-1]._replace(**moved)]

    def _shuffle(self, plan: Plan, source: At, target: At, size: Sequence[int], groups: int) -> None:
        batch, channels, height, width = size
        plan.call("ff_cpu_channel_shuffle", source, target, batch, channels, height * width, groups, NHWC)

    def _plan_backward(self, needs: tuple[bool, ...]) -> Plan:
        plan, count, groups = Plan(self.dtype), len(self.sizes), self.fusion.shuffle_groups
        channels = self.shapes[-1][0]
        grad = Map(plan.base(), self.output, channels)
        places = self.places(plan)
        links = self.links(places)
        stats, _, v, raw = self._kept(plan)
        targets = self.gradients(self.wanted(plan, needs))
        if groups > 1:
            plain = plan.scratch_map(self.output)
            self._shuffle(plan, grad.at, plain.at, self.output, channels // groups)
            grad = plain
        wanted = any(needs[: count + 1])
        chain = [plan.scratch(math.prod(self.target) * plan.itemsize) if wanted else None, *targets[count + 1 :]]
        shuffled = []
        for i in (-2, -1):
            if chain[i] is not None and groups > 1:
                inner = plan.scratch(channels * plan.itemsize)
                shuffled.append((inner, chain[i]))
                chain[i] = inner
        every = [None] * (len(links) - 1) + [stats]
        record_backward(plan, grad, v, self._in_order(plan, links), self.shapes, every, raw, chain, SILU)
        for source, target in shuffled:
            self._shuffle(plan, source, target, (1, channels, 1, 1), groups)
        if wanted:
            missing = [None] * (INPUTS - count)
            weight = plan.scratch(8 * self.weights) if targets[count] is not None else None
            plan.call(
                "ff_cpu_bifpn_fuse_backward",
                *self._arguments(places),
                chain[0],
                *targets[:count],
                *missing,
                weight,
                plan.workspace(plan.native.ff_cpu_bifpn_fuse_workspace(plan.threads)),
            )
            if weight is not None:
                plan.call_single("ff_cpu_from_double", weight, self.weights, targets[count])
        return plan

    def statistics(self, kept: Tensor) -> tuple[int, int]:
        """Addresses of the mean and variance of the output, in its order."""
        place = kept.data_ptr() + self.kept.offsets[1 if self.fusion.shuffle_groups > 1 else 0]
        return place, place + self.shapes[-1][0] * kept.itemsize


def node_plan(
    inputs: Sequence[Tensor],
    weights: int,
    fusion: Fusion,
    integers: Sequence[int],
    floats: Sequence[float],
    params: Sequence[Tensor | None],
    save: bool,
) -> NodePlan:
    return cached(
        NodePlan,
        tuple([x.shape for x in inputs]),
        inputs[0].dtype,
        weights,
        fusion,
        tuple(integers),
        tuple(floats),
        tuple([w.shape for w in params[::PARAMETERS]]),
        (True,) * (len(inputs) + 1) + tuple([p is not None for p in params]),
        save,
    )


def forward(
    inputs: Sequence[Tensor], fusion_weight: Tensor, links: list[Link], fusion: Fusion, save: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), with ``save`` the fused map v, ``stats`` and raw outputs in front of the shuffle."""
    inputs = [nhwc(x) for x in inputs]
    integers, floats, params = numbers_of(links)
    node = node_plan(inputs, len(fusion_weight), fusion, integers, floats, params, save)
    y, kept = node.raw_run([*inputs, fusion_weight, *params])
    stats: list[Tensor | None] = [None] * len(links)
    if node.keeps_stats:
        stats[-1] = kept.pop(0)
        if fusion.shuffle_groups > 1:
            kept.pop(0)
    return y, kept.pop(0) if save else None, stats, kept


def backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    fusion_weight: Tensor,
    v: Tensor,
    links: list[Link],
    stats: list[Tensor | None],
    raw: list[Tensor],
    fusion: Fusion,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs, of fusion_weight, and of the parameters of the links; None where ``needs`` is False."""
    inputs = [nhwc(x) for x in inputs]
    integers, floats, params = numbers_of(links)
    node = node_plan(inputs, len(fusion_weight), fusion, integers, floats, params, True)
    kept = [t.data_ptr() for t in stats if t is not None]
    if fusion.shuffle_groups > 1:
        kept *= 2  # the shuffled statistics, which the backward pass does not read
    kept += [v.data_ptr(), *(z.data_ptr() for z in raw)]
    return node.raw_backward(grad, [*inputs, fusion_weight, *params], kept, needs)
