"""Calls into csrc/cpu/cbam.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import memory_format
from ..ops.cbam import Application
from ..ops.conv_chain import nhwc
from .conv import batch_norm_update, empty_nhwc, pointer
from .plan import At, Layout, Plan, cached

PARAMETERS = 7
"""Tensors of an application that have gradients; two running statistics follow them."""


class ApplicationPlan:
    """An application for one size of its input.

    What it keeps: pooled mean and maximum, channel gate, maps, their convolution, its ``stats``, spatial gate.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        shapes: tuple[tuple[int, ...], ...],
        integers: tuple[int, ...],
        floats: tuple[float, ...],
    ) -> None:
        order, residual_is_x, relu, training = integers
        (hidden, width), (self.groups, _, kernel, _) = shapes
        self.size, self.dtype, self.training = size, dtype, bool(training)
        self.residual_is_x, self.needs_output, self.eps = bool(residual_is_x), bool(relu), floats[1]
        self.mlp = ((hidden, width), (hidden,), (width, hidden), (width,))
        self.numbers = (*size, hidden, width, self.groups, kernel, order)
        batch, channels, height, width = size
        self.pixels = height * width
        self.kept = Layout(dtype)
        self.kept.add(2, batch, channels)
        self.kept.add(batch, channels)
        self.kept.add(batch, 2 * self.groups, height, width)
        self.kept.add(batch, self.groups, height, width)
        self.kept.add(4, self.groups)
        self.kept.add(batch, self.groups, height, width)
        self.plan = self._plan_forward()
        self.backward_plans: dict[tuple[bool, ...], Plan] = {}

    def _workspace(self, plan: Plan, backward: int) -> At:
        return plan.workspace(plan.native.ff_cpu_cbam_workspace(backward, *self.numbers, plan.dtype, plan.threads))

    def _plan_forward(self) -> Plan:
        plan = Plan(self.dtype)
        x, residual, y = plan.base(), plan.base(), plan.base()
        *mlp_and_conv, bn_weight, bn_bias, mean, var = [plan.base() for _ in range(PARAMETERS + 2)]
        pooled, gate, maps, z, stats, spatial = [plan.base() for _ in self.kept.shapes]
        batch, channels = self.size[:2]
        planes = (batch, self.groups, self.pixels)
        workspace = self._workspace(plan, 0)
        plan.call("ff_cpu_cbam_maps", x, *mlp_and_conv, pooled, gate, maps, z, *self.numbers, workspace)
        if not self.training:
            plan.call_single(
                "ff_cpu_batch_norm_coefficients", mean, var, bn_weight, bn_bias, self.eps, self.groups, stats
            )
        workspace = plan.workspace(plan.native.ff_cpu_cbam_gate_workspace(batch, self.groups))
        plan.call(
            "ff_cpu_cbam_gate", z, bn_weight, bn_bias, self.eps, int(self.training), stats, spatial, *planes, workspace
        )
        rest = (int(self.needs_output), y, batch, channels, self.pixels, self.groups)
        plan.call("ff_cpu_cbam_apply", x, gate, spatial, residual, *rest)
        return plan

    def _plan_backward(self, needs: tuple[bool, ...]) -> Plan:
        plan = Plan(self.dtype)
        grad, x, y = plan.base(), plan.base(), plan.base()
        *mlp_and_conv, _, _, _, _ = [plan.base() for _ in range(PARAMETERS + 2)]
        pooled, gate, maps, z, stats, spatial = [plan.base() for _ in self.kept.shapes]
        grad_x = plan.base()
        grads = [plan.base() for _ in range(PARAMETERS)]
        batch, channels = self.size[:2]
        planes = (batch, self.groups, self.pixels)
        count = batch * self.groups * self.pixels
        grad_spatial, grad_z = plan.scratch(count * plan.itemsize), plan.scratch(count * plan.itemsize)
        rest = (batch, channels, self.pixels, self.groups)
        plan.call("ff_cpu_cbam_spatial_gradient", grad, y, x, gate, grad_spatial, *rest)
        workspace = plan.workspace(plan.native.ff_cpu_cbam_gate_workspace(batch, self.groups))
        affine = grads[5:]
        plan.call(
            "ff_cpu_cbam_gate_gradient",
            *(grad_spatial, spatial, z, stats, int(self.training), self.eps, grad_z, *affine, *planes, workspace),
        )
        sizes = [rows[0] * (rows[1] if len(rows) > 1 else 1) for rows in self.mlp]
        sizes.append(2 * self.groups * self.numbers[7] ** 2)
        doubles = [plan.scratch(8 * n) for n in sizes]
        if not needs[6]:
            doubles[-1] = None
        plan.call(
            "ff_cpu_cbam_backward",
            *(grad, y, x, *mlp_and_conv, pooled, gate, maps, spatial, grad_z, int(self.residual_is_x), grad_x),
            *doubles,
            *self.numbers,
            self._workspace(plan, 1),
        )
        for source, n, target, needed in zip(doubles, sizes, grads, needs[2:]):
            if needed:
                plan.call_single("ff_cpu_from_double", source, n, target)
        return plan

    def run(self, x: Tensor, residual: Tensor | None, params: Sequence[Tensor | None], kept: list[int]) -> Tensor:
        """The output, NHWC. x and residual are NHWC."""
        y = empty_nhwc(self.size, x)
        place = x.data_ptr() if self.residual_is_x else pointer(residual)
        self.plan.run("cbam", [x.data_ptr(), place, y.data_ptr(), *map(pointer, params), *kept])
        return y

    def run_backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        params: Sequence[Tensor | None],
        kept: list[int],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of x, residual (NHWC), and the first seven params, None where ``needs`` is False."""
        grad_residual = None
        if needs[1]:
            grad_residual = grad.clone() if y is None else torch.ops.aten.threshold_backward(grad, y, 0)
        key = tuple(needs)
        if not any((key[0], *key[2:])):
            return [None, grad_residual, *[None] * PARAMETERS]
        plan = self.backward_plans.get(key)
        if plan is None:
            plan = self.backward_plans[key] = self._plan_backward(key)
        grad_x = empty_nhwc(self.size, x) if key[0] else None
        grads = [torch.empty_like(p) if needed else None for p, needed in zip(params, key[2:])]
        tensors = [pointer(t) for t in (grad, x, y, *params)]
        plan.run("cbam backward", [*tensors, *kept, pointer(grad_x), *map(pointer, grads)])
        return [grad_x, grad_residual, *grads]

    def forward(self, x: Tensor, residual: Tensor | None, *params: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = self.kept.empty()
        residual = None if residual is None else nhwc(residual)
        y = self.run(nhwc(x), residual, params, self.kept.pointers(kept))
        return y.contiguous(memory_format=memory_format(x)), kept

    def backward(
        self, grad: Tensor, y: Tensor | None, kept: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        x, _, *params = tensors
        y = None if y is None else nhwc(y)
        wanted = needs[: 2 + PARAMETERS]
        found = self.run_backward(nhwc(grad), nhwc(x), y, params, self.kept.pointers(kept), wanted)
        for i in (0, 1):
            if found[i] is not None:
                found[i] = found[i].contiguous(memory_format=memory_format(x))
        return [*found, None, None]

    def statistics(self, kept: Tensor) -> tuple[int, int]:
        """Addresses of the mean and variance of the spatial maps."""
        place = self.kept.pointers(kept)[4]
        return place, place + self.groups * kept.itemsize


def application_plan(
    x: Tensor, params: Sequence[Tensor | None], integers: Sequence[int], floats: Sequence[float]
) -> ApplicationPlan:
    shapes = tuple(params[0].shape), tuple(params[4].shape)
    # The momentum, which may be another one in every step, is not the plan's business.
    return cached(ApplicationPlan, tuple(x.shape), x.dtype, shapes, tuple(integers), (0.0, floats[1]))


def plan_of(x: Tensor, app: Application) -> ApplicationPlan:
    integers = (app.order, int(app.residual_is_x), int(app.relu), int(app.training))
    return application_plan(x, app[: PARAMETERS + 2], integers, (app.momentum, app.eps))


def forward(x: Tensor, residual: Tensor | None, app: Application) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output (NHWC), the running statistics after it, and what the backward pass needs."""
    x = nhwc(x)
    residual = None if residual is None else nhwc(residual)
    plan = plan_of(x, app)
    kept = [x.new_empty(shape) for shape in plan.kept.shapes]
    y = plan.run(x, residual, app[: PARAMETERS + 2], [t.data_ptr() for t in kept])
    running = []
    if app.training and app.running_mean is not None:
        running = [app.running_mean.clone(), app.running_var.clone()]
        mean, var, *_ = kept[4]
        count = x.shape[0] * plan.pixels
        updated = app._replace(running_mean=running[0], running_var=running[1])
        batch_norm_update([(updated, mean.data_ptr(), var.data_ptr(), count)])
    return y, running, kept


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, app: Application, saved: list[Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, bn_weight, bn_bias.

    ``y`` is the output where it ended in a ReLU."""
    grad, x = nhwc(grad), nhwc(x)
    y = None if y is None else nhwc(y)
    params = app[: PARAMETERS + 2]
    return plan_of(x, app).run_backward(grad, x, y, params, [t.data_ptr() for t in saved], needs)
