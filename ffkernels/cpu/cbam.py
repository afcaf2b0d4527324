"""Calls into csrc/cpu/cbam.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.cbam import Application
from ..ops.conv_chain import nhwc
from ..ops.library import compact
from .conv import batch_norm_update
from .op_plan import OpPlan
from .plan import At, Plan, cached

PARAMETERS = 7
"""Tensors of an application that have gradients; two running statistics follow them."""


class ApplicationPlan(OpPlan):
    """An application for one size of its input.

    Its tensors are x, a residual that is not x, the parameters, and the running statistics. What it keeps: pooled mean
    and maximum, channel gate, maps, their convolution, its ``stats``, spatial gate.
    """

    op = "cbam"

    def __init__(
        self,
        size: tuple[int, ...],
        dtype: torch.dtype,
        shapes: tuple[tuple[int, ...], ...],
        integers: tuple[int, ...],
        eps: float,
        present: tuple[bool, ...],
    ) -> None:
        super().__init__(dtype, 1 + present[1], present)
        order, residual_is_x, relu, training = integers
        (hidden, width), (self.groups, _, kernel, _) = shapes
        self.size = self.output = size
        self.training, self.residual_is_x, self.needs_output = bool(training), bool(residual_is_x), bool(relu)
        self.eps = eps
        self.mlp = ((hidden, width), (hidden,), (width, hidden), (width,))
        self.numbers = (*size, hidden, width, self.groups, kernel, order)
        batch, channels, height, width = size
        self.pixels = height * width
        self.kept.add(2, batch, channels)
        self.kept.add(batch, channels)
        self.kept.add(batch, 2 * self.groups, height, width)
        self.kept.add(batch, self.groups, height, width)
        self.kept.add(4, self.groups)
        self.kept.add(batch, self.groups, height, width)
        self.plan = self._plan_forward()

    def _workspace(self, plan: Plan, backward: int) -> At:
        return plan.workspace(plan.native.ff_cpu_cbam_workspace(backward, *self.numbers, plan.dtype, plan.threads))

    def _plan_forward(self) -> Plan:
        plan = Plan(self.dtype)
        x, residual, *mlp_and_conv, bn_weight, bn_bias, mean, var = self.places(plan)
        residual = x if self.residual_is_x else residual
        y = plan.base()
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
        grad = plan.base()
        y = plan.base() if self.needs_output else None
        x, _, *mlp_and_conv, _, _, _, _ = self.places(plan)
        pooled, gate, maps, z, stats, spatial = [plan.base() for _ in self.kept.shapes]
        grad_x, _, *grads = self.wanted(plan, needs)
        grads = grads[:PARAMETERS]
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
        if grads[4] is None:
            doubles[-1] = None
        plan.call(
            "ff_cpu_cbam_backward",
            *(grad, y, x, *mlp_and_conv, pooled, gate, maps, spatial, grad_z, int(self.residual_is_x), grad_x),
            *doubles,
            *self.numbers,
            self._workspace(plan, 1),
        )
        for source, n, target in zip(doubles, sizes, grads):
            if target is not None:
                plan.call_single("ff_cpu_from_double", source, n, target)
        return plan

    def run_backward(
        self,
        grad: Tensor,
        y: Tensor | None,
        tensors: Sequence[Tensor],
        kept: Sequence[int],
        needs: tuple[bool, ...],
    ) -> list[Tensor | None]:
        residual = None
        if self.maps > 1 and needs[1]:
            residual, needs = residual_gradient(grad, y), (needs[0], False, *needs[2:])
        grads = super().run_backward(grad, y, tensors, kept, needs) if any(needs) else [None] * len(tensors)
        if residual is not None:
            grads[1] = residual
        return grads

    def statistics(self, kept: Tensor) -> tuple[int, int]:
        """Addresses of the mean and variance of the spatial maps."""
        place = kept.data_ptr() + self.kept.offsets[4]
        return place, place + self.groups * kept.itemsize


def residual_gradient(grad: Tensor, y: Tensor | None) -> Tensor:
    """``y`` is the output where it ended in a ReLU."""
    return grad.clone() if y is None else torch.ops.aten.threshold_backward(grad, y, 0)


def application_plan(
    x: Tensor,
    residual: Tensor | None,
    params: Sequence[Tensor | None],
    integers: Sequence[int],
    floats: Sequence[float],
) -> ApplicationPlan:
    # The momentum, which may be another one in every step, is not the plan's business.
    present = (True, residual is not None, *[p is not None for p in params])
    shapes = params[0].shape, params[4].shape
    return cached(ApplicationPlan, x.shape, x.dtype, shapes, tuple(integers), floats[1], present)


def plan_of(x: Tensor, residual: Tensor | None, app: Application) -> tuple[ApplicationPlan, list[Tensor]]:
    """The plan, and its tensors."""
    integers = (app.order, int(app.residual_is_x), int(app.relu), int(app.training))
    params = app[: PARAMETERS + 2]
    plan = application_plan(x, residual, params, integers, (app.momentum, app.eps))
    return plan, compact([x, residual, *params])


def forward(x: Tensor, residual: Tensor | None, app: Application) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output (NHWC), the running statistics after it, and what the backward pass needs."""
    x = nhwc(x)
    plan, tensors = plan_of(x, None if residual is None else nhwc(residual), app)
    kept = [x.new_empty(shape) for shape in plan.kept.shapes]
    y = plan.run(tensors, [t.data_ptr() for t in kept])
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
    residual = residual_gradient(grad, y) if needs[1] else None
    params = app[: PARAMETERS + 2]
    marks = [needs[0], *[mark for mark, p in zip([*needs[2:], False, False], params) if p is not None]]
    if not any(marks):
        return [None, residual, *[None] * PARAMETERS]
    plan, tensors = plan_of(x, None, app)
    found = iter(plan.run_backward(grad, y, tensors, [t.data_ptr() for t in saved], tuple(marks)))
    grad_x = next(found)
    return [grad_x, residual, *[None if p is None else next(found) for p in params[:PARAMETERS]]]
