"""Detection heads of all levels in one op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..config import Policy, call_policy
from ..params import ConvParams, ConvUnit, HeadParams
from ..reference.multi_head import multi_head as reference
from . import checks
from .conv_chain import batched, facts_of, nhwc, output_sizes, run_chain, supports, supports_cuda
from .library import define, first_order, kernels

OP = "multi_head"


def _supports(request: registry.Request, conv_supports: Callable = supports) -> str | None:
    if not request.facts.get("same_dtype", True):
        return "the levels have different dtypes"
    if request.facts.get("grouped", False):
        return "predictors with groups"
    return conv_supports(request)


registry.register(OP, "cpu", (torch.float32, torch.float64), supports=_supports)
registry.register(
    OP,
    "cuda",
    (torch.float32, torch.float16, torch.bfloat16),
    supports=functools.partial(_supports, conv_supports=supports_cuda),
)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=_supports)


def _run(maps: list[Tensor], softmax: bool, backend: str) -> list[Tensor]:
    return list(kernels(backend, OP).scatter([nhwc(z) for z in maps], softmax))


def _fake(maps: list[Tensor], softmax: bool, backend: str) -> list[Tensor]:
    rows = sum(z.shape[1] // 16 * z.shape[2] * z.shape[3] for z in maps)
    return [maps[0].new_empty((maps[0].shape[0], rows, k)) for k in (4, 2, 10)]


_raw = define("_multi_head_rows(Tensor[] maps, bool softmax, str backend) -> Tensor[]", _run, _fake)


def _run_backward(
    grads: list[Tensor | None], probabilities: Tensor | None, shapes: list[int], backend: str
) -> list[Tensor]:
    grads = [g if g is None else g.contiguous() for g in grads]
    return kernels(backend, OP).gather(grads, probabilities, batched(shapes, 4))


def _fake_backward(
    grads: list[Tensor | None], probabilities: Tensor | None, shapes: list[int], backend: str
) -> list[Tensor]:
    like = next(g for g in grads if g is not None)
    return [
        torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        for shape in batched(shapes, 4)
    ]


_raw_backward = define(
    "_multi_head_rows_backward(Tensor?[] grads, Tensor? probabilities, SymInt[] shapes, str backend) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softmax: bool, backend: str, *maps: Tensor) -> tuple[Tensor, ...]:
        outputs = _raw(list(maps), softmax, backend)
        ctx.save_for_backward(*outputs[1:2] if softmax else ())
        ctx.rest = [n for z in maps for n in z.shape], backend
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None):
        shapes, backend = ctx.rest
        if all(g is None for g in grads):
            return (None,) * (2 + len(shapes) // 4)
        saved = ctx.saved_tensors
        probabilities = saved[0] if saved else None
        return None, None, *_raw_backward(list(grads), probabilities, shapes, backend)


def multi_head(
    features: Sequence[Tensor],
    heads: Sequence[HeadParams],
    softmax: bool = False,
    *,
    policy: Policy | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, classes and landmarks of every anchor of every level.

    Per level, t = relu(bn(trunk(x))), or x without a trunk; then three 1x1 convolutions with A * 4, A * 2 and A * 10
    channels for A anchors per pixel. The N rows of the outputs run level by level, inside a level row by row, then
    column by column, then anchor by anchor.

    Args:
        features: maps (B, C_l, H_l, W_l) of one dtype, NCHW or channels_last.
        heads: one per level.
        softmax: return class probabilities (softmax over the two classes) instead of logits.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        bbox (B, N, 4), cls (B, N, 2), landmarks (B, N, 10), N = sum of H_l * W_l * A. Probabilities are float32 under
        a GPU's autocast, as those of ``torch.softmax`` are.

    Raises:
        ValueError: levels and heads differ in number, or shapes do not fit each other; a batch is the same at all
            levels.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    if len(features) == 0 or len(features) != len(heads):
        checks.fail(OP, f"needs as many heads as levels, at least one, got {len(heads)} and {len(features)}")
    for i, (x, head) in enumerate(zip(features, heads)):
        checks.feature_map(OP, f"features[{i}]", x)
        checks.same_device(OP, f"features[{i}]", x, features[0])
        if x.shape[0] != features[0].shape[0]:
            checks.fail(OP, f"features[{i}] has a batch of {x.shape[0]}, features[0] one of {features[0].shape[0]}")
        channels = x.shape[1]
        if head.trunk is not None:
            channels = checks.convolution(OP, f"heads[{i}].trunk", head.trunk, x, channels)
            checks.batch_norm(OP, f"heads[{i}].trunk_bn", head.trunk_bn, x, channels)
        predictors = ((head.bbox, "bbox", 4), (head.cls, "cls", 2), (head.landmarks, "landmarks", 10))
        anchors = head.bbox.weight.shape[0] // 4
        for conv, name, per_anchor in predictors:
            out_channels = checks.convolution(OP, f"heads[{i}].{name}", conv, x, channels)
            if conv.weight.shape[2:] != (1, 1) or conv.stride != 1 or conv.padding != 0:
                checks.fail(OP, f"heads[{i}].{name} must be a 1x1 convolution, got weight {tuple(conv.weight.shape)}")
            if out_channels != anchors * per_anchor:
                checks.fail(
                    OP, f"heads[{i}].{name} has {out_channels} channels, {anchors} anchors need {anchors * per_anchor}"
                )
    wide = softmax and checks.autocast_dtype(features[0].device.type) in (torch.float16, torch.bfloat16)
    y = _fused(features, heads, softmax and not wide, policy)
    if y is None:
        return reference(features, heads, softmax)
    return (y[0], torch.softmax(y[1].float(), -1), y[2]) if wide else y


def _fused(
    features: Sequence[Tensor], heads: Sequence[HeadParams], softmax: bool, policy: Policy | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    record = checks.needs_grad(features, heads)
    features = [checks.autocast_input(x) for x in features]
    predictors = [conv for head in heads for conv in (head.bbox, head.cls, head.landmarks)]
    facts = facts_of([*predictors, *(head.trunk for head in heads if head.trunk is not None)])
    facts["same_dtype"] = all(x.dtype == features[0].dtype for x in features)
    facts["grouped"] = any(conv.groups != 1 for conv in predictors)
    backend = registry.select(OP, features[0], policy or call_policy(), record, **facts)
    if backend == "reference":
        return None
    levels = []
    for x, head in zip(features, heads):
        units = [] if head.trunk is None else [ConvUnit(head.trunk, head.trunk_bn, "relu")]
        units.append(ConvUnit(joined(head), None))
        sizes = output_sizes(x, units)
        if x.numel() == 0 or min(sizes[0]) < 1:
            return None
        if head.trunk_bn is not None and head.trunk_bn.training:
            checks.values_per_channel(OP, (x.shape[0], units[0].conv.weight.shape[0], *sizes[0]))
        levels.append((x, units, sizes))
    maps = [run_chain(nhwc(x), units, sizes, backend, record) for x, units, sizes in levels]
    if record:
        return _Rows.apply(softmax, backend, *maps)
    return tuple(_raw(maps, softmax, backend))


def joined(head: HeadParams) -> ConvParams:
    """The three predictors as one 1x1 convolution: boxes, classes, landmarks."""
    predictors = (head.bbox, head.cls, head.landmarks)
    bias = None
    if any(conv.bias is not None for conv in predictors):
        bias = torch.cat([c.weight.new_zeros(len(c.weight)) if c.bias is None else c.bias for c in predictors])
    return ConvParams(torch.cat([conv.weight for conv in predictors]), bias)
