"""Channel and spatial attention in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..batch_norm import BatchNorm, as_dense
from ..config import Policy, call_policy
from ..layout import memory_format
from ..params import ChannelMLP, ConvParams
from ..reference.cbam import cbam as reference
from . import checks
from .conv_chain import statistics_dtype
from .library import define, direct, first_order, kernels, planned, update_from_addresses

OP = "cbam"


def _supports(request: registry.Request) -> str | None:
    return "a spatial convolution with a bias" if request.facts.get("bias", False) else None


def _supports_triton(request: registry.Request) -> str | None:
    return "more than 65,535 images in a batch" if request.facts.get("many", False) else _supports(request)


def _supports_cuda(request: registry.Request) -> str | None:
    return "kernels larger than 7x7" if request.facts.get("kernel", 1) > 7 else _supports_triton(request)


registry.register(OP, "cpu", (torch.float32, torch.float64), supports=_supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), supports=_supports_cuda)
registry.register(OP, "triton", (torch.float32, torch.float16, torch.bfloat16), supports=_supports_triton)


class Application(NamedTuple):
    """One application f_k as kernels see it: y = f_k(x) + residual, ReLU of that where ``relu``.

    ``order`` 1 puts the maximum first; ``residual_is_x`` says that the residual is x, else it is an argument or absent.
    The tensors are float32 where x is half.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    conv_weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    order: int
    residual_is_x: bool
    relu: bool
    training: bool
    momentum: float
    eps: float


def _application(params: Sequence[Tensor | None], integers: Sequence[int], floats: Sequence[float]) -> Application:
    order, residual_is_x, relu, training = integers
    return Application(*params, order, bool(residual_is_x), bool(relu), bool(training), *floats)


