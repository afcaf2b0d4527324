"""The SSH block on the CPU as three convolutions and two seams (csrc/cpu/ssh_grouped.cpp).

Convolutions that read the same map run as one with their outputs side by side: [conv3X3 | conv5X5_1] on x,
[conv5X5_2 | conv7X7_2] on the second half of the first, conv7x7_3 on the second half of the second. The groups become
zeros of a dense weight: with a few channels per group, a vector of outputs spans several groups anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from ..ops.conv_chain import Link, nhwc
from .conv import (
    ACTIVATIONS,
    Geometry,
    Source,
    batch_norm_gradients,
    batch_norm_stats,
    conv_backward,
    conv_forward,
    empty_nhwc,
    pixel,
    pointer,
    workspace,
)
from .conv_chain import link_gradients

STAGES = ((0, 1), (2, 3), (4,))
RELU = ACTIVATIONS["relu"]


def dense_view(weight: Tensor, link: Link) -> Tensor:
    """The part of a dense (O, C, k, k) weight that a grouped convolution uses, as (O / g, C / g, k, k, g)."""
    out_channels, channels, kernel, _ = weight.shape
    groups = link.groups
    blocks = weight.view(groups, out_channels // groups, groups, channels // groups, kernel, kernel)
    return blocks.diagonal(dim1=0, dim2=2)


def grouped_view(weight: Tensor, link: Link) -> Tensor:
    """(O, C / g, k, k) as (O / g, C / g, k, k, g)."""
    return weight.unflatten(0, (link.groups, -1)).permute(1, 2, 3, 4, 0)


def concatenated(tensors: list[Tensor | None], dim: int = 0) -> Tensor | None:
    """The concatenation, or None where all are missing. Either all are there or none."""
    if tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class Stage(NamedTuple):
    """One or two links that read the same map, as one convolution."""

    links: list[Link]
    weight: Tensor
    bias: Tensor | None

    @property
    def channels(self) -> list[int]:
        return [len(link.weight) for link in self.links]


def stages_of(links: list[Link]) -> list[Stage]:
    stages = []
    for indices in STAGES:
        members = [links[i] for i in indices]
        channels = members[0].weight.shape[1] * members[0].groups
        weight = members[0].weight.new_zeros((sum(len(m.weight) for m in members), channels, 3, 3))
        first = 0
        for member in members:
            part = weight[first : first + len(member.weight)]
            dense_view(part, member).copy_(grouped_view(member.weight, member))
            first += len(member.weight)
        biases = [m.bias for m in members]
        if any(b is not None for b in biases):
            biases = [m.weight.new_zeros(len(m.weight)) if b is None else b for m, b in zip(members, biases)]
        stages.append(Stage(members, weight, concatenated(biases)))
    return stages


def affine_of(stage: Stage) -> tuple[Tensor | None, Tensor | None, float]:
    members = stage.links
    return (
        concatenated([m.bn_weight for m in members]),
        concatenated([m.bn_bias for m in members]),
        members[0].eps,
    )


def branches_of(raw: list[Tensor], stats: list[Tensor | None], stages: list[Stage]) -> list[tuple]:
    """(z, stats) of the three parts of the output, and of the two maps inside: channel slices of the raw outputs."""
    parts = []
    for z, s, stage in zip(raw, stats, stages):
        first = 0
        for n in stage.channels:
            parts.append((z[:, first : first + n], None if s is None else s[:, first : first + n].contiguous()))
            first += n
    return [parts[0], parts[2], parts[4], parts[1], parts[3]]


def branch_arguments(branches: list[tuple]) -> list[int]:
    return [v for z, s in branches[:3] for v in (z.data_ptr(), pixel(z), z.shape[1], pointer(s))]


def forward(
    x: Tensor, links: list[Link], shuffle_groups: int, save: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of the three stages, and with ``save`` their raw outputs."""
    native, _ = module()
    x, geometry, stages = nhwc(x), Geometry(1, 1, 1), stages_of(links)
    all_stats: list[Tensor | None] = []
    raw: list[Tensor] = []
    source = Source(x)
    activated = False
    for stage in stages:
        bn_weight, bn_bias, eps = affine_of(stage)
        bn, stats, after = None, None, None
        if links[0].batch_statistics:
            bn = bn_weight, bn_bias, eps
        else:
            mean, var = (
                concatenated([getattr(m, name) for m in stage.links]) for name in ("running_mean", "running_var")
            )
            stats = batch_norm_stats(mean, var, bn_weight, bn_bias, eps)
            if not save:
                after, activated = Source(x, stats, RELU), True
        z, batch_stats = conv_forward(source, stage.weight, stage.bias, geometry, bn=bn, after=after)
        all_stats.append(batch_stats if bn else stats)
        raw.append(z)
        inner = z[:, stage.channels[0] :]
        if activated:
            source = Source(inner)
        else:
            source = Source(inner, all_stats[-1][:, stage.channels[0] :].contiguous(), RELU)
    branches = branches_of(raw, [None] * 3 if activated else all_stats, stages)
    channels = [z.shape[1] for z, _ in branches[:3]]
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    y = empty_nhwc((x.shape[0], sum(channels), *x.shape[2:]), x)
    memory = workspace(native.ff_cpu_ssh_grouped_workspace(*channels, dtype, threads))
    code = native.ff_cpu_ssh_grouped_join(
        *branch_arguments(branches),
        x.shape[0] * x.shape[2] * x.shape[3],
        shuffle_groups,
        y.data_ptr(),
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "ssh_grouped", x)
    return y, all_stats, raw if save else []


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
    native, _ = module()
    x, grad = nhwc(x), nhwc(grad)
    stages = stages_of(links)
    branches = branches_of(raw, stats, stages)
    channels = [z.shape[1] for z, _ in branches[:3]]
    dtype, threads = DTYPES[x.dtype], torch.get_num_threads()
    g = [torch.empty_like(z) for z in raw]
    parts = [part[:, :n] for part, n in zip(g, channels)]
    sums = [torch.empty((2, n), dtype=torch.float64) for n in channels]
    memory = workspace(native.ff_cpu_ssh_grouped_workspace(*channels, dtype, threads))
    outputs = [v for part, s in zip(parts, sums) for v in (part.data_ptr(), pixel(part), s.data_ptr())]
    code = native.ff_cpu_ssh_grouped_split(
        grad.data_ptr(),
        *branch_arguments(branches),
        x.shape[0] * x.shape[2] * x.shape[3],
        shuffle_groups,
        *outputs,
        memory.data_ptr(),
        dtype,
        threads,
    )
    check(code, "ssh_grouped backward", x)

    grads: list[Tensor | None] = [None] * len(needs)
    inner_sums = None
    for i in (2, 1, 0):
        stage, indices = stages[i], STAGES[i]
        stage_sums = sums[i] if inner_sums is None else torch.cat((sums[i], inner_sums), 1)
        first = 0
        for index, member in zip(indices, stage.links):
            n = len(member.weight)
            columns = slice(first, first + n)
            marks = slice(2 + 4 * index, 5 + 4 * index)
            member_stats, member_sums = stats[i][:, columns], stage_sums[:, columns]
            grads[marks] = link_gradients(member, member_stats, member_sums, needs[marks], batch_norm_gradients)
            first += n
        grad_weight = torch.empty_like(stage.weight) if any(needs[1 + 4 * index] for index in indices) else None
        if i == 0:
            source, grad_x, inner_sums = Source(x), empty_nhwc(x.shape, x) if needs[0] else None, None
        else:
            z, s = branches[4 if i == 2 else 3]
            source = Source(z, s, RELU)
            grad_x = g[i - 1][:, stages[i - 1].channels[0] :]
            inner_sums = torch.empty((2, z.shape[1]), dtype=torch.float64)
        conv_backward(
            g[i],
            Source(raw[i], stats[i]),
            stage_sums if links[0].batch_statistics else None,
            stage.links[0].eps,
            source,
            stage.weight,
            Geometry(1, 1, 1),
            grad_x=grad_x,
            grad_weight=grad_weight,
            x_sums=inner_sums,
        )
        first = 0
        for index, member in zip(indices, stage.links):
            n = len(member.weight)
            if needs[1 + 4 * index]:
                mine = torch.empty_like(member.weight)
                grouped_view(mine, member).copy_(dense_view(grad_weight[first : first + n], member))
                grads[1 + 4 * index] = mine
            first += n
        if i == 0:
            grads[0] = grad_x
    return [value for value, needed in zip(grads, needs) if needed]
