"""Which GPU backend serves an op faster: measurements.json, written by ``scripts/gpu_check.py --stage ops --table``.

A row is one layer without gradients: ``{"op", "dtype", "elements": of x, "ms": {backend: median}}``; ``measured`` says
where and when. Without a row for an op and dtype, :data:`ffkernels.registry.PREFERENCE` decides.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("measurements.json")


Rows = dict[tuple[str, torch.dtype], list[dict[str, Any]]]


def by_op_and_dtype(rows: list[dict[str, Any]]) -> Rows:
    found: Rows = {}
    for row in rows:
        found.setdefault((row["op"], getattr(torch, row["dtype"])), []).append(row)
    return found


@functools.cache
def table() -> Rows:
    return by_op_and_dtype(json.loads(TABLE.read_text())["rows"])


def size_of(op: str, x: Tensor, needs_grad: bool) -> int:
    """The size by which the table chooses for a call, in powers of two; 0 where the table has nothing to say, and in
    graphs that are compiled, whose sizes may be symbols."""
    if needs_grad or not x.is_cuda or torch.compiler.is_compiling() or (op, x.dtype) not in table():
        return 0
    return int(x.numel()).bit_length()


def order(op: str, dtype: torch.dtype, size: int, backends: tuple[str, ...]) -> tuple[str, ...]:
    """``backends``, fastest first in the row of the nearest size; those that the row does not have come last."""
    row = min(table()[op, dtype], key=lambda row: abs(row["elements"].bit_length() - size))
    return tuple(sorted(backends, key=lambda backend: row["ms"].get(backend, float("inf"))))
