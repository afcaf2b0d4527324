"""Which backend serves which op, for which device, dtype, layout and mode. Every "no" has a reason.

Ops name their implementations with :func:`register`; :func:`select` picks one for a call. Tests, benchmarks, the
documentation's table and :func:`ffkernels.report` all iterate this registry, so nothing can be added and not shown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measurements
from .config import Policy, triton_interpreter

log = logging.getLogger("ffkernels")

PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""Backends by device type, best first where :mod:`ffkernels.measurements` does not know better. Triton on CPU tensors
(the interpreter) is for tests: only when forced."""


class Request(NamedTuple):
    """One call as an implementation's ``supports`` sees it; ``size`` as in :func:`measurements.size_of`."""

    device_type: str
    dtype: torch.dtype
    needs_grad: bool
    channels_last: bool
    facts: dict[str, Any]
    size: int = 0


class Selection(NamedTuple):
    """The backend that serves a call, and why each better one does not: ``((backend, reason), ...)``."""

    backend: str
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def reason(self) -> str:
        return "; ".join(f"{backend}: {reason}" for backend, reason in self.refused)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. ``dtypes`` are tensor dtypes, ``supports`` refuses further calls with a reason."""

    op: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    backward: bool
    supports: Callable[[Request], str | None] | None = field(default=None, compare=False)

    def refuses(self, request: Request) -> str | None:
        if request.dtype not in self.dtypes:
            return f"no {str(request.dtype).removeprefix('torch.')} kernel"
        if request.needs_grad and not self.backward:
            return "no backward kernel"
        return None if self.supports is None else self.supports(request)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run on this machine."""


class FusedKernelRequired(RuntimeError):
    """A call that no fused kernel serves, made with ``FF_USE_FUSED=require``."""


_implementations: dict[str, dict[str, Implementation]] = {}
_cache: dict[tuple, Selection] = {}
_recorder: list[tuple[str, Selection]] | None = None
_logged: set[tuple[str, str]] = set()


def declare(op: str) -> None:
    """Make ``op`` known; it always has its reference implementation."""
    _implementations.setdefault(op, {})


def register(
    op: str,
    backend: str,
    dtypes: tuple[torch.dtype, ...],
    *,
    backward: bool = True,
    supports: Callable[[Request], str | None] | None = None,
) -> None:
    """Name an implementation of ``op``. ``supports(request)`` returns ``None`` or the reason for a refusal."""
    declare(op)
    _implementations[op][backend] = Implementation(op, backend, dtypes, backward, supports)
    _cache.clear()


def ops() -> list[str]:
    """Names of all ops."""
    return sorted(_implementations)


def implementations(op: str) -> dict[str, Implementation]:
    """Implementations of ``op`` by backend, the reference not included."""
    return dict(_implementations[op])


