"""Convolutions in a row, each with its batch normalisation and activation, in one op.

Normalisation is deferred (docs/batch_norm_fusion.md): every convolution stores its raw output z once and the next one
normalises and activates it as it loads. A chain is one node of the autograd graph; it saves its input, one z per
convolution, and four numbers per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import as_dense, normalisation_tensors, update_running_statistics
from ..config import Policy, call_policy
from ..layout import memory_format
from ..params import ConvParams, ConvUnit
from ..reference.conv_chain import conv_chain as reference
from . import checks
from .library import define, direct, first_order, kernels, planned, update_from_addresses

OP = "conv_chain"


def facts_of(convs: Sequence[ConvParams]) -> dict[str, Any]:
    """What :func:`supports` asks of a call with these convolutions."""
    return {
        "kernel": max(int(conv.weight.shape[2]) for conv in convs),
        "stride": max(conv.stride for conv in convs),
        "plain": all(conv.weight.shape[2] == conv.weight.shape[3] > conv.padding for conv in convs),
    }


def supports(request: registry.Request) -> str | None:
    """Reason why the convolution kernels refuse a call, or None."""
    if request.facts.get("kernel", 1) > 7:
        return "kernels larger than 7x7"
    if not request.facts.get("plain", True):
        return "a kernel that is not square, or padding as wide as the kernel"
    return None


def supports_cuda(request: registry.Request) -> str | None:
    """The same for CUDA C++, where a block's tile of the input has to fit into 48 KB of shared memory."""
    return "strides above 9" if request.facts.get("stride", 1) > 9 else supports(request)


registry.register(OP, "cpu", (torch.float32, torch.float64), supports=supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=supports_cuda)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=supports)

NO_BATCH_NORM, BATCH_STATISTICS, GIVEN_STATISTICS = range(3)
PARAMETERS = 6
"""Tensors of one link: weight, bias, bn_weight, bn_bias, running_mean, running_var; the first four have gradients."""


