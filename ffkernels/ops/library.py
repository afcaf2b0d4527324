"""Registration of raw ops with PyTorch. Raw ops are private: they have no autograd; public functions guard them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library
from torch.nn import Parameter

from .. import registry
from ..batch_norm import BatchNorm, updatable

_library = Library("ffkernels", "FRAGMENT")


def define(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> Callable[..., object]:
    """Define ``ffkernels::<schema>`` for CPU and CUDA tensors, and the function that computes its output's shapes.

    The schema's name begins with an underscore. Returns the callable op.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"ffkernels::{name}", fake, lib=_library)
    return getattr(torch.ops.ffkernels, name).default


@functools.cache
def kernels(backend: str, op: str) -> ModuleType:
    """The module ``ffkernels.<backend>.<op>``, imported on first use: Triton is optional.

    Raises:
        BackendUnavailable: the backend cannot run on this machine, as where a graph that was saved elsewhere runs.
    """
    reason = registry.backend_unavailable(backend)
    if reason is not None:
        raise registry.BackendUnavailable(f"{op}: backend {backend!r} is not available: {reason}")
    return importlib.import_module(f"ffkernels.{backend}.{op}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


PLAIN = (Tensor, Parameter, NoneType)


def direct(x: Tensor, tensors: Sequence[Tensor | None], bns: Sequence[BatchNorm | None]) -> bool:
    """Whether a call of CPU kernels may leave out the dispatcher, to which a raw op is a call with all its parameters:
    nothing traces it, no tensor is of a subclass, which may have no memory, and the kernels can update the running
    statistics themselves."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and all(type(t) in PLAIN for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and all(bn is None or not bn.training or bn.running_mean is None or updatable(bn, x.dtype) for bn in bns)
    )


def update_from_addresses(uses: Sequence[tuple[BatchNorm, int, int, int]]) -> None:
    """Running statistics of (bn, address of the mean, of the biased variance, values per channel)."""
    from ..cpu.conv import batch_norm_update

    batch_norm_update(uses)


def _batched(grad: Tensor | None) -> bool:
    functorch = torch._C._functorch
    return grad is not None and (functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad))


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, and a clear error for gradients of ``torch.vmap``, which have no memory of their own."""

    @once_differentiable
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.compiler.is_compiling() and any(map(_batched, grads)):
            raise RuntimeError(
                "fused ops take no batched gradients (is_grads_batched, vectorize=True): compute them one by one, or "
                "make the model plain PyTorch with ffkernels.set_fused(model, False)"
            )
        return backward(ctx, *grads)

    return checked


class Planned(torch.autograd.Function):
    """Autograd of a call of CPU kernels whose plan (ffkernels/cpu/op_plan.py) is known."""

    @staticmethod
    def forward(ctx: Any, plan: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, kept = plan.forward(*tensors)
        ctx.plan = plan
        ctx.save_for_backward(y if plan.needs_output else None, kept, *tensors)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return y, kept

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        y, kept, *tensors = ctx.saved_tensors
        return None, *ctx.plan.backward(grad, y, kept, tensors, ctx.needs_input_grad[1:])


def compact(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors that are there."""
    return [t for t in tensors if t is not None]


def planned(plan: Any, tensors: Sequence[Tensor | None], record: bool) -> tuple[Tensor, Tensor]:
    """The output of a plan, and what it keeps."""
    present = compact(tensors)
    return Planned.apply(plan, *present) if record else plan.forward(*present)
