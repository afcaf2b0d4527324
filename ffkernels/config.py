"""How a model or an op is run: plain PyTorch or fused kernels. The only reader of the FF_* run-time environment.

========================  =====================================================================================
``FF_USE_FUSED``          ``0`` plain PyTorch (default), ``1`` the best backend for each op with a recorded reason
                          for every fallback, ``require`` makes a fallback an error
``FF_BACKEND``            ``auto`` (default), ``cpu``, ``cuda``, ``triton`` or ``reference``: use this one only;
                          where ``FF_USE_FUSED`` is not set it is then ``1``
``FF_CPU_ISA``            highest instruction set the C++ kernels may use (see ``python -m ffkernels.info``)
========================  =====================================================================================

A model reads the environment once, when it is built, and keeps a :class:`Policy` on each of its modules.
:func:`set_fused` and :func:`use` change it. No ``forward`` reads the environment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

MODES = ("0", "1", "require")
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")


class Policy(NamedTuple):
    """How ops are run. ``mode`` is one of :data:`MODES`, ``backend`` one of :data:`BACKENDS`."""

    mode: str = "0"
    backend: str = "auto"


Fused = bool | str | Policy | None

_override: Policy | None = None


def _choice(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not a valid value; use one of: {', '.join(allowed)}")
    return value


def _environment() -> Policy | None:
    mode, backend = os.environ.get("FF_USE_FUSED"), os.environ.get("FF_BACKEND") or "auto"
    _choice(backend, BACKENDS, "FF_BACKEND")
    if not mode:
        return None if backend == "auto" else Policy("1", backend)
    return Policy(_choice(mode, MODES, "FF_USE_FUSED"), backend)


def make_policy(fused: Fused, backend: str | None = None) -> Policy:
    """A checked :class:`Policy` from what a user may write: ``True``, ``False``, ``"0"``, ``"1"``, ``"require"``;
    ``None`` is ``"0"``.

    ``backend=None`` takes ``FF_BACKEND``.

    Raises:
        ValueError: a value is none of those.
        BackendUnavailable: the backend cannot run on this machine.
    """
    if isinstance(fused, Policy):
        mode, backend = fused.mode, backend or fused.backend
    else:
        mode = ("1" if fused else "0") if isinstance(fused, bool) or fused is None else fused
    if backend is None:
        backend = os.environ.get("FF_BACKEND") or "auto"
    policy = Policy(_choice(str(mode), MODES, "fused"), _choice(backend, BACKENDS, "backend"))
    if policy.mode != "0" and policy.backend not in ("auto", "reference"):
        from . import registry

        reason = registry.backend_unavailable(policy.backend)
        if reason is not None:
            usable = ["auto", *registry.available_backends()]
            raise registry.BackendUnavailable(
                f"backend {policy.backend!r} is not available: {reason}; available: {', '.join(usable)}"
            )
    return policy


def requested_policy(fused: Fused = None) -> Policy | None:
    """What was asked for: the argument, else the :func:`use` block, else the environment; ``None`` if nothing was."""
    if fused is not None:
        return make_policy(fused)
    if _override is not None:
        return _override
    environment = _environment()
    return None if environment is None else make_policy(environment)


def build_policy(fused: Fused = None) -> Policy:
    """The policy of a module built now: :func:`requested_policy`, by default plain PyTorch."""
    return requested_policy(fused) or Policy()


def _direct_policy() -> Policy | ValueError:
    try:
        return _environment() or Policy("1")
    except ValueError as error:
        return error  # for the first call, so that the package can be imported


_DIRECT = _direct_policy()


def call_policy() -> Policy:
    """The policy of an op called directly, without a module: the :func:`use` block, else the environment as it was
    when ``ffkernels`` was imported, else the best backend."""
    if isinstance(_DIRECT, ValueError):
        raise _DIRECT
    return _override or _DIRECT


def set_fused(model: nn.Module, fused: Fused = True, backend: str | None = None) -> nn.Module:
    """Make every fused module inside ``model`` follow this policy from now on. Returns ``model``."""
    from .nn.module import FusedModule

    policy = make_policy(fused, backend)
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.ff_policy = policy
    return model


@contextlib.contextmanager
def use(fused: Fused = True, backend: str | None = None, *, model: nn.Module | None = None) -> Iterator[Policy]:
    """Inside the block, models that are built and ops that are called directly follow this policy.

    With ``model``, that model's modules follow it too and get their own policies back at the end. The block is
    process-wide, not per thread.
    """
    global _override
    from .nn.module import FusedModule

    policy = make_policy(fused, backend)
    modules = [] if model is None else [m for m in model.modules() if isinstance(m, FusedModule)]
    before = [m.ff_policy for m in modules]
    outer, _override = _override, policy
    for module in modules:
        module.ff_policy = policy
    try:
        yield policy
    finally:
        _override = outer
        for module, old in zip(modules, before):
            module.ff_policy = old


def cpu_isa_limit() -> str | None:
    """``FF_CPU_ISA``: the highest instruction set that the C++ kernels may use; ``None`` for no limit."""
    return os.environ.get("FF_CPU_ISA") or None


def triton_interpreter() -> bool:
    """Whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
