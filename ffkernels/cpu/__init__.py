"""The C++ kernels for the CPU: loads the widest instruction set that this machine runs, and calls into it."""

from __future__ import annotations

import functools

from .. import config
from ..native import FOLDER, build_info, module

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
"""Every instruction set that kernels are built for, narrowest first."""

_loaded: str | None = None


def instruction_sets() -> list[str]:
    """Instruction sets that were built and that this machine runs, narrowest first."""
    native, _ = module()
    built = build_info()["cpu"].get("instruction_sets", {})
    return [] if native is None else [isa for isa in native.cpu_instruction_sets() if isa in built]


def set_isa(isa: str | None = None) -> str:
    """Load the kernels of one instruction set (default: the widest up to ``FF_CPU_ISA``). Returns its name.

    Kernels of all instruction sets may be loaded in turn, which is how tests reach each of them.
    """
    global _loaded
    native, reason = module()
    if native is None:
        raise RuntimeError(f"no C++ kernels: {reason}")
    usable = instruction_sets()
    highest = config.cpu_isa_limit()
    if isa is None and highest is not None:
        if highest not in INSTRUCTION_SETS:
            raise ValueError(f"FF_CPU_ISA={highest!r} is no instruction set; use one of: {', '.join(INSTRUCTION_SETS)}")
        allowed = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(highest) + 1]
        usable = [name for name in usable if name in allowed]
        if not usable:
            raise ValueError(f"FF_CPU_ISA={highest!r}: no kernels up to it were built; unset it, or build them")
    chosen = isa or usable[-1]
    if chosen not in usable:
        raise ValueError(f"isa={chosen!r} cannot be used here; use one of: {', '.join(usable)}")
    native.load_cpu(str(FOLDER / "lib" / f"libffcpu_{chosen}.so"))
    if _loaded is not None:
        from . import plan

        plan.clear()
    _loaded = chosen
    return chosen


def loaded_isa() -> str | None:
    """Name of the instruction set in use, ``None`` if the kernels do not load."""
    return None if unavailable() else _loaded


@functools.cache
def unavailable() -> str | None:
    """Why the C++ kernels cannot run, ``None`` if they can. Loads them on the first call.

    A wrong ``FF_CPU_ISA`` raises: it was asked for."""
    native, reason = module()
    if native is None:
        return reason
    if _loaded is None:
        try:
            set_isa()
        except RuntimeError as error:
            return str(error)
    return None


def release_buffers() -> None:
    """Give memory that large tensors left behind (csrc/buffers.h) back to the system."""
    native, _ = module()
    if native is not None:
        native.release_buffers()
