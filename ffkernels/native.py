"""Loading of the native module and what was built; nothing is compiled here."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).parent

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""``ff_dtype`` of csrc/ff_api.h."""
OUT_OF_MEMORY, NOT_SERVED = -3, -4
"""Of ``ff_error`` in csrc/ff_api.h."""
NCHW, NHWC = 0, 1
"""``ff_layout`` of csrc/ff_api.h."""


@functools.cache
def build_info() -> dict[str, Any]:
    """What ``setup.py`` recorded; empty dictionaries with a reason where there is no record."""
    try:
        return json.loads((FOLDER / "_build_info.json").read_text())
    except FileNotFoundError:
        reason = "not built: run pip install -e . in the source folder"
        return {"cpu": {"reason": reason}, "cuda": {"reason": reason}}


@functools.cache
def module() -> tuple[ModuleType | None, str | None]:
    """``(ffkernels._native, None)`` or ``(None, reason)``."""
    built = build_info()
    if built["cpu"].get("reason"):
        return None, built["cpu"]["reason"]
    # In a source checkout they may have moved on since the last build.
    sources = FOLDER.parent / "csrc"
    if (sources / "ff_api.h").exists() and source_hash(sources) != built.get("abi"):
        return None, "built from other sources: run pip install -e . again"
    try:
        from . import _native
    except ImportError as error:
        return None, f"ffkernels._native does not load: {error}"
    return _native, None


def source_hash(folder: Path) -> str:
    """Of what Python relies on in ``csrc``: the functions, and how the CPU engine lays out weights and scratch memory.

    ``setup.py`` computes the same.
    """
    digest = hashlib.sha256()
    for path in [folder / "ff_api.h", *sorted((folder / "cpu").glob("engine*.[ch]*"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check(code: int, op: str, *tensors: torch.Tensor) -> None:
    """Raise for an error code of the native library, naming the op and the shapes of its tensors."""
    if code == 0:
        return
    if code > 0:
        native, _ = module()
        reason = f"CUDA error {code}: {native.ff_cuda_error_string(code)}" if native else f"CUDA error {code}"
    else:
        reason = {-1: "unsupported dtype", -2: "bad argument", OUT_OF_MEMORY: "out of memory"}.get(
            code, f"error {code}"
        )
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}" for t in tensors)
    raise RuntimeError(f"ffkernels.{op}: {reason} ({shapes})")
