"""One node of a bidirectional feature pyramid in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import BatchNorm, as_dense, normalisation_tensors, update_running_statistics
from ..config import Policy, call_policy
from ..layout import memory_format
from ..params import ConvParams
from ..reference.bifpn_node import bifpn_node as reference
from . import checks
from .conv_chain import (
    BATCH_STATISTICS,
    GIVEN_STATISTICS,
    NO_BATCH_NORM,
    PARAMETERS,
    Link,
    batched,
    links_of,
    statistics_dtype,
)
from .library import define, direct, first_order, kernels, planned, update_from_addresses

OP = "bifpn_node"


def _supports(request: registry.Request) -> str | None:
    return None if request.facts.get("same_dtype", True) else "inputs have different dtypes"


registry.register(OP, "cpu", (torch.float32, torch.float64), supports=_supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=_supports)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=_supports)

RESAMPLE = ("none", "up", "down")
"""``ff_resample`` of csrc/ff_api.h is the place in this tuple."""


class Fusion(NamedTuple):
    """A node apart from its tensors, as kernels see it; ``same`` is pool == "max_same"."""

    resample: tuple[int, ...]
    shuffle_groups: int
    same: bool
    epsilon: float


def _unpack(
    inputs: list[Tensor], params: list[Tensor | None], integers: list[int], floats: list[float]
) -> tuple[list[Link], Fusion]:
    count = len(inputs)
    resample, (shuffle_groups, same), rest = integers[:count], integers[count : count + 2], integers[count + 2 :]
    return links_of(params, rest, floats[1:]), Fusion(tuple(resample), shuffle_groups, bool(same), floats[0])


def _run(
    inputs: list[Tensor],
    fusion_weight: Tensor,
    params: list[Tensor | None],
    integers: list[int],
    floats: list[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    links, fusion = _unpack(inputs, params, integers, floats)
    y, v, stats, raw = kernels(backend, OP).forward(inputs, fusion_weight, links, fusion, save)
    kept = [s for s, link in zip(stats, links) if s is not None and (save or link.batch_statistics)]
    return [y.contiguous(memory_format=memory_format(inputs[0])), *kept, *([v, *raw] if save else [])]


def _fake(
    inputs: list[Tensor],
    fusion_weight: Tensor,
    params: list[Tensor | None],
    integers: list[int],
    floats: list[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    links, fusion = _unpack(inputs, params, integers, floats)
    like = inputs[fusion.resample.index(0)]

    def nhwc_map(channels: int) -> Tensor:
        shape = (like.shape[0], channels, *like.shape[2:])
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

    channels = links[-1].weight.shape[0]
    y = nhwc_map(channels).contiguous(memory_format=memory_format(inputs[0]))
    last = links[-1]
    kept = last.batch_statistics or (save and last.given_statistics)
    stats = [like.new_empty((4, channels), dtype=statistics_dtype(like))] if kept else []
    return [y, *stats, *([nhwc_map(like.shape[1]), *(nhwc_map(k.weight.shape[0]) for k in links)] if save else [])]


_raw = define(
    "_bifpn_node(Tensor[] inputs, Tensor fusion_weight, Tensor?[] params, int[] integers, float[] floats, bool save, "
    "str backend) -> Tensor[]",
    _run,
    _fake,
)


def _run_backward(
    grad: Tensor,
    inputs: list[Tensor],
    fusion_weight: Tensor,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    links, fusion = _unpack(inputs, params, integers, floats)
    remaining = iter(saved)
    stats = [None if link.normalisation == NO_BATCH_NORM else next(remaining) for link in links]
    v, *raw = remaining
    grads = kernels(backend, OP).backward(grad, inputs, fusion_weight, v, links, stats, raw, fusion, needs)
    for i, x in enumerate(inputs):
        if grads[i] is not None:
            grads[i] = grads[i].contiguous(memory_format=memory_format(x))
    return [g for g in grads if g is not None]


def _fake_backward(
    grad: Tensor,
    inputs: list[Tensor],
    fusion_weight: Tensor,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    maps = [torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)) for x in inputs]
    leaves = [p for group in batched(params, PARAMETERS) for p in group[:4]]
    return [torch.empty_like(t) for t, needed in zip([*maps, fusion_weight, *leaves], needs) if needed]


_raw_backward = define(
    "_bifpn_node_backward(Tensor grad, Tensor[] inputs, Tensor fusion_weight, Tensor?[] params, Tensor[] saved, "
    "int[] integers, float[] floats, bool[] needs, str backend) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


class _BiFPNNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, integers: list[int], floats: list[float], count: int, backend: str, *tensors: Tensor | None):
        inputs, fusion_weight, params = tensors[:count], tensors[count], tensors[count + 1 :]
        y, *saved = _raw(list(inputs), fusion_weight, list(params), integers, floats, True, backend)
        ctx.save_for_backward(*tensors, *saved)
        ctx.call = integers, floats, count, backend, len(tensors)
        stats = saved[:1]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return y, *stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None):
        integers, floats, count, backend, total = ctx.call
        if grad is None:
            return (None,) * (4 + total)
        kept = ctx.saved_tensors
        tensors, saved = kept[:total], kept[total:]
        marks = ctx.needs_input_grad[4:]
        needs = list(marks[: count + 1])
        for group in batched(marks[count + 1 :], PARAMETERS):
            needs += group[:4]
        grads = iter(
            _raw_backward(
                grad,
                list(tensors[:count]),
                tensors[count],
                list(tensors[count + 1 :]),
                list(saved),
                integers,
                floats,
                needs,
                backend,
            )
        )
        found = [next(grads) if needed else None for needed in needs]
        by_param: list[Tensor | None] = []
        for group in batched(found[count + 1 :], 4):
            by_param += [*group, None, None]
        return None, None, None, None, *found[: count + 1], *by_param


def _call(
    inputs: Sequence[Tensor],
    resample: Sequence[str],
    fusion_weight: Tensor,
    convs: Sequence[ConvParams],
    bn: BatchNorm,
    shuffle_groups: int,
    pool: str,
    epsilon: float,
    backend: str,
    record: bool,
) -> Tensor:
    target = inputs[list(resample).index("none")]
    mode = BATCH_STATISTICS if bn.training else GIVEN_STATISTICS
    if bn.training:
        checks.values_per_channel(OP, (target.shape[0], convs[-1].weight.shape[0], *target.shape[2:]))
    integers = [*(RESAMPLE.index(how) for how in resample), shuffle_groups, int(pool == "max_same")]
    floats = [epsilon]
    params: list[Tensor | None] = []
    for i, conv in enumerate(convs):
        last = i == len(convs) - 1
        integers += [conv.stride, conv.padding, conv.groups, 0, mode if last else NO_BATCH_NORM]
        floats += [0.0, bn.eps if last else 0.0]
        params += [as_dense(tensor, target.dtype) for tensor in (conv.weight, conv.bias)]
        params += normalisation_tensors(bn if last else None, target.dtype)
    weight = fusion_weight.to(statistics_dtype(target)).contiguous()
    if backend == "cpu" and direct(target, [*inputs, weight, *params], [bn]):
        fusion = Fusion(tuple(integers[: len(inputs)]), shuffle_groups, pool == "max_same", epsilon)
        numbers = integers[len(inputs) + 2 :], floats[1:]
        plan = kernels(backend, OP).node_plan(inputs, len(weight), fusion, *numbers, params, record)
        y, kept = planned(plan, [*inputs, weight, *params], record)
        if bn.training:
            values = target.shape[0] * target.shape[2] * target.shape[3]
            update_from_addresses([(bn, *plan.statistics(kept), values)])
        return y
    if record:
        y, *stats = _BiFPNNode.apply(integers, floats, len(inputs), backend, *inputs, weight, *params)
    else:
        y, *stats = _raw(list(inputs), weight, params, integers, floats, False, backend)
    if bn.training:
        values = target.shape[0] * target.shape[2] * target.shape[3]
        if shuffle_groups > 1:
            stats = [stats[0].unflatten(1, (shuffle_groups, -1)).transpose(1, 2).flatten(1)]
        update_running_statistics([(bn, stats[0][0], stats[0][1], values)])
    return y


def bifpn_node(
    inputs: Sequence[Tensor],
    resample: Sequence[str],
    fusion_weight: Tensor,
    depthwise: ConvParams,
    pointwise: ConvParams | None,
    bn: BatchNorm,
    shuffle_groups: int = 1,
    pool: str = "max",
    epsilon: float = 1e-4,
    *,
    policy: Policy | None = None,
) -> Tensor:
    """Fast normalised fusion of two or three maps and a separable convolution (EfficientDet, Tan et al. 2020)::

        w = relu(fusion_weight) / (sum(relu(fusion_weight)) + epsilon)
        y = bn(shuffle(pointwise(depthwise(silu(sum_i w_i * resample_i(inputs_i))))))

    Args:
        inputs: two or three maps (B, C, H_i, W_i), any floating dtype, NCHW or channels_last.
        resample: for each input ``"none"`` (it has the node's size H, W), ``"up"`` (nearest neighbour to H, W, source
            index floor(i * H_i / H)) or ``"down"`` (3x3 maximum of stride 2, H = ceil(H_i / 2)).
        fusion_weight: (K,), K >= number of inputs. The sum runs over all K, the first ones are used.
        depthwise: 3x3 convolution of stride 1 and padding 1.
        pointwise: 1x1 convolution, or None: ``depthwise`` is then a dense 3x3 convolution, and nothing is shuffled.
        bn: batch normalisation of the output channels.
        shuffle_groups: groups of the channel shuffle after ``pointwise``; 1 for none.
        pool: border of ``"down"``: ``"max"`` ignores what lies outside (padding 1); ``"max_same"`` pads with zeros,
            ahead by one where the size is odd and behind by one always (TensorFlow's SAME).
        epsilon: added to the sum of weights.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, O, H, W), in the dtype of the inputs.

    Raises:
        ValueError: shapes do not fit each other, or a name is unknown.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    if len(inputs) not in (2, 3) or len(resample) != len(inputs):
        checks.fail(OP, f"needs two or three inputs and as many resample, got {len(inputs)} and {len(resample)}")
    if "none" not in resample or not all(how in ("none", "up", "down") for how in resample):
        checks.fail(OP, f"resample must be 'none', 'up' or 'down', and 'none' at least once, got {list(resample)}")
    if pool not in ("max", "max_same"):
        checks.fail(OP, f"unknown pool {pool!r}, use 'max' or 'max_same'")
    x = inputs[list(resample).index("none")]
    for i, (item, how) in enumerate(zip(inputs, resample)):
        checks.feature_map(OP, f"inputs[{i}]", item)
        size = [(n + 1) // 2 for n in item.shape[2:]] if how == "down" else item.shape[2:]
        fits = item.shape[:2] == x.shape[:2] and (how == "up" or tuple(size) == tuple(x.shape[2:]))
        if not fits:
            checks.fail(OP, f"inputs[{i}] {tuple(item.shape)} with resample {how!r} does not fit {tuple(x.shape)}")
        checks.same_device(OP, f"inputs[{i}]", item, x)
    if fusion_weight.dim() != 1 or fusion_weight.shape[0] < len(inputs):
        checks.fail(
            OP, f"fusion_weight {tuple(fusion_weight.shape)} must hold a weight for each of {len(inputs)} inputs"
        )
    checks.same_device(OP, "fusion_weight", fusion_weight, x)
    channels = checks.convolution(OP, "depthwise", depthwise, x, x.shape[1])
    if depthwise.weight.shape[2:] != (3, 3) or depthwise.stride != 1 or depthwise.padding != 1:
        checks.fail(OP, f"depthwise must be 3x3, stride 1, padding 1, got weight {tuple(depthwise.weight.shape)}")
    if pointwise is not None:
        channels = checks.convolution(OP, "pointwise", pointwise, x, channels)
        if pointwise.weight.shape[2:] != (1, 1) or pointwise.stride != 1 or pointwise.padding != 0:
            checks.fail(OP, f"pointwise must be a 1x1 convolution of stride 1, got {tuple(pointwise.weight.shape)}")
    if shuffle_groups < 1 or channels % shuffle_groups:
        checks.fail(OP, f"shuffle_groups={shuffle_groups} does not divide the {channels} output channels")
    checks.batch_norm(OP, "bn", bn, x, channels)
    record = checks.needs_grad(inputs, fusion_weight, depthwise, pointwise, bn)
    inputs = [checks.autocast_input(item) for item in inputs]
    same = len({item.dtype for item in inputs}) == 1
    backend = registry.select(OP, inputs[0], policy or call_policy(), record, same_dtype=same)
    if backend == "reference" or any(item.numel() == 0 for item in inputs):
        return reference(inputs, resample, fusion_weight, depthwise, pointwise, bn, shuffle_groups, pool, epsilon)
    convs = [depthwise] if pointwise is None else [depthwise, pointwise]
    groups = 1 if pointwise is None else shuffle_groups
    return _call(inputs, resample, fusion_weight, convs, bn, groups, pool, epsilon, backend, record)