def backend_unavailable(backend: str, device_type: str | None = None) -> str | None:
    """Why ``backend`` cannot run on this machine (or on tensors of ``device_type``); ``None`` if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        from . import triton as triton_backend

        if (reason := triton_backend.unavailable()) is not None:
            return reason
        interpreted = triton_interpreter()
        if device_type == "cpu" and not interpreted:
            return "Triton kernels need CUDA tensors (CPU tensors only under TRITON_INTERPRET=1)"
        if not interpreted and not torch.cuda.is_available():
            return "Triton needs a CUDA device"
        return None
    if backend == "cpu":
        from . import cpu

        return f"the tensor is on {device_type}" if device_type not in (None, "cpu") else cpu.unavailable()
    if backend == "cuda":
        from . import cuda

        wrong = device_type not in (None, cuda.device_type())
        return f"the tensor is on {device_type}" if wrong else cuda.unavailable()
    return f"unknown backend {backend!r}"


def available_backends() -> list[str]:
    """Backends that can run on this machine."""
    return [b for b in ("cpu", "cuda", "triton", "reference") if backend_unavailable(b) is None]


def _resolve(op: str, policy: Policy, request: Request) -> Selection:
    candidates: tuple[str, ...]
    if policy.backend == "auto":
        candidates = PREFERENCE.get(request.device_type, ())
        if request.size:
            candidates = measurements.order(op, request.dtype, request.size, candidates)
    elif policy.backend == "reference":
        candidates = ()
    else:
        candidates = (policy.backend,)
    refused = []
    for backend in candidates:
        implementation = _implementations[op].get(backend)
        if implementation is None:
            reason = "no kernel for this op"
        else:
            reason = backend_unavailable(backend, request.device_type) or implementation.refuses(request)
        if reason is None:
            return Selection(backend, tuple(refused))
        refused.append((backend, reason))
    if not candidates:
        asked = policy.backend == "reference"
        refused.append(("reference", "asked for") if asked else (request.device_type, "no backend for this device"))
    return Selection("reference", tuple(refused))


def explain(op: str, policy: Policy, request: Request) -> Selection:
    """The selection for a described call, without making it."""
    if policy.mode == "0":
        return Selection("reference", (("fused", "FF_USE_FUSED=0"),))
    return _resolve(op, policy, request)


def _constant_explain(op: str, mode: str, backend: str, *request: Any) -> tuple[str, str]:
    *head, facts, size = request
    selection = explain(op, Policy(mode, backend), Request(*head, dict(facts), size))
    return selection.backend, selection.reason


# All that torch.compiler.assume_constant_result does, but that imports torch._dynamo, which takes seconds.
_constant_explain._dynamo_marked_constant = True


def select(op: str, x: Tensor, policy: Policy, needs_grad: bool = False, **facts: Any) -> str:
    """Name of the backend that serves this call of ``op`` on ``x``.

    ``facts`` (hashable) are what implementations may decide by, such as ``groups``. Raises
    :class:`FusedKernelRequired` where ``policy.mode`` is ``"require"`` and only the reference is left.
    """
    if policy.mode == "0" and _recorder is None:
        return "reference"
    channels_last = not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    size = measurements.size_of(op, x, needs_grad)
    call = (x.device.type, x.dtype, needs_grad, channels_last, tuple(facts.items()), size)
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return _checked(op, x, policy, "reference", "ONNX export")
        return _checked(op, x, policy, *_constant_explain(op, policy.mode, policy.backend, *call))
    if torch.jit.is_tracing():
        return _checked(op, x, policy, "reference", "TorchScript tracing")
    if torch._C._are_functorch_transforms_active():
        return _checked(op, x, policy, "reference", "inside a torch.func transform")
    if forward_mode():
        return _checked(op, x, policy, "reference", "inside forward-mode differentiation")
    key = (op, policy, call)
    selection = _cache.get(key)
    if selection is None:
        selection = _cache[key] = explain(op, policy, Request(*call[:4], facts, size))
        _log_fallback(op, policy, selection)
    if _recorder is not None:
        _recorder.append((op, selection))
    if selection.backend == "reference":
        return _checked(op, x, policy, "reference", selection.reason)
    return selection.backend


def forward_mode() -> bool:
    """Whether tangents may be carried along (``torch.autograd.forward_ad``), of which the kernels know nothing."""
    return torch.autograd.forward_ad._current_level >= 0


def _checked(op: str, x: Tensor, policy: Policy, backend: str, reason: str) -> str:
    if backend == "reference" and policy.mode == "require" and policy.backend != "reference":
        raise FusedKernelRequired(
            f"{op}: no fused kernel for {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device} "
            f"({reason}); set FF_USE_FUSED=1 to fall back to PyTorch"
        )
    return backend


def _log_fallback(op: str, policy: Policy, selection: Selection) -> None:
    if policy.mode == "0" or selection.backend != "reference" or policy.backend == "reference":
        return
    if (op, selection.reason) not in _logged:
        _logged.add((op, selection.reason))
        log.warning("%s runs on plain PyTorch (%s)", op, selection.reason)


def recording() -> bool:
    """Whether calls are being recorded."""
    return _recorder is not None


@contextmanager
def record(calls: list[tuple[str, Selection]]) -> Iterator[None]:
    """Append ``(op, selection)`` of every eager call inside the block to ``calls``."""
    global _recorder
    before, _recorder = _recorder, calls
    try:
        yield
    finally:
        _recorder = before
