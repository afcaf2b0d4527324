"""The SSH block on the CPU as three convolutions and two seams (csrc/cpu/ssh_grouped.cpp).

Convolutions that read the same map run as one with their outputs side by side: [conv3X3 | conv5X5_1] on x,
[conv5X5_2 | conv7X7_2] on the second half of the first, conv7x7_3 on the second half of the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.conv_chain import PARAMETERS, Link, nhwc
from ..ops.library import compact
from . import planned_conv as convs
from .conv import ACTIVATIONS
from .conv_chain import numbers_of
from .op_plan import GRADIENTS, LinksPlan
from .plan import At, Map, Plan, cached
from .planned_conv import Conv, Operand

STAGES = ((0, 1), (2, 3), (4,))
"""Links that read the same map."""
INNER = (1, 3)
"""Links whose output the next stage reads: the second of the first two stages."""
RELU = ACTIVATIONS["relu"]
KERNEL = 3


class Stage:
    """The links of one stage as one convolution: parameters side by side in scratch memory."""

    def __init__(self, plan: Plan, links: Sequence[Link], indices: Sequence[int], shapes: Sequence, x: Map) -> None:
        self.links = [links[i] for i in indices]
        self.outputs = [shapes[i][0] for i in indices]
        self.firsts = [sum(self.outputs[:i]) for i in range(len(indices))]
        self.channels, self.inputs = sum(self.outputs), x.shape[1]
        groups = {link.groups for link in self.links}
        # Convolutions with different groups become dense ones, with zeros in the weight.
        self.groups = groups.pop() if len(groups) == 1 else 1
        self.row = self.inputs // self.groups * KERNEL * KERNEL
        self.weight = self.links[0].weight
        if len(self.links) > 1:
            self.weight = plan.scratch(self.channels * self.row * plan.itemsize)
            for link, n, first in zip(self.links, self.outputs, self.firsts):
                self.place(plan, link, n, first, self.weight, "ff_cpu_ssh_grouped_weight", link.weight)
        self.size = (x.shape[0], self.channels, *x.shape[2:])
        shape = (self.channels, self.inputs // self.groups, KERNEL, KERNEL)
        self.conv = Conv(self.weight, shape, self.joined(plan, "bias"), 1, 1, self.groups, self.outputs[0])

    def place(self, plan: Plan, link: Link, n: int, first: int, joint: At, entry: str, own: At) -> None:
        """Record the copy of a link's weight to its place in the joint one, or back by the entry for that."""
        joint = joint.plus(first * self.row * plan.itemsize)
        pair = (own, joint) if entry == "ff_cpu_ssh_grouped_weight" else (joint, own)
        if link.groups == self.groups:
            plan.copy(pair[0], 1, n * self.row, pair[1])
        else:
            plan.call_single(entry, pair[0], n, self.inputs, KERNEL, link.groups, pair[1])

    def joined(self, plan: Plan, field: str) -> At | None:
        """A parameter of all links, side by side; either all have it or none."""
        values = [getattr(link, field) for link in self.links]
        if None in values or len(values) == 1:
            return values[0]
        target = plan.scratch(self.channels * plan.itemsize)
        for value, n, first in zip(values, self.outputs, self.firsts):
            plan.copy(value, 1, n, target.plus(first * plan.itemsize))
        return target

    def slice(self, plan: Plan, z: Map, stats: At | None, i: int, activation: int = RELU) -> Operand:
        """The output of link ``i`` of the stage."""
        n, first = self.outputs[i], self.firsts[i]
        part = plan.channels(z, first, n)
        if stats is None:
            return Operand(part)
        if len(self.links) > 1:
            target = plan.scratch(4 * n * plan.itemsize)
            plan.copy(stats.plus(first * plan.itemsize), 4, n, target, self.channels, n)
            stats = target
        return Operand(part, stats, activation)


def seam(plan: Plan, branches: Sequence[Operand]) -> tuple[list, At]:
    """Arguments and workspace that both seams share."""
    arguments = [v for b in branches for v in (b.x.at, b.x.pixel, b.x.shape[1], b.stats)]
    widths = [b.x.shape[1] for b in branches]
    return arguments, plan.workspace(plan.native.ff_cpu_ssh_grouped_workspace(*widths, plan.dtype, plan.threads))


