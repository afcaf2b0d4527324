"""Memory for weights and arenas."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

HUGE_PAGE = 2**21
HUGE_PAGES_FROM = 2**19
"""Bytes from which an array has huge pages to itself: in pages of 4 KB, a network's rows and weights need more entries
than the TLB has."""


def aligned(floats: int) -> np.ndarray:
    """An uninitialised float32 array, 64-byte aligned, on huge pages where it is large and the system has them."""
    size = 4 * floats
    if size < HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw, alignment = np.empty(floats + 16, np.float32), 64
    else:
        pages = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        raw, alignment = np.frombuffer(pages, np.float32), HUGE_PAGE
    start = -raw.ctypes.data % alignment // 4
    return raw[start : start + floats]
