"""Triton kernels and their launchers. Triton is optional: CUDA builds of PyTorch bring it."""

from __future__ import annotations

import functools


@functools.cache
def unavailable() -> str | None:
    """Why Triton cannot be imported, ``None`` if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import: {error}"
    return None