class BlockPlan(LinksPlan):
    """A block for one size of its input. What it keeps: ``stats`` of its three stages, then their raw outputs."""

    op = "ssh_grouped"

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
        *integers, self.shuffle_groups = integers
        super().__init__(dtype, 1, present, tuple(integers), floats, shapes)
        self.size = size
        self.plan = plan = Plan(dtype)
        x, *_ = places = self.places(plan)
        y = plan.base()
        links = self.links(places)
        self.widths = [sum(shapes[i][0] for i in stage) for stage in STAGES]
        training = links[0].batch_statistics
        self.keeps_stats, self.saves = save or training, save
        self.sizes = [(size[0], n, *size[2:]) for n in self.widths]
        stats, raw = self._kept(plan)
        if not self.keeps_stats:
            stats = [plan.scratch(4 * n * plan.itemsize) for n in self.widths]
        if not save:
            raw = [plan.scratch_map(s) for s in self.sizes]
        source, branches = Operand(Map(x, size, size[1])), []
        at_once = not save and not training
        for i, indices in enumerate(STAGES):
            stage = Stage(plan, links, indices, shapes, source.x)
            bn_weight, bn_bias = stage.joined(plan, "bn_weight"), stage.joined(plan, "bn_bias")
            eps = stage.links[0].eps
            if not training:
                names = ("running_mean", "running_var")
                given = stage.links[0]._replace(
                    bn_weight=bn_weight, bn_bias=bn_bias, **{n: stage.joined(plan, n) for n in names}
                )
                convs.given_stats(plan, given, stage.channels, stats[i])
            after = Operand(raw[i], stats[i], RELU) if at_once else None
            computed, bn = (stats[i], (bn_weight, bn_bias, eps)) if training else (None, (None, None, 0.0))
            convs.forward(plan, source, stage.conv, raw[i], stats=computed, bn=bn, after=after)
            seen = None if at_once else stats[i]
            branches.append(stage.slice(plan, raw[i], seen, 0))
            if len(indices) > 1:
                source = stage.slice(plan, raw[i], seen, 1)
        arguments, workspace = seam(plan, branches)
        channels = sum(b.x.shape[1] for b in branches)
        self.output = (size[0], channels, *size[2:])
        pixels = branches[0].x.pixels
        plan.call("ff_cpu_ssh_grouped_join", *arguments, pixels, self.shuffle_groups, y, workspace)
        if self.keeps_stats:
            for n in self.widths:
                self.kept.add(4, n)
        if save:
            for s in self.sizes:
                self.kept.add(*s)

    def _kept(self, plan: Plan) -> tuple[list[At], list[Map]]:
        stats = [plan.base() for _ in STAGES] if self.keeps_stats else []
        return stats, [Map(plan.base(), s, s[1]) for s in self.sizes] if self.saves else []

    def _plan_backward(self, needs: tuple[bool, ...]) -> Plan:
        plan = Plan(self.dtype)
        n = plan.itemsize
        grad = plan.base()
        x, *_ = places = self.places(plan)
        x, links = Map(x, self.size, self.size[1]), self.links(places)
        stats, raw = self._kept(plan)
        grads = self.gradients(self.wanted(plan, needs))
        inputs = [x, *(plan.channels(z, self.shapes[i][0], self.shapes[j][0]) for z, (i, j) in zip(raw, STAGES[:2]))]
        stages = [Stage(plan, links, indices, self.shapes, source) for indices, source in zip(STAGES, inputs)]
        branches = [stage.slice(plan, z, s, 0) for stage, z, s in zip(stages, raw, stats)]
        sources = [Operand(x), *(stage.slice(plan, z, s, 1) for stage, z, s in zip(stages, raw[:2], stats))]
        g = [plan.scratch_map(size) for size in self.sizes]
        parts = [plan.channels(part, 0, stage.outputs[0]) for part, stage in zip(g, stages)]
        split_sums = [convs.sums_of(plan, part.shape[1]) for part in parts]
        outputs = [v for part, s in zip(parts, split_sums) for v in (part.at, part.pixel, s)]
        arguments, workspace = seam(plan, branches)
        pixels = parts[0].pixels
        plan.call("ff_cpu_ssh_grouped_split", grad, *arguments, pixels, self.shuffle_groups, *outputs, workspace)
        inner_sums = None
        for i in (2, 1, 0):
            stage, indices = stages[i], STAGES[i]
            sums = split_sums[i]
            if inner_sums is not None:
                sums = convs.sums_of(plan, stage.channels)
                for part, width, first in zip((split_sums[i], inner_sums), stage.outputs, stage.firsts):
                    plan.copy(part, 2, width, sums.plus(8 * first), width, stage.channels, 8)
            for index, link, width, first in zip(indices, stage.links, stage.outputs, stage.firsts):
                marks = grads[2 + GRADIENTS * index : 1 + GRADIENTS * (index + 1)]
                place, seen = sums.plus(8 * first), stats[i].plus(n * first)
                convs.affine_gradients(plan, link, seen, stage.channels, place, stage.channels, width, marks)
            wanted = [grads[1 + GRADIENTS * index] for index in indices]
            grad_weight = wanted[0]
            if len(indices) > 1:
                size = stage.channels * stage.row * n
                grad_weight = plan.scratch(size) if any(g is not None for g in wanted) else None
            grad_x = None
            if i > 0:
                grad_x = plan.channels(g[i - 1], stages[i - 1].outputs[0], stages[i - 1].outputs[1])
                inner_sums = convs.sums_of(plan, grad_x.shape[1])
            elif grads[0] is not None:
                grad_x = Map(grads[0], self.size, self.size[1])
            convs.backward(
                plan,
                g[i],
                Operand(raw[i], stats[i]),
                sums if links[0].batch_statistics else None,
                links[0].eps,
                sources[i],
                stage.conv,
                grad_x=grad_x,
                grad_weight=grad_weight,
                x_sums=inner_sums if i > 0 else None,
            )
            for link, width, first, target in zip(stage.links, stage.outputs, stage.firsts, wanted):
                if target is not None and len(indices) > 1:
                    stage.place(plan, link, width, first, grad_weight, "ff_cpu_ssh_grouped_unpack", target)
        return plan

    def statistics(self, kept: Tensor) -> list[tuple[int, int]]:
        """Addresses of the mean and variance of every link's output."""
        found = []
        for start, indices, channels in zip(self.kept.pointers(kept), STAGES, self.widths):
            first = 0
            for i in indices:
                mean = start + first * kept.itemsize
                found.append((mean, mean + channels * kept.itemsize))
                first += self.shapes[i][0]
        return found


