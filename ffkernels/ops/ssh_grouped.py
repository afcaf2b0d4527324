"""The SSH context block in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import BatchNorm, update_running_statistics
from ..config import Policy, call_policy
from ..layout import memory_format
from ..params import ConvParams, ConvUnit
from ..reference.ssh_grouped import ssh_grouped as reference
from . import checks
from .conv_chain import RAW_OPS, Block, fake_backward, flatten, links_of, statistics_dtype, supports
from .library import define, direct, kernels, planned, update_from_addresses

OP = "ssh_grouped"


def _supports(request: registry.Request) -> str | None:
    if not request.facts.get("uniform", True):
        return "batch normalisations of one block that differ in mode, eps or affine parameters"
    return supports(request)


registry.register(OP, "cpu", (torch.float32, torch.float64), supports=_supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=_supports)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=_supports)

LAYERS = ("conv3X3", "conv5X5_1", "conv5X5_2", "conv7X7_2", "conv7x7_3")
_PAIRS = ((0, 1), (2, 3), (4,))
STAGES = {"cpu": _PAIRS, "triton": _PAIRS, "cuda": ((0,), (1,), (2,), (3,), (4,))}
"""Which of the layers have their raw outputs and statistics side by side in one tensor, by backend."""


def _run(
    x: Tensor, params: list[Tensor | None], integers: list[int], floats: list[float], save: bool, backend: str
) -> list[Tensor]:
    links = links_of(params, integers[:-1], floats)
    y, stats, raw = kernels(backend, OP).forward(x, links, integers[-1], save)
    kept = stats if save or links[0].batch_statistics else []
    return [y.contiguous(memory_format=memory_format(x)), *kept, *raw]


def _fake(
    x: Tensor, params: list[Tensor | None], integers: list[int], floats: list[float], save: bool, backend: str
) -> list[Tensor]:
    links = links_of(params, integers[:-1], floats)
    n = [len(link.weight) for link in links]
    batch, _, height, width = x.shape

    def empty(channels: int, form: torch.memory_format) -> Tensor:
        size = (batch, channels, height, width)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)

    stages = [sum(n[i] for i in stage) for stage in STAGES[backend]]
    y = empty(n[0] + n[2] + n[4], memory_format(x))
    dtype = statistics_dtype(x)
    kept = save or links[0].batch_statistics
    stats = [x.new_empty((4, channels), dtype=dtype) for channels in stages] if kept else []
    return [y, *stats, *([empty(channels, torch.channels_last) for channels in stages] if save else [])]


def _run_backward(
    grad: Tensor,
    x: Tensor,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    links = links_of(params, integers[:-1], floats)
    count = len(STAGES[backend])
    grads = kernels(backend, OP).backward(grad, x, links, saved[:count], saved[count:], integers[-1], needs)
    if needs[0]:
        grads[0] = grads[0].contiguous(memory_format=memory_format(x))
    return grads


_raw = define(
    "_ssh_grouped(Tensor x, Tensor?[] params, int[] integers, float[] floats, bool save, str backend) -> Tensor[]",
    _run,
    _fake,
)
_raw_backward = define(
    "_ssh_grouped_backward(Tensor grad, Tensor x, Tensor?[] params, Tensor[] saved, int[] integers, float[] floats, "
    "bool[] needs, str backend) -> Tensor[]",
    _run_backward,
    fake_backward,
)
RAW_OPS[OP] = (_raw, _raw_backward)


def ssh_grouped(
    x: Tensor,
    convs: Sequence[ConvParams],
    bns: Sequence[BatchNorm],
    shuffle_groups: int = 1,
    *,
    policy: Policy | None = None,
) -> Tensor:
    """Context of three sizes (SSH, Najibi et al. 2017) with grouped convolutions, then a channel shuffle.

    With c_k = bn_k(conv_k(.)), k as in the names below, and a = relu(c5X5_1(x))::

        y = relu(concat(c3X3(x), c5X5_2(a), c7x7_3(relu(c7X7_2(a)))))

    and y is shuffled: view (B, g, O / g, H, W), axes 1 and 2 exchanged.

    Args:
        x: (B, C, H, W), any floating dtype, NCHW or channels_last.
        convs: five 3x3 convolutions of stride 1 and padding 1: conv3X3, conv5X5_1, conv5X5_2, conv7X7_2, conv7x7_3.
        bns: their batch normalisations, in the same order.
        shuffle_groups: g, a divisor of O; 1 leaves the channels in order.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, O, H, W), O the sum of the channels of conv3X3, conv5X5_2 and conv7x7_3.

    Raises:
        ValueError: there are not five of each, or shapes do not fit each other.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    checks.feature_map(OP, "x", x)
    if len(convs) != 5 or len(bns) != 5:
        checks.fail(OP, f"needs five convolutions and five batch normalisations, got {len(convs)} and {len(bns)}")
    inputs = (-1, -1, 1, 1, 3)
    channels: list[int] = []
    for name, conv, bn, source in zip(LAYERS, convs, bns, inputs):
        channels.append(checks.convolution(OP, name, conv, x, x.shape[1] if source < 0 else channels[source]))
        if conv.weight.shape[2:] != (3, 3) or conv.stride != 1 or conv.padding != 1:
            checks.fail(OP, f"{name} must be 3x3 with stride 1 and padding 1, got {tuple(conv.weight.shape)}")
        checks.batch_norm(OP, f"batch normalisation of {name}", bn, x, channels[-1])
    out_channels = channels[0] + channels[2] + channels[4]
    if shuffle_groups < 1 or out_channels % shuffle_groups:
        checks.fail(OP, f"shuffle_groups={shuffle_groups} does not divide the {out_channels} output channels")
    record = checks.needs_grad(x, convs, bns)
    x = checks.autocast_input(x)
    backend = registry.select(OP, x, policy or call_policy(), record, uniform=_uniform(bns))
    if backend == "reference" or x.numel() == 0:
        return reference(x, convs, bns, shuffle_groups)
    batch, _, height, width = x.shape
    if bns[0].training:
        checks.values_per_channel(OP, (batch, channels[0], height, width))
    if any(conv.bias is not None for conv in convs):
        zeros = [conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias for conv in convs]
        convs = [conv._replace(bias=bias) for conv, bias in zip(convs, zeros)]
    integers, floats, params = flatten(x, [ConvUnit(conv, bn, "relu") for conv, bn in zip(convs, bns)])
    integers.append(shuffle_groups)
    if backend == "cpu" and direct(x, params, bns):
        plan = kernels(backend, OP).block_plan(x, integers, floats, params, record)
        y, kept = planned(plan, [x, *params], record)
        if bns[0].training:
            count = batch * height * width
            update_from_addresses([(bn, *at, count) for bn, at in zip(bns, plan.statistics(kept))])
        return y
    if record:
        y, *stats = Block.apply(x, OP, len(STAGES[backend]), integers, floats, backend, *params)
    else:
        y, *stats = _raw(x, params, integers, floats, False, backend)
    if bns[0].training:
        sizes = [[channels[i] for i in stage] for stage in STAGES[backend]]
        split = [part for s, widths in zip(stats, sizes) for part in s.split(widths, 1)]
        count = batch * height * width
        update_running_statistics([(bn, part[0], part[1], count) for bn, part in zip(bns, split)])
    return y


def _uniform(bns: Sequence[BatchNorm]) -> bool:
    """Whether the block's normalisations can run side by side."""
    kinds = {(bn.training, bn.eps, bn.weight is None, bn.bias is None) for bn in bns if bn is not None}
    return len(kinds) == 1 and all(bn is not None for bn in bns)
