"""Block sizes of the Triton kernels, by kind of kernel, shape and compute capability.

``BLOCKS[kind]`` lists (from this capability on, block): the last entry that the device reaches counts, the first is
the default. No entry comes from a measurement yet. Nothing is tuned at run time: the same input gives the same bits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """Rows are pixels; those of a weight gradient are output channels, and its depth is pixels.

    ``columns`` and ``depth`` are upper limits: small layers take the power of two that holds them.
    """

    rows: int
    columns: int
    depth: int = 16
    warps: int = 4
    stages: int = 2


BLOCKS: dict[str, list[tuple[int, Block]]] = {
    "conv": [(0, Block(64, 32, 32)), (80, Block(128, 32, 32, stages=3))],
    "weight_gradient": [(0, Block(16, 64, 64)), (80, Block(32, 64, 64, stages=3))],
    "deform": [(0, Block(32, 32, 32, stages=1))],
    "depthwise": [(0, Block(64, 16))],
    "elementwise": [(0, Block(64, 32))],
    "pooling": [(0, Block(32, 32))],
    "reduction": [(0, Block(128, 16))],
}

SPLIT = 1024
"""Most pixels that one program of a weight gradient sums; the sums of the programs are added by another kernel."""


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


def block(kind: str, device: torch.device, columns: int, depth: int = 16, least: int = 16) -> Block:
    """The block for a tile of ``columns`` columns and a sum of ``depth`` terms."""
    chosen = [b for since, b in BLOCKS[kind] if since <= capability(device)][-1]
    return chosen._replace(
        columns=min(chosen.columns, power_of_two(columns, least)), depth=min(chosen.depth, power_of_two(depth))
    )