def block_plan(
    x: Tensor, integers: Sequence[int], floats: Sequence[float], params: Sequence[Tensor | None], save: bool
) -> BlockPlan:
    shapes = tuple([w.shape for w in params[::PARAMETERS]])
    present = (True, *[p is not None for p in params])
    return cached(BlockPlan, x.shape, x.dtype, tuple(integers), tuple(floats), shapes, present, save)


def forward(
    x: Tensor, links: list[Link], shuffle_groups: int, save: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of the three stages, and with ``save`` their raw outputs."""
    x = nhwc(x)
    integers, floats, params = numbers_of(links)
    block = block_plan(x, [*integers, shuffle_groups], floats, params, save)
    y, kept = block.raw_run([x, *params])
    count = len(STAGES) if block.keeps_stats else 0
    return y, kept[:count], kept[count:]


def backward(
    grad: Tensor,
    x: Tensor,
    links: list[Link],
    stats: list[Tensor],
    raw: list[Tensor],
    shuffle_groups: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x and of weight, bias, bn_weight, bn_bias of every link, those that ``needs`` marks."""
    x = nhwc(x)
    integers, floats, params = numbers_of(links)
    kept = [t.data_ptr() for t in (*stats, *raw)]
    block = block_plan(x, [*integers, shuffle_groups], floats, params, True)
    return compact(block.raw_backward(grad, [x, *params], kept, needs))
