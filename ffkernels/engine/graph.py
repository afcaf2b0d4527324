"""What a network computes, block by block, for any input size: folded, packed, not yet planned."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from ..batch_norm import BatchNorm
from ..params import ConvParams
from .memory import aligned

ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3}
KINDS = (
    "stem",
    "separable",
    "conv",
    "fuse",
    "gate",
    "maps",
    "apply",
    "load_planar",
    "conv_planar",
    "head",
    "deform",
    "reuse",
    "blend",
    "mix",
    "stem bf16",
    "separable bf16",
    "conv bf16",
    "fuse bf16",
    "maps bf16",
    "apply bf16",
    "head bf16",
    "mix bf16",
    "to_float",
    "to_bf16",
)
"""``ff::engine::Kind`` of csrc/cpu/engine.h; a :class:`Node` has the name without ``bf16``."""


@dataclass(eq=False)
class Node:
    """One block: the rows of one map from those of others.

    Attributes:
        kind: one of :data:`KINDS`.
        name: of the module it comes from, for the printed plan.
        inputs: up to three maps that it reads.
        channels: of its output.
        stride, kernel: of the window it reads of its inputs.
        groups: of the convolution that it is.
        planar: its rows are planes of channels rather than pixels of channels.
        fields: constants of its row in the plan.
        pool: whether somebody needs the sum and maximum of its output over the pixels.
        gate: the attention applied to its first input as it is read.
        scalar: the gate node whose vector it multiplies by.
        into: the map that its output is a part of, from ``first`` on.
        macs: multiply-adds per output pixel.
        low: a bfloat16 kernel computes it, from bfloat16 maps.
        cs: numbers per pixel of its output if that is bfloat16, else 0.
        joins: its readers join its step, even if there are several.
    """

    kind: str
    name: str
    inputs: list[Node]
    channels: int
    stride: int = 1
    kernel: int = 1
    groups: int = 1
    planar: bool = False
    fields: dict[str, int] = field(default_factory=dict)
    pool: bool = False
    gate: Gate | None = None
    scalar: Node | None = None
    into: Node | None = None
    first: int = 0
    macs: int = 0
    low: bool = False
    cs: int = 0
    joins: bool = False

    @property
    def kernel_kind(self) -> int:
        """Its index in :data:`KINDS`."""
        return KINDS.index(f"{self.kind} bf16" if self.low else self.kind)


@dataclass(eq=False)
class Gate:
    """The attention of one map: its channel gate and the maps behind its spatial gate."""

    channel: Node
    maps: Node
    groups: int
    spatial: int


@dataclass(frozen=True)
class Value:
    """A map as ``ff_plan`` sees it: who makes it, and what its reader has yet to do.

    Attributes:
        node: who makes it.
        order: position in memory of each channel, where a shuffle is pending.
        gate: attention that is pending, with the map that is added after it and whether a ReLU follows.
    """

    node: Node
    order: tuple[int, ...] | None = None
    gate: Gate | None = None
    mode: int = 0
    residual: Node | None = None

    @property
    def channels(self) -> int:
        return self.node.channels


class Weights:
    """One array of float32 for all constants; tables of integers and bfloat16 (uint16) are stored by their bits."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, values: np.ndarray | Tensor) -> int:
        """Append values, from a multiple of 64 bytes on. Returns their offset."""
        if isinstance(values, Tensor):
            values = values.detach().cpu().double().numpy()
        if values.dtype == np.uint16:
            flat = np.ascontiguousarray(values).reshape(-1).view(np.float32)
        elif values.dtype.kind in "iu":
            flat = np.ascontiguousarray(values, dtype=np.int32).reshape(-1).view(np.float32)
        else:
            flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        offset = self.size
        pad = -flat.size % 16
        self.parts.append(np.concatenate([flat, np.zeros(pad, np.float32)]) if pad else flat)
        self.size += flat.size + pad
        return offset

    def array(self) -> np.ndarray:
        """All constants, 64-byte aligned."""
        out = aligned(self.size)
        np.concatenate(self.parts, out=out)
        return out


class Folded:
    """A convolution with its batch normalisation folded in, float64: y = weight * x + bias."""

    def __init__(self, conv: nn.Conv2d | ConvParams, bn: nn.BatchNorm2d | BatchNorm | None) -> None:
        if isinstance(conv, nn.Conv2d):
            conv = ConvParams.of(conv)
        weight = conv.weight.detach().double().cpu().numpy()
        bias = np.zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double().cpu().numpy()
        if bn is not None:
            scale, shift = affine(bn)
            weight = weight * scale[:, None, None, None]
            bias = bias * scale + shift
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weight.shape[2], self.weight.shape[3]

    def dense(self) -> np.ndarray:
        """The weights of all groups in one (O, C, kh, kw) array, zero between groups."""
        if self.groups == 1:
            return self.weight
        out, per_group = self.weight.shape[:2]
        dense = np.zeros((out, per_group * self.groups, *self.kernel))
        rows = out // self.groups
        for g in range(self.groups):
            dense[g * rows : (g + 1) * rows, g * per_group : (g + 1) * per_group] = self.weight[
                g * rows : (g + 1) * rows
            ]
        return dense


def affine(bn: nn.BatchNorm2d | BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of a batch normalisation with its running statistics."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("an engine needs running statistics, and a batch normalisation of the model keeps none")
    mean, var = (t.detach().double().cpu().numpy() for t in (bn.running_mean, bn.running_var))
    scale = 1 / np.sqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double().cpu().numpy()
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias.detach().double().cpu().numpy()
    return scale, shift


def pack_panels(weight: np.ndarray, bias: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(O, C, taps) -> panels of two vectors of output channels, each (taps, C, 2 lanes), and the number of vectors."""
    out, channels, taps = weight.shape
    vectors = -(-out // lanes)
    padded = np.zeros((taps, channels, vectors * lanes))
    padded[:, :, :out] = weight.transpose(2, 1, 0)
    panels = [padded[:, :, v * lanes : min(v + 2, vectors) * lanes].reshape(-1) for v in range(0, vectors, 2)]
    padded_bias = np.zeros(vectors * lanes)
    padded_bias[:out] = bias
    return np.concatenate(panels), padded_bias, vectors


def permuted(weight: np.ndarray, order: tuple[int, ...] | None) -> np.ndarray:
    """(O, C, ...) with input channels in the order of memory."""
    if order is None:
        return weight
    result = np.empty_like(weight)
    result[:, list(order)] = weight
    return result


def bits(value: float) -> int:
    """A double as the int64 that a plan stores."""
    return int(np.float64(value).view(np.int64))


def eval_norm(bn: nn.BatchNorm2d, running_mean: Tensor, running_var: Tensor) -> BatchNorm:
    """``bn`` with statistics of one use, as an engine folds it; nothing is counted."""
    return BatchNorm(bn.weight, bn.bias, running_mean, running_var, False, 0.0, bn.eps)
