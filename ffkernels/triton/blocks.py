"""Block sizes of the Triton kernels, by kind of kernel, shape, size of an element and compute capability.

``blocks.json`` holds what ``scripts/tune_triton.py`` measured on GPUs: :func:`block` takes the block of the same kind,
columns, depth and size of an element on the same compute capability. Without such a row, :data:`DEFAULTS` decides.
Nothing is tuned at run time: the same input gives the same bits.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("blocks.json")


class Block(NamedTuple):
    """Rows are pixels; those of a weight gradient are output channels, and its depth is pixels.

    ``columns`` and ``depth`` are upper limits: small layers take the power of two that holds them.
    """

    rows: int
    columns: int
    depth: int = 16
    warps: int = 4
    stages: int = 2


class Key(NamedTuple):
    """What a measured block is found by: a tile of ``columns`` columns and a sum of ``depth`` terms."""

    capability: int
    kind: str
    element_size: int
    columns: int
    depth: int


DEFAULTS: dict[str, list[tuple[int, int, Block]]] = {
    "conv": [(0, 4, Block(64, 32, 32)), (80, 4, Block(32, 32, 16)), (80, 2, Block(128, 32, 32, stages=3))],
    "weight_gradient": [
        (0, 4, Block(16, 64, 64)),
        (80, 4, Block(32, 64, 16, stages=3)),
        (80, 2, Block(32, 64, 64, stages=3)),
    ],
    "separable": [
        (0, 4, Block(64, 64, 32, stages=1)),
        (80, 4, Block(32, 128, 16, warps=8, stages=1)),
        (80, 2, Block(32, 128, 32, warps=8, stages=1)),
    ],
    "deform": [
        (0, 4, Block(32, 32, 32, stages=1)),
        (80, 4, Block(32, 32, 16, stages=1)),
        (80, 2, Block(32, 32, 32, stages=1)),
    ],
    "depthwise": [(0, 4, Block(64, 16)), (100, 2, Block(32, 16))],
    "elementwise": [(0, 4, Block(64, 32))],
    "pooling": [(0, 4, Block(32, 32))],
    "reduction": [(0, 4, Block(128, 16))],
}
"""(from this capability on, up to this size of an element, block): the last entry that fits counts.

float32 products keep whole rows and columns of a block in registers: blocks are as small as it takes not to spill."""

SPLIT = 1024
"""Pixels that one program of a weight gradient sums; the sums of the programs are added by another kernel."""

MOST_SPLITS = 65535
"""Of CUDA's grids, along their last axis."""


def splits_of(rows: int) -> tuple[int, int]:
    """Programs of a weight gradient over ``rows`` pixels, and pixels of each: a multiple of :data:`SPLIT`."""
    each = SPLIT * max(1, -(-rows // (SPLIT * MOST_SPLITS)))
    return -(-rows // each), each


@functools.cache
def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 0 of the CPU, on which the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``n`` and at least ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def parse(table: Any) -> dict[Key, Block]:
    """The measured blocks of a table; ValueError names what is wrong with it."""
    found: dict[Key, Block] = {}
    where = "'devices'"
    try:
        for i, device in enumerate(table["devices"]):
            where = f"devices[{i}]"
            since = device["capability"]
            for j, row in enumerate(device["rows"]):
                where = f"devices[{i}].rows[{j}]"
                key = Key(since, row["kind"], row["element_size"], row["columns"], row["depth"])
                chosen = Block(**row["block"])
                numbers = (since, *key[2:], *chosen)
                if key.kind not in DEFAULTS:
                    raise ValueError(f"unknown kind {key.kind!r}, not one of {', '.join(DEFAULTS)}")
                if not all(type(n) is int and n > 0 for n in numbers):
                    raise ValueError(f"a number is not a positive integer: {row}")
                if any(n & (n - 1) for n in chosen[:4]) or min(chosen[:3]) < 16:
                    raise ValueError(f"rows, columns and depth from 16, and warps, are powers of two: {row['block']}")
                if key in found:
                    raise ValueError("the same capability, kind, element_size, columns and depth twice")
                found[key] = chosen
    except KeyError as error:
        raise ValueError(f"{where}: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    return found


@functools.cache
def measured() -> dict[Key, Block]:
    """The committed table."""
    try:
        return parse(json.loads(TABLE.read_text()))
    except ValueError as error:
        raise ValueError(f"{TABLE}: {error}. Write the table again: scripts/tune_triton.py --fresh") from None


def default(kind: str, element_size: int, capability: int) -> Block:
    return [b for since, size, b in DEFAULTS[kind] if since <= capability and element_size <= size][-1]


def block(kind: str, like: Tensor, columns: int, depth: int = 16) -> Block:
    """The block for a tile of ``columns`` columns and a sum of ``depth`` terms of tensors like this one."""
    key = Key(capability(like.device), kind, like.element_size(), columns, depth)
    chosen = measured().get(key) or default(kind, key.element_size, key.capability)
    return chosen._replace(
        columns=min(chosen.columns, power_of_two(columns)), depth=min(chosen.depth, power_of_two(depth))
    )