def _run(
    x: Tensor,
    residual: Tensor | None,
    params: list[Tensor | None],
    integers: list[int],
    floats: list[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    y, running, saved = kernels(backend, OP).forward(x, residual, _application(params, integers, floats))
    return [y.contiguous(memory_format=memory_format(x)), *running, *(saved if save else [])]


def _fake(
    x: Tensor,
    residual: Tensor | None,
    params: list[Tensor | None],
    integers: list[int],
    floats: list[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    app = _application(params, integers, floats)
    batch, channels, height, width = x.shape
    groups = app.conv_weight.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    running = [torch.empty_like(t) for t in (app.running_mean, app.running_var) if t is not None and app.training]
    if not save:
        return [y, *running]
    if backend != "cpu":
        # Pooled mean and maximum, channel gate, stats of the spatial maps; maps, their convolution, spatial gate.
        dtype = statistics_dtype(x)
        vectors = [x.new_empty(shape, dtype=dtype) for shape in ((2, batch, channels), (batch, channels), (4, groups))]
        maps = [
            torch.empty((batch, count, height, width), dtype=dtype, device=x.device, memory_format=torch.channels_last)
            for count in (2 * groups, groups, groups)
        ]
        return [y, *running, *vectors, *maps]
    shapes = [(2, batch, channels), (batch, channels), (batch, 2 * groups, height, width)]
    shapes += [(batch, groups, height, width), (4, groups), (batch, groups, height, width)]
    return [y, *running, *(x.new_empty(shape) for shape in shapes)]


_raw = define(
    "_cbam(Tensor x, Tensor? residual, Tensor?[] params, int[] integers, float[] floats, bool save, str backend) "
    "-> Tensor[]",
    _run,
    _fake,
)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    grads = kernels(backend, OP).backward(grad, x, y, _application(params, integers, floats), saved, needs)
    for i in (0, 1):
        if grads[i] is not None:
            grads[i] = grads[i].contiguous(memory_format=memory_format(x))
    return [g for g in grads if g is not None]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    params: list[Tensor | None],
    saved: list[Tensor],
    integers: list[int],
    floats: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    like_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return [torch.empty_like(t) for t, needed in zip([like_x, like_x, *params[:7]], needs) if needed]


_raw_backward = define(
    "_cbam_backward(Tensor grad, Tensor x, Tensor? y, Tensor?[] params, Tensor[] saved, int[] integers, "
    "float[] floats, bool[] needs, str backend) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


class _CBAM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        integers: list[int],
        floats: list[float],
        backend: str,
        *params: Tensor | None,
    ):
        y, *rest = _raw(x, residual, list(params), integers, floats, True, backend)
        _, _, relu, training = integers
        count = sum(t is not None for t in params[7:]) if training else 0
        running, saved = rest[:count], rest[count:]
        # In training the backward pass has no use for the running statistics, which the caller updates in place.
        statistics = (None, None) if training else params[7:]
        ctx.save_for_backward(x, y if relu else None, *params[:7], *statistics, *saved)
        ctx.call = integers, floats, backend
        ctx.mark_non_differentiable(*running)
        ctx.set_materialize_grads(False)
        return y, *running

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        integers, floats, backend = ctx.call
        x, y, *rest = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:12]]
        grads = iter(_raw_backward(grad, x, y, rest[:9], rest[9:], integers, floats, needs, backend))
        found = [next(grads) if needed else None for needed in needs]
        return *found[:2], None, None, None, *found[2:], None, None


def _apply(
    x: Tensor,
    residual: Tensor | None,
    channel_mlp: ChannelMLP,
    spatial: ConvParams,
    bn: BatchNorm,
    spatial_order: str,
    relu: bool,
    backend: str,
    record: bool,
) -> Tensor:
    if bn.training:
        checks.values_per_channel(OP, (x.shape[0], spatial.groups, *x.shape[2:]))
    tensors = [*channel_mlp, spatial.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var]
    dtype = statistics_dtype(x)
    params = [as_dense(t, dtype) for t in tensors]
    integers = [int(spatial_order == "max_mean"), int(residual is x), int(relu), int(bn.training)]
    floats = [float(bn.momentum), float(bn.eps)]
    residual = None if residual is x else residual
    if backend == "cpu" and direct(x, [residual, *params], [bn]):
        if bn.training:
            params[7:] = [None, None]  # the caller updates them in place, and they are not read
        plan = kernels(backend, OP).application_plan(x, residual, params, integers, floats)
        y, kept = planned(plan, [x, residual, *params], record)
        if bn.training:
            values = x.shape[0] * x.shape[2] * x.shape[3]
            update_from_addresses([(bn, *plan.statistics(kept), values)])
        return y
    if record:
        y, *running = _CBAM.apply(x, residual, integers, floats, backend, *params)
    else:
        y, *running = _raw(x, residual, params, integers, floats, False, backend)
    if running:
        with torch.no_grad():
            for target, value in zip((bn.running_mean, bn.running_var), running):
                target.copy_(value)
    return y


def cbam(
    x: Tensor,
    channel_mlp: ChannelMLP,
    spatial: ConvParams,
    spatial_bn: Sequence[BatchNorm],
    spatial_order: str = "mean_max",
    residual: bool = False,
    *,
    policy: Policy | None = None,
) -> Tensor:
    """CBAM (Woo et al. 2018): a gate per channel, then a gate per pixel and group of channels.

    One application f_k to a map a, with MLP(v) = fc2(relu(fc1(v))) applied to every chunk of ``width`` channels::

        u = a * sigmoid(MLP(mean_hw(a)) + MLP(max_hw(a)))
        s = sigmoid(bn_k(conv([mean_c(u_0), max_c(u_0), mean_c(u_1), max_c(u_1), ...])))
        f_k(a) = [u_0 * s_0, u_1 * s_1, ...]           u_i: channel group i of conv.groups

    It is applied once per entry of ``spatial_bn``: a_0 = x, y_k = f_k(a_k), a_(k+1) = a_k + y_k; the last y_k counts.
    Where several values are the maximum, they share its gradient equally.

    Args:
        x: (B, C, H, W), any floating dtype, NCHW or channels_last.
        channel_mlp: fc1 (hidden, width), fc2 (width, hidden), C a multiple of width.
        spatial: 2 G -> G convolution with G groups that keeps the size; C a multiple of G.
        spatial_bn: batch normalisation of G channels for each application.
        spatial_order: ``"mean_max"`` or ``"max_mean"``, the order of the two maps in the convolution's input.
        residual: return relu(y + x) instead of y.
        policy: how to run it; None follows :func:`ffkernels.use`, then the environment.

    Returns:
        (B, C, H, W), in the dtype of x.

    Raises:
        ValueError: shapes do not fit each other, or the order is unknown.
        FusedKernelRequired: the policy is ``"require"`` and no kernel serves the call.
    """
    checks.feature_map(OP, "x", x)
    channels = x.shape[1]
    if channel_mlp.fc1_weight.dim() != 2 or channel_mlp.fc1_weight.shape[1] < 1:
        checks.fail(OP, f"channel_mlp.fc1_weight must be (hidden, width), got {tuple(channel_mlp.fc1_weight.shape)}")
    hidden, width = channel_mlp.fc1_weight.shape
    if channels % width:
        checks.fail(OP, f"the {channels} channels of x are not a multiple of the MLP's width, {width}")
    expected = ((hidden, width), (hidden,), (width, hidden), (width,))
    for field, tensor, shape in zip(channel_mlp._fields, channel_mlp, expected):
        if tensor is not None and tensor.shape != shape:
            checks.fail(OP, f"channel_mlp.{field} must be {shape}, got {tuple(tensor.shape)}")
        checks.same_device(OP, f"channel_mlp.{field}", tensor, x)
    groups = checks.convolution(OP, "spatial", spatial, x, 2 * spatial.groups)
    kernel = spatial.weight.shape[2:]
    if groups != spatial.groups or spatial.stride != 1 or any(k != 2 * spatial.padding + 1 for k in kernel):
        checks.fail(
            OP, f"spatial must map 2 G to G channels in G groups and keep the size, got {tuple(spatial[0].shape)}"
        )
    if channels % groups:
        checks.fail(OP, f"the {channels} channels of x are not a multiple of the {groups} spatial groups")
    if not spatial_bn:
        checks.fail(OP, "spatial_bn is empty: it needs one batch normalisation per application")
    for i, bn in enumerate(spatial_bn):
        checks.batch_norm(OP, f"spatial_bn[{i}]", bn, x, groups)
    if spatial_order not in ("mean_max", "max_mean"):
        checks.fail(OP, f"unknown spatial_order {spatial_order!r}, use 'mean_max' or 'max_mean'")
    record = checks.needs_grad(x, channel_mlp, spatial, spatial_bn)
    x = checks.autocast_input(x)
    facts = {"bias": spatial.bias is not None, "kernel": kernel[0], "many": x.shape[0] > 65535}
    backend = registry.select(OP, x, policy or call_policy(), record, **facts)
    if backend == "reference" or x.numel() == 0:
        return reference(x, channel_mlp, spatial, spatial_bn, spatial_order, residual)
    state = x
    for bn in spatial_bn[:-1]:
        state = _apply(state, state, channel_mlp, spatial, bn, spatial_order, False, backend, record)
    last = x if residual else None
    return _apply(state, last, channel_mlp, spatial, spatial_bn[-1], spatial_order, residual, backend, record)