class Link(NamedTuple):
    """A :class:`ConvUnit` as kernels see it: tensors, numbers, codes.

    The last four tensors, the normalisation's, may be float32 where the map is half precision.
    """

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    stride: int
    padding: int
    groups: int
    activation: int
    normalisation: int
    slope: float
    eps: float

    @property
    def batch_statistics(self) -> bool:
        return self.normalisation == BATCH_STATISTICS

    @property
    def given_statistics(self) -> bool:
        return self.normalisation == GIVEN_STATISTICS

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        kernel = self.weight.shape[2]
        return tuple((n + 2 * self.padding - kernel) // self.stride + 1 for n in (height, width))


def links_of(params: Sequence[Tensor | None], integers: Sequence[int], floats: Sequence[float]) -> list[Link]:
    return [
        Link(*params[PARAMETERS * i : PARAMETERS * (i + 1)], *integers[5 * i : 5 * i + 5], *floats[2 * i : 2 * i + 2])
        for i in range(len(floats) // 2)
    ]


def nhwc(x: Tensor) -> Tensor:
    """``x`` itself if its memory is (B, H, W, C), else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics of half-precision tensors are float32."""
    return torch.promote_types(x.dtype, torch.float32)


def needs_raw(links: Sequence[Link], i: int) -> bool:
    """Whether the backward pass reads the raw output of link ``i``."""
    return i + 1 < len(links) or links[i].normalisation != NO_BATCH_NORM or links[i].activation != 0


def _run(
    x: Tensor, params: list[Tensor | None], integers: list[int], floats: list[float], save: bool, backend: str
) -> list[Tensor]:
    links = links_of(params, integers, floats)
    y, stats, raw = kernels(backend, OP).forward(x, links, save)
    kept = [s for s, link in zip(stats, links) if s is not None and (save or link.batch_statistics)]
    return [y.contiguous(memory_format=memory_format(x)), *kept, *raw]


def _fake(
    x: Tensor, params: list[Tensor | None], integers: list[int], floats: list[float], save: bool, backend: str
) -> list[Tensor]:
    links = links_of(params, integers, floats)
    stats, raw = [], []
    batch, _, height, width = x.shape
    for i, link in enumerate(links):
        channels = link.weight.shape[0]
        height, width = link.output_size(height, width)
        if link.batch_statistics or (save and link.given_statistics):
            stats.append(x.new_empty((4, channels), dtype=statistics_dtype(x)))
        if save and needs_raw(links, i):
            z = torch.empty(
                (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
            )
            raw.append(z)
    y = torch.empty((batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return [y, *stats, *raw]


_raw = define(
    "_conv_chain(Tensor x, Tensor?[] params, int[] integers, float[] floats, bool save, str backend) -> Tensor[]",
    _run,
    _fake,
)


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
    links = links_of(params, integers, floats)
    remaining = iter(saved)
    stats = [None if link.normalisation == NO_BATCH_NORM else next(remaining) for link in links]
    grads = kernels(backend, OP).backward(grad, x, links, stats, list(remaining), needs)
    if needs[0]:
        grads[0] = grads[0].contiguous(memory_format=memory_format(x))
    return grads


def fake_backward(
    grad: Tensor,
    x: Tensor,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    wanted = [torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))] if needs[0] else []
    for link_params, marks in zip(batched(params, PARAMETERS), batched(needs[1:], 4)):
        wanted += [torch.empty_like(p) for p, mark in zip(link_params, marks) if mark]
    return wanted


_raw_backward = define(
    "_conv_chain_backward(Tensor grad, Tensor x, Tensor?[] params, Tensor[] saved, int[] integers, float[] floats, "
    "bool[] needs, str backend) -> Tensor[]",
    _run_backward,
    fake_backward,
)


def batched(values: Sequence, n: int) -> list[Sequence]:
    return [values[i : i + n] for i in range(0, len(values), n)]


class Block(torch.autograd.Function):
    """Autograd of ops made of convolutions, by name of the op in :data:`RAW_OPS`.

    A raw op takes (x, params, integers, floats, save, backend) and returns [y, stats..., tensors to save...]; its
    backward takes (grad, x, params, what was saved, integers, floats, needs, backend) and returns the wanted gradients
    of x and of the first four of each six params. ``integers`` and ``floats`` hold five and two numbers per
    convolution; further integers are the op's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        op: str,
        stats_count: int,
        integers: list[int],
        floats: list[float],
        backend: str,
        *params: Tensor | None,
    ):
        y, *saved = RAW_OPS[op][0](x, list(params), integers, floats, True, backend)
        ctx.save_for_backward(x, *params, *saved)
        ctx.rest = op, len(params), integers, floats, backend
        stats = saved[:stats_count]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return y, *stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None):
        op, count, integers, floats, backend = ctx.rest
        if grad is None:
            return (None,) * (6 + count)
        x, *rest = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0]]
        for i in range(6, 6 + count, PARAMETERS):
            needs += ctx.needs_input_grad[i : i + 4]
        grads = iter(RAW_OPS[op][1](grad, x, rest[:count], rest[count:], integers, floats, needs, backend))
        found = [next(grads) if needed else None for needed in needs]
        by_param: list[Tensor | None] = []
        for group in batched(found[1:], 4):
            by_param += [*group, None, None]
        return found[0], None, None, None, None, None, *by_param


RAW_OPS = {OP: (_raw, _raw_backward)}


def conv_chain(x: Tensor, units: Sequence[ConvUnit], *, policy: Policy | None = None) -> Tensor:
    """y = unit_n(... unit_1(x)), where each unit is act(bn(conv(.))).

    The same as :func:`grouped_conv_bn_act` called once per unit, with less memory: between two units only the raw
    output of a convolution is stored, and the next one normalises and activates it as it loads.

    Args:
        x: (B, C, H, W), any floating dtype, NCHW or channels_last.
        units: what to apply, at least one unit. Batch normalisations in training update their running statistics.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, O, H', W'), O and the size as the units make them, in the dtype and memory format of x. Under autocast that
        is autocast's dtype on a GPU, and float32, in which the CPU kernels compute, on the CPU.

    Raises:
        ValueError: shapes do not fit each other, or an activation is unknown.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    checks.feature_map(OP, "x", x)
    channels = x.shape[1]
    if not units:
        checks.fail(OP, "needs at least one unit")
    for i, unit in enumerate(units):
        channels = checks.convolution(OP, f"units[{i}].conv", unit.conv, x, channels)
        checks.batch_norm(OP, f"units[{i}].bn", unit.bn, x, channels)
        checks.activation(OP, unit.activation)
    y = run(OP, x, units, policy)
    return reference(x, units) if y is None else y


def run(op: str, x: Tensor, units: Sequence[ConvUnit], policy: Policy | None) -> Tensor | None:
    """The output of checked ``units`` as ``op``'s kernels compute it, or None where the reference is to serve."""
    record = checks.needs_grad(x, units)
    x = checks.autocast_input(x)
    backend = registry.select(op, x, policy or call_policy(), record, **facts_of([unit.conv for unit in units]))
    sizes = output_sizes(x, units)
    empty = x.numel() == 0 or min(min(size) for size in sizes) < 1 or not all(len(unit.conv.weight) for unit in units)
    if backend == "reference" or empty:
        return None
    for unit, (height, width) in zip(units, sizes):
        if unit.bn is not None and unit.bn.training:
            checks.values_per_channel(op, (x.shape[0], unit.conv.weight.shape[0], height, width))
    return run_chain(x, units, sizes, backend, record)


def run_chain(
    x: Tensor, units: Sequence[ConvUnit], sizes: Sequence[tuple[int, int]], backend: str, record: bool
) -> Tensor:
    """The output of ``units`` one after the other; updates running statistics as ``nn.BatchNorm2d`` does."""
    integers, floats, params = flatten(x, units)
    if backend == "cpu" and direct(x, params, [unit.bn for unit in units]):
        plan = kernels(backend, OP).chain_plan(x, integers, floats, params, record)
        y, kept = planned(plan, [x, *params], record)
        training = [(unit.bn, size) for unit, size in zip(units, sizes) if unit.bn is not None and unit.bn.training]
        if training:
            addresses = plan.statistics(kept)
            update_from_addresses(
                [(bn, *at, x.shape[0] * height * width) for (bn, (height, width)), at in zip(training, addresses)]
            )
        return y
    modes = integers[4::5]
    if record:
        y, *stats = Block.apply(x, OP, len(modes) - modes.count(NO_BATCH_NORM), integers, floats, backend, *params)
        stats = [s for s, mode in zip(stats, filter(None, modes)) if mode == BATCH_STATISTICS]
    else:
        y, *stats = _raw(x, params, integers, floats, False, backend)
    if stats:
        training = [(unit.bn, size) for unit, size in zip(units, sizes) if unit.bn is not None and unit.bn.training]
        update_running_statistics(
            [(bn, s[0], s[1], x.shape[0] * height * width) for (bn, (height, width)), s in zip(training, stats)]
        )
    return y


def flatten(x: Tensor, units: Sequence[ConvUnit]) -> tuple[list[int], list[float], list[Tensor | None]]:
    """Units as arguments of a raw op; convolutions in the dtype of x."""
    integers: list[int] = []
    floats: list[float] = []
    params: list[Tensor | None] = []
    for unit in units:
        conv, bn = unit.conv, unit.bn
        mode = NO_BATCH_NORM if bn is None else BATCH_STATISTICS if bn.training else GIVEN_STATISTICS
        integers += (conv.stride, conv.padding, conv.groups, checks.ACTIVATIONS.index(unit.activation), mode)
        floats += (unit.negative_slope, 0.0 if bn is None else bn.eps)
        params += [as_dense(conv.weight, x.dtype), as_dense(conv.bias, x.dtype), *normalisation_tensors(bn, x.dtype)]
    return integers, floats, params


def output_sizes(x: Tensor, units: Sequence[ConvUnit]) -> list[tuple[int, int]]:
    """Height and width behind every unit."""
    height, width = x.shape[2:]
    sizes = []
    for conv, *_ in units:
        kh, kw = conv.weight.shape[2:]
        height = (height + 2 * conv.padding - kh) // conv.stride + 1
        width = (width + 2 * conv.padding - kw) // conv.stride + 1
        sizes.append((height, width))
    return sizes
