"""Native calls of an op, recorded once per shape and made together afterwards (csrc/program.h).

An op of many kernels would otherwise spend more time in Python than most of its kernels take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from .conv import LARGE, workspace

SCRATCH, WORKSPACE = 0, 1
ALIGNMENT = 64


class At(NamedTuple):
    """A place in memory: bytes behind one of the bases that every run of a plan brings along."""

    base: int
    offset: int = 0

    def plus(self, size: int) -> At:
        return At(self.base, self.offset + size)


class Map(NamedTuple):
    """An NHWC map, or a slice of the channels of one: neighbouring pixels lie ``pixel`` elements apart."""

    at: At
    shape: tuple[int, int, int, int]
    pixel: int

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3]


class Plan:
    """Calls in the order they are to be made. Base 0 is scratch memory, 1 the workspace that calls share."""

    def __init__(self, dtype: torch.dtype) -> None:
        native, _ = module()
        self.native = native
        self.program = native.Program()
        self.dtype, self.itemsize = DTYPES[dtype], dtype.itemsize
        self.threads = torch.get_num_threads()
        self._bases = 2
        self._scratch = self._workspace = 0

    def base(self) -> At:
        self._bases += 1
        return At(self._bases - 1)

    def scratch(self, size: int) -> At:
        """``size`` bytes that last for one run, readable a little beyond."""
        at = At(SCRATCH, self._scratch)
        self._scratch += aligned(size + 2 * ALIGNMENT)
        return at

    def scratch_map(self, shape: Sequence[int]) -> Map:
        return Map(self.scratch(math.prod(shape) * self.itemsize), tuple(shape), shape[1])

    def channels(self, x: Map, first: int, count: int) -> Map:
        """A slice of the channels of a map."""
        batch, _, height, width = x.shape
        return Map(x.at.plus(first * self.itemsize), (batch, count, height, width), x.pixel)

    def workspace(self, size: int) -> At:
        """``size`` bytes for the next call alone."""
        self._workspace = max(self._workspace, size)
        return At(WORKSPACE)

    def call(self, entry: str, *arguments: At | float | None) -> None:
        """Record ``entry(*arguments, dtype, threads)``."""
        self.program.add(entry, *arguments, self.dtype, self.threads)

    def call_single(self, entry: str, *arguments: At | float | None) -> None:
        """Record ``entry(*arguments, dtype)``, which runs on one thread."""
        self.program.add(entry, *arguments, self.dtype)

    def copy(
        self,
        source: At,
        rows: int,
        length: int,
        target: At,
        source_row: int = 0,
        target_row: int = 0,
        itemsize: int | None = None,
    ) -> None:
        """Record a copy of rows of ``length`` elements; rows are ``*_row`` elements apart."""
        n = itemsize or self.itemsize
        self.program.add("ff_cpu_copy_rows", source, source_row * n, rows, length * n, target, target_row * n)

    def run(self, op: str, pointers: list[int]) -> None:
        """Make the calls; ``pointers`` are the bases in the order they were taken, zero where there is no tensor."""
        if len(pointers) + 2 != self._bases:
            raise RuntimeError(f"ffkernels.{op}: the plan has {self._bases - 2} tensors, got {len(pointers)}")
        size = self._scratch + self._workspace
        memory = workspace(size) if size < 4 * LARGE else buffer(-(-size // 8), torch.float64)
        start = memory.data_ptr()
        check(self.program.run([start, start + self._scratch, *pointers]), op)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def buffer(count: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor; a large one lies in a kept buffer (csrc/buffers.h)."""
    if count < LARGE:
        return torch.empty(count, dtype=dtype, device="cpu")
    native, _ = module()
    return torch.from_dlpack(native.buffer_nhwc(count, 1, 1, 1, dtype.itemsize)).view(count)


class Layout:
    """Tensors side by side in one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shapes: list[tuple[int, ...]] = []
        self.offsets: list[int] = []
        self.size = 0

    def add(self, *shape: int) -> None:
        self.shapes.append(shape)
        self.offsets.append(self.size)
        self.size += aligned(math.prod(shape) * self.dtype.itemsize)

    def pointers(self, memory: Tensor) -> list[int]:
        start = memory.data_ptr()
        return [start + offset for offset in self.offsets]

    def empty(self) -> Tensor:
        return buffer(self.size // self.dtype.itemsize + 2 * ALIGNMENT // self.dtype.itemsize, self.dtype)


_plans: dict[tuple, Any] = {}
MOST_PLANS = 1024
"""Plans kept, for as many sizes of images and settings of ops."""


def cached(build: Callable[..., Any], *key: Any) -> Any:
    """``build(*key)``, once for equal arguments and number of threads."""
    entry = (build, torch.get_num_threads(), *key)
    plan = _plans.get(entry)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[entry] = build(*key)
    return plan


def clear() -> None:
    """Forget all plans: sizes of workspaces depend on the instruction set."""
    _plans.clear()
