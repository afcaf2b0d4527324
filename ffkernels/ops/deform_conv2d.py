"""Modulated deformable convolution in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import BatchNorm, as_dense, normalisation_tensors, update_running_statistics
from ..config import Policy, call_policy
from ..layout import memory_format
from ..params import ConvParams
from ..reference.deform_conv2d import deform_conv2d as reference
from . import checks
from .conv_chain import BATCH_STATISTICS, GIVEN_STATISTICS, NO_BATCH_NORM, Link, links_of, statistics_dtype
from .library import define, first_order, kernels

OP = "deform_conv2d"


def _supports(request: registry.Request) -> str | None:
    return None if request.facts.get("same_dtype", True) else "x, offset and mask have different dtypes"


def _supports_triton(request: registry.Request) -> str | None:
    return _supports(request) if request.facts.get("square", True) else "a kernel that is not square"


registry.register(OP, "cpu", (torch.float32, torch.float64), supports=_supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=_supports)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=_supports_triton)


def _like(x: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(like))


def _saves_raw(link: Link) -> bool:
    return link.normalisation != NO_BATCH_NORM or link.activation != 0


def _run(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    params: list[Tensor | None],
    integers: list[int],
    floats: list[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    (link,) = links_of(params, integers, floats)
    y, stats, z = kernels(backend, OP).forward(x, offset, mask, link, save)
    kept = [stats] if link.batch_statistics or (save and link.given_statistics) else []
    return [y.contiguous(memory_format=memory_format(x)), *kept, *([z] if save and _saves_raw(link) else [])]


def _fake(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    params: list[Tensor | None],
    integers: list[int],
    floats: list[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    (link,) = links_of(params, integers, floats)
    channels = link.weight.shape[0]
    shape = (x.shape[0], channels, *offset.shape[2:])
    outputs = [_like(x, shape, x)]
    if link.batch_statistics or (save and link.given_statistics):
        outputs.append(x.new_empty((4, channels), dtype=statistics_dtype(x)))
    if save and _saves_raw(link):
        outputs.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    return outputs


_raw = define(
    "_deform_conv2d(Tensor x, Tensor offset, Tensor mask, Tensor?[] params, int[] integers, float[] floats, bool save, "
    "str backend) -> Tensor[]",
    _run,
    _fake,
)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    (link,) = links_of(params, integers, floats)
    remaining = list(saved)
    stats = None if link.normalisation == NO_BATCH_NORM else remaining.pop(0)
    z = remaining.pop() if remaining else None
    grads = kernels(backend, OP).backward(grad, x, offset, mask, link, stats, z, needs)
    for i, t in enumerate(t for t, needed in zip((x, offset, mask), needs) if needed):
        grads[i] = grads[i].contiguous(memory_format=memory_format(t))
    return grads


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    maps = [_like(x, t.shape, t) for t, needed in zip((x, offset, mask), needs) if needed]
    return maps + [torch.empty_like(p) for p, needed in zip(params, needs[3:]) if needed]


_raw_backward = define(
    "_deform_conv2d_backward(Tensor grad, Tensor x, Tensor offset, Tensor mask, Tensor?[] params, Tensor[] saved, "
    "int[] integers, float[] floats, bool[] needs, str backend) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


class _DeformConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offset: Tensor,
        mask: Tensor,
        integers: list[int],
        floats: list[float],
        backend: str,
        *params: Tensor | None,
    ):
        y, *saved = _raw(x, offset, mask, list(params), integers, floats, True, backend)
        ctx.save_for_backward(x, offset, mask, *params, *saved)
        ctx.call = len(params), integers, floats, backend
        stats = saved[: integers[4] != NO_BATCH_NORM]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return y, *stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None):
        count, integers, floats, backend = ctx.call
        if grad is None:
            return (None,) * (6 + count)
        x, offset, mask, *rest = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:10]]
        params, saved = rest[:count], rest[count:]
        grads = iter(_raw_backward(grad, x, offset, mask, params, saved, integers, floats, needs, backend))
        found = [next(grads) if needed else None for needed in needs]
        return *found[:3], None, None, None, *found[3:], None, None


def _call(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    conv: ConvParams,
    bn: BatchNorm | None,
    activation: str,
    negative_slope: float,
    backend: str,
    record: bool,
) -> Tensor:
    mode = NO_BATCH_NORM if bn is None else BATCH_STATISTICS if bn.training else GIVEN_STATISTICS
    if mode == BATCH_STATISTICS:
        checks.values_per_channel(OP, (x.shape[0], conv.weight.shape[0], *offset.shape[2:]))
    integers = [conv.stride, conv.padding, conv.groups, checks.ACTIVATIONS.index(activation), mode]
    floats = [negative_slope, 0.0 if bn is None else bn.eps]
    params = [as_dense(conv.weight, x.dtype), as_dense(conv.bias, x.dtype), *normalisation_tensors(bn, x.dtype)]
    if record:
        y, *stats = _DeformConv.apply(x, offset, mask, integers, floats, backend, *params)
    else:
        y, *stats = _raw(x, offset, mask, params, integers, floats, False, backend)
    if mode == BATCH_STATISTICS:
        values = x.shape[0] * offset.shape[2] * offset.shape[3]
        update_running_statistics([(bn, stats[0][0], stats[0][1], values)])
    return y


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    conv: ConvParams,
    bn: BatchNorm | None,
    activation: str = "none",
    negative_slope: float = 0.1,
    *,
    policy: Policy | None = None,
) -> Tensor:
    """Modulated deformable convolution (DCNv2, Zhu et al. 2019), batch normalisation and activation::

        y(p) = act(bn(bias + sum_k w_k * x(stride * p - padding + p_k + offset_k(p)) * mask_k(p)))

    x between pixels is bilinear; pixels outside the image are zero, each of the four neighbours judged on its own.

    Args:
        x: (B, C, H, W), any floating dtype, NCHW or channels_last.
        offset: (B, 2 K, H', W') in pixels, K = kh * kw taps row by row, (dy, dx) for each tap.
        mask: (B, K, H', W'), the factor of each tap as it is to be used.
        conv: the convolution, weight (O, C, kh, kw), one group.
        bn: batch normalisation of O channels, or None.
        activation: ``"none"``, ``"relu"``, ``"leaky_relu"`` or ``"silu"``.
        negative_slope: slope of ``"leaky_relu"`` below zero.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, O, H', W') with H' = (H + 2 padding - kh) // stride + 1, in the dtype of x.

    Raises:
        ValueError: shapes do not fit each other, or the activation is unknown.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    checks.feature_map(OP, "x", x)
    out_channels = checks.convolution(OP, "conv", conv, x, x.shape[1])
    if conv.groups != 1:
        checks.fail(OP, f"conv must have one group, got {conv.groups}")
    kh, kw = conv.weight.shape[2:]
    size = [(n + 2 * conv.padding - k) // conv.stride + 1 for n, k in zip(x.shape[2:], (kh, kw))]
    for name, tensor, channels in (("offset", offset, 2 * kh * kw), ("mask", mask, kh * kw)):
        shape = (x.shape[0], channels, *size)
        if tuple(tensor.shape) != shape:
            checks.fail(OP, f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        checks.same_device(OP, name, tensor, x)
    checks.batch_norm(OP, "bn", bn, x, out_channels)
    checks.activation(OP, activation)
    record = checks.needs_grad(x, offset, mask, conv, bn)
    x, offset, mask = (checks.autocast_input(t) for t in (x, offset, mask))
    same = x.dtype == offset.dtype == mask.dtype
    backend = registry.select(OP, x, policy or call_policy(), record, same_dtype=same, square=kh == kw)
    if backend == "reference" or x.numel() == 0 or offset.numel() == 0:
        return reference(x, offset, mask, conv, bn, activation, negative_slope)
    return _call(x, offset, mask, conv, bn, activation, negative_slope, backend, record)
