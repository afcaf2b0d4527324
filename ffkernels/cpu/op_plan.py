"""The frame that ops with plans share: maps and parameters in, one map out, and the gradients of what came in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import memory_format
from ..ops.conv_chain import BATCH_STATISTICS, PARAMETERS, Link, links_of, nhwc
from ..ops.library import compact
from .conv import empty_nhwc
from .plan import At, Layout, Plan

GRADIENTS = 4
"""Tensors of a link that have gradients, its first: weight, bias, bn_weight, bn_bias."""


class OpPlan:
    """An op for one size of its inputs.

    Its tensors are maps first, parameters behind them; those that are not ``present`` are left out wherever tensors are
    passed. A plan's bases are in the order of :meth:`run` and :meth:`run_backward`.

    Attributes:
        plan: the calls of the forward pass.
        output: size of the output.
        kept: what the forward pass leaves behind for the backward pass.
        needs_output: whether the backward pass reads the output.
    """

    op: str
    plan: Plan
    output: tuple[int, ...]
    needs_output = False

    def __init__(self, dtype: torch.dtype, maps: int, present: Sequence[bool]) -> None:
        self.dtype, self.maps, self.present = dtype, maps, present
        self.kept = Layout(dtype)
        self.backward_plans: dict[tuple[bool, ...], Plan] = {}
        self.makers = [empty_like_nhwc] * maps + [torch.empty_like] * (sum(present) - maps)
        """What makes the memory of the gradient of each tensor."""

    def places(self, plan: Plan) -> list[At | None]:
        """Bases of the tensors, None of those that are not there."""
        return [plan.base() if there else None for there in self.present]

    def wanted(self, plan: Plan, needs: Sequence[bool]) -> list[At | None]:
        """Bases of the gradients, None of those that are not wanted."""
        marks = iter(needs)
        return [plan.base() if there and next(marks) else None for there in self.present]

    def _plan_backward(self, needs: tuple[bool, ...]) -> Plan:
        raise NotImplementedError

    def run(self, tensors: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
        """The output, NHWC, as all maps are here and below."""
        y = empty_nhwc(self.output, tensors[0])
        self.plan.run(self.op, [*[t.data_ptr() for t in tensors], y.data_ptr(), *kept])
        return y

    def run_backward(
        self,
        grad: Tensor,
        y: Tensor | None,
        tensors: Sequence[Tensor],
        kept: Sequence[int],
        needs: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of the tensors, None where ``needs`` is False."""
        plan = self.backward_plans.get(needs)
        if plan is None:
            plan = self.backward_plans[needs] = self._plan_backward(needs)
        grads = [make(t) if needed else None for make, t, needed in zip(self.makers, tensors, needs)]
        pointers = [t.data_ptr() for t in ((grad, *tensors) if y is None else (grad, y, *tensors))]
        pointers += kept
        pointers += [g.data_ptr() for g in grads if g is not None]
        plan.run(f"{self.op} backward", pointers)
        return grads

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The output in the memory format of the first map, and all that is kept in one tensor."""
        kept = self.kept.empty()
        y = self.run(self._as_nhwc(tensors), self.kept.pointers(kept))
        return y.contiguous(memory_format=memory_format(tensors[0])), kept

    def backward(
        self, grad: Tensor, y: Tensor | None, kept: Tensor, tensors: Sequence[Tensor], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        y = y if y is None else nhwc(y)
        grads = self.run_backward(nhwc(grad), y, self._as_nhwc(tensors), self.kept.pointers(kept), needs)
        for i, x in enumerate(tensors[: self.maps]):
            if grads[i] is not None:
                grads[i] = grads[i].contiguous(memory_format=memory_format(x))
        return grads

    def _as_nhwc(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*map(nhwc, tensors[: self.maps]), *tensors[self.maps :]]


class LinksPlan(OpPlan):
    """An op whose last parameters are those of ``links``, six each."""

    def __init__(
        self,
        dtype: torch.dtype,
        maps: int,
        present: Sequence[bool],
        integers: tuple[int, ...],
        floats: tuple[float, ...],
        shapes: tuple[tuple[int, ...], ...],
    ) -> None:
        super().__init__(dtype, maps, present)
        self.integers, self.floats, self.shapes = integers, floats, shapes
        self.first = len(present) - PARAMETERS * len(shapes)
        modes = integers[4::5]
        for i, mode in enumerate(modes):
            # A constant per channel vanishes when the mean of the batch is subtracted: its gradient is not computed.
            bias = self.first + PARAMETERS * i + 1
            if mode == BATCH_STATISTICS and present[bias]:
                self.makers[sum(present[:bias])] = torch.zeros_like

    def links(self, places: Sequence[At | None]) -> list[Link]:
        return links_of(places[self.first :], self.integers, self.floats)

    def gradients(self, wanted: Sequence[At | None]) -> list[At | None]:
        """``wanted`` without the running statistics, which have none."""
        groups = range(self.first, len(wanted), PARAMETERS)
        return [*wanted[: self.first], *(at for i in groups for at in wanted[i : i + GRADIENTS])]

    def raw_run(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """:meth:`run` with tensors that may be None, and what it keeps as a tensor each."""
        like = tensors[0]
        shapes = self.kept.shapes
        kept = [torch.empty(s, dtype=like.dtype, device="cpu") if len(s) == 2 else empty_nhwc(s, like) for s in shapes]
        return self.run(compact(tensors), [t.data_ptr() for t in kept]), kept

    def raw_backward(
        self, grad: Tensor, tensors: Sequence[Tensor | None], kept: Sequence[int], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """:meth:`run_backward`, ``needs`` being those of the tensors that can have gradients, present or not."""
        every = [*needs[: self.first]]
        for i in range(self.first, len(needs), GRADIENTS):
            every += [*needs[i : i + GRADIENTS], False, False]
        marks = tuple([mark for mark, there in zip(every, self.present) if there])
        return self.run_backward(nhwc(grad), None, compact(tensors), kept, marks)


def empty_like_nhwc(x: Tensor) -> Tensor:
    return empty_nhwc(x.shape, x)
