"""The builder of engines that compute in bfloat16, with float32 sums: maps and weights of convolutions are bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..params import ChannelMLP, ConvParams
from .builder import Builder, Conv, Norm, activation_fields, shuffle_order
from .graph import Folded, Gate, Node, Value

DEPTH, CHANNELS = 32, 16
"""``kTileDepth`` and ``kTileChannels`` of csrc/cpu/engine_bf16.h."""
TILES, DOTS = 1, 2
"""How bfloat16 is multiplied, as ``ff_cpu_engine_bf16`` says; tiles where it says 0, too."""
QUADS, TWINS, DOUBLED = 1, 2, 3
"""``Grouping`` of csrc/cpu/engine_bf16.h."""
MAX_STEPS = 72
"""``kMaxSteps`` of csrc/cpu/engine_bf16.h."""
BF16_KINDS = ("separable", "conv", "fuse", "apply", "mix")


class Bf16Builder(Builder):
    """What differs from float32:

    - dense convolutions are cheap, and grouped ones are made dense: context blocks are convolutions of NHWC maps, and,
      where tiles are multiplied, a BiFPN node's depthwise and 1x1 convolutions, which have nothing between them, are
      one 3x3 convolution;
    - deformable convolutions and the mixing of levels stay float32, with conversions around them.
    """

    def __init__(self, lanes: int, products: int = TILES) -> None:
        super().__init__(lanes)
        self.dots = products == DOTS
        self.step = 2 if self.dots else DEPTH
        """Runs of numbers are padded to a multiple of this."""

    def _tiled(self, weight: np.ndarray, channels: int) -> np.ndarray:
        """(O, N), N a multiple of ``step`` -> ``TileLayer::weights`` for that many output channels."""
        weight = padded(weight, channels)
        return panels(weight.reshape(channels // CHANNELS, CHANNELS, -1, self.step // 2, 2))

    def _add(self, node: Node) -> Value:
        if node.kind in BF16_KINDS:
            node.low, node.planar, node.cs = True, False, numbers(node.channels)
            if node.kind in ("fuse", "apply", "mix") and node.cs % DEPTH:
                raise ValueError(f"an engine of bfloat16 takes no {node.kind} of fewer than 17 channels ({node.name})")
        return super()._add(node)

    def _low(self, x: Value) -> Value:
        """x as a bfloat16 map."""
        if x.node.cs or x.node.kind in ("image", "parts"):
            return x
        node = Node("to_bf16", f"{x.node.name} to bfloat16", [x.node], x.channels, cs=numbers(x.channels))
        return replace(self._add(node), order=x.order)

    def _whole(self, x: Value) -> Value:
        """The map of x's parts, side by side."""
        if x.node.kind != "parts":
            return x
        whole = Node("concat", x.node.name, x.node.inputs, x.channels, cs=numbers(x.channels))
        first = 0
        part_of_step = list(whole.inputs)
        while part_of_step:
            node = part_of_step.pop()
            node.joins = False
            part_of_step += [source for source in node.inputs if source.joins]
        for part in whole.inputs:
            self._into(part, whole, first)
            first += part.channels
        return replace(super()._add(whole), order=x.order)

    def _into(self, part: Node, whole: Node, first: int) -> None:
        part.into, part.first = whole, first
        part.fields |= {"p1": first, "p2": last_panel(part.channels), "p5": int(not whole.cs)}

    def _stored_map(self, x: Value) -> Value:
        return self._whole(self._low(self._plain(x)))

    def _float(self, x: Value) -> Value:
        """x as a float32 map."""
        x = self._whole(self._plain(x))
        if not x.node.cs:
            return x
        node = Node("to_float", f"{x.node.name} to float32", [x.node], x.channels)
        return replace(self._add(node), order=x.order)

    def packs(self, node: Node, stride: int) -> bool:
        return False

    def _pairs(self, channels: int, groups: np.ndarray) -> bool:
        return self.dots and super()._pairs(channels, groups)

    def _grouped(self, weight: np.ndarray, groups: np.ndarray) -> int:
        """The weights that csrc/cpu/engine_bf16.h describes at ``multiply_permuted``."""
        size = weight.shape[1] // (groups.max() + 1)
        place = np.argsort(depthwise_halves(weight.shape[1], 1).reshape(-1))
        first = groups * size + np.arange(0, size, 2)[:, None]  # of each pair of each output
        offset = self.weights.add(place[first[:, :CHANNELS]] // 2)
        weight = diffused(weight)
        pairs = [np.take_along_axis(weight.T, first + i, axis=0) for i in range(2)]
        self.weights.add(rounded(np.stack(pairs, axis=-1)))
        return offset

    def _stem(self, x: Value, conv: Conv, folded: Folded, activation: str, negative_slope: float) -> Value:
        out = folded.out_channels
        cs = numbers(out)
        joined = max(1, CHANNELS // cs)
        # One run per row of the kernel: the columns that `joined` pixels read, three numbers each.
        weight = np.zeros((joined, cs, 3, DEPTH // 2))
        for j in range(joined):
            weight[j, :out, :, 6 * j : 6 * j + 9] = folded.weight.transpose(0, 2, 3, 1).reshape(out, 3, 9)
        tiles = joined * cs // CHANNELS
        if not self.dots:  # a run of 16 numbers fills half of a tile's rows
            weight = np.concatenate([weight, np.zeros_like(weight)], axis=3)
        node = Node("stem", self._name(conv, "stem"), [], out, 2, 3, macs=27 * out, low=True, cs=cs)
        node.fields = activation_fields(activation, negative_slope) | {
            "w0": self.weights.add(np.array(self.image_mean)),
            "w1": self.weights.add(self._tiled(weight.reshape(tiles * CHANNELS, -1), tiles * CHANNELS)),
            "w2": self.weights.add(np.tile(padded(folded.bias, cs), joined)),
            "p2": last_panel(joined * cs),
            "p3": tiles,
            "p4": joined,
        }
        return self._add(node)

    def conv(
        self, x: Value, conv: Conv, bn: Norm = None, activation: str = "none", negative_slope: float = 0.1
    ) -> Value:
        return super().conv(self._low(x), conv, bn, activation, negative_slope)

    def _check_channels(self, *nodes: Node) -> None:
        super()._check_channels(*nodes)
        for node in nodes:
            if node.kind == "conv":
                sources = node.inputs if node.gate is None else node.inputs[:1]
                steps = sum(node.kernel * -(-node.kernel * source.cs // DEPTH) for source in sources)
                if steps > MAX_STEPS:
                    channels = sum(source.channels for source in sources)
                    raise ValueError(f"an engine of bfloat16 joins fewer than the {channels} channels of {node.name}")

    def _depthwise(self, node: Node, taps: np.ndarray, bias: np.ndarray) -> None:
        cs = node.inputs[0].cs
        taps, bias = padded(taps, cs), padded(bias, cs)
        if self.dots:
            node.fields["w0"] = self.weights.add(self._depthwise_pairs(node, taps, bias))
            return
        if cs % DEPTH == 0:
            lines = np.concatenate([taps, bias[:, None]], axis=1).reshape(-1, self.lanes, 2, 10)
            node.fields["w0"] = self.weights.add(lines.transpose(0, 2, 3, 1))
            return
        # `joined` pixels are 16 outputs of a dense convolution.
        taps = diffused(taps)
        joined = CHANNELS // cs
        columns = (joined - 1) * node.stride + 3
        runs = np.zeros((CHANNELS, 3, -(-columns * cs // DEPTH) * DEPTH))
        for j in range(joined):
            for c in range(cs):
                at = j * node.stride * cs + c
                runs[j * cs + c, :, at : at + 3 * cs : cs] = taps[c].reshape(3, 3)
        node.fields |= {
            "w0": self.weights.add(self._tiled(runs.reshape(CHANNELS, -1), CHANNELS)),
            "p3": self.weights.add(np.tile(bias, joined)),
            "p4": joined,
        }

    def _depthwise_pairs(self, node: Node, taps: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """The weights that csrc/cpu/engine_bf16.h describes at ``Depthwise``."""
        rows = np.pad(diffused(taps).reshape(-1, 3, 3), ((0, 0), (1, 1), (0, 0)))
        pairs = np.stack([rows[:, [i, j]] for i, j in ((1, 2), (3, 4), (0, 1), (2, 3))], axis=1)  # (C, 4, 2, 3)
        halves = depthwise_halves(node.inputs[0].cs, node.stride)
        weights = rounded(pairs[halves]).transpose(0, 2, 4, 1, 3).reshape(len(halves), -1)
        return np.concatenate([weights, bias[halves].astype(np.float32).view(np.uint16)], axis=1)

    def _stored(self, node: Node, weight: np.ndarray, bias: np.ndarray) -> None:
        if node.kind == "deform":
            super()._stored(node, weight, bias)
            return
        cs = numbers(node.channels)
        weight = diffused(weight)
        if node.kind == "separable":
            runs, bias, cs = self._pointwise(node, weight[:, :, 0], bias, cs)
        else:
            if node.inputs[0].kind == "parts":
                node.inputs = node.inputs[0].inputs
            if (grouping := self._grouping(node)) is not None:
                self._stored_groups(node, grouping, weight.reshape(*weight.shape[:2], 9), bias)
                return
            runs = self._runs(node, weight)
        tiles = -(-cs // CHANNELS)
        node.fields |= {
            "w1": self.weights.add(self._tiled(runs, tiles * CHANNELS)),
            "w2": self.weights.add(padded(bias, tiles * CHANNELS)),
            "w3": self._zeros,
            "p0": tiles,
            "p1": 0,
            "p2": last_panel(cs),
            "p5": 0,
        }

    def _grouping(self, node: Node) -> int | None:
        """``Grouping`` of csrc/cpu/engine_bf16.h, if the convolution has one."""
        source = node.inputs[0]
        if not self.dots or (node.groups, node.kernel, node.stride) != (4, 3, 1) or node.gate is not None:
            return None
        kinds = {(32, 32, 16): QUADS, (32, 32, 8): TWINS, (8, 16, 8): DOUBLED}
        return kinds.get((source.channels, source.cs, node.channels))

    def _stored_groups(self, node: Node, grouping: int, weight: np.ndarray, bias: np.ndarray) -> None:
        """The weights that csrc/cpu/engine_bf16.h describes at ``Grouped``."""
        lane = np.arange(CHANNELS)
        out = {QUADS: lane, TWINS: lane // 4 * 2 + lane % 2, DOUBLED: lane % 8}[grouping]
        per_group = node.inputs[0].channels // 4
        first = out // (node.channels // 4) * per_group
        source = first[:, None] + np.arange(per_group)
        packed = weight[out[:, None], source].reshape(CHANNELS, -1, 2, 9).transpose(3, 1, 0, 2)
        node.fields |= {
            "w1": self.weights.add(rounded(packed)),
            "w2": self.weights.add(bias[out]),
            "w3": self._zeros,
            "p1": 0,
            "p3": 0,
            "p4": grouping,
            "p5": 0,
        }

    def _pointwise(
        self, node: Node, weight: np.ndarray, bias: np.ndarray, cs: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The 1x1 half of a separable block: inputs in the order in which the depthwise half leaves them."""
        source = node.inputs[0].cs
        weight = padded(weight.T, source).T
        if self.dots:
            packed = source == 8 and node.stride == 1
            order = np.arange(source) if packed else depthwise_halves(source, node.stride).reshape(-1)
            return weight[:, order], bias, cs
        if source % DEPTH == 0:
            order = np.arange(source).reshape(-1, self.lanes, 2).transpose(0, 2, 1).reshape(-1)
            return weight[:, order], bias, cs
        joined = CHANNELS // source
        runs = np.zeros((joined, cs, DEPTH))
        for j in range(joined):
            runs[j, : len(weight), j * source : (j + 1) * source] = weight
        return runs.reshape(-1, DEPTH), np.tile(padded(bias, cs), joined), joined * cs

    def _runs(self, node: Node, weight: np.ndarray) -> np.ndarray:
        """(O, C, k * k) -> (O, N): for every input and row of the kernel the numbers of its pixels, to a multiple of
        ``step``."""
        k, first, runs = node.kernel, 0, []
        sources = node.inputs if node.gate is None else node.inputs[:1]
        for source in sources:
            part = np.zeros((len(weight), k, k, source.cs))
            part[..., : source.channels] = (
                weight[:, first : first + source.channels].reshape(len(weight), -1, k, k).transpose(0, 2, 3, 1)
            )
            part = part.reshape(len(weight), k, -1)
            short = -part.shape[2] % self.step
            runs.append(np.pad(part, ((0, 0), (0, 0), (0, short))).reshape(len(weight), -1))
            first += source.channels
        return np.concatenate(runs, axis=1)

    def _gate(self, node: Node, mlp: ChannelMLP, spatial: Conv, bn: Norm, order: str) -> Gate:
        if node.cs % DEPTH:
            raise ValueError(f"an engine of bfloat16 takes no attention on fewer than 17 channels ({node.name})")
        gate = super()._gate(node, mlp, spatial, bn, order)
        gate.maps.low = True
        return gate

    def _spatial(self, folded: Folded) -> int:
        """For each group and row of the kernel the Toeplitz matrix that takes 32 inputs to 16 outputs; the bias. For
        dot products the 49 pairs of weights of mean and maximum; the bias."""
        if self.dots:
            pairs = rounded(folded.weight.transpose(0, 2, 3, 1)).reshape(folded.groups, -1)
            bias = folded.bias.astype(np.float32)[:, None].view(np.uint16)
            return self.weights.add(np.concatenate([pairs, bias], axis=1))
        matrices = np.zeros((folded.groups, 14, CHANNELS, DEPTH))
        for out in range(CHANNELS):
            matrices[:, :, out, out : out + 7] = folded.weight.reshape(folded.groups, 14, 7)
        offsets = []
        for group, bias in zip(matrices, folded.bias):
            runs = group.transpose(1, 0, 2).reshape(CHANNELS, -1)
            offsets.append(self.weights.add(self._tiled(runs, CHANNELS)))
            self.weights.add(np.full(CHANNELS, bias))
        return offsets[0]

    def _separable_folded(self, x: Value, depthwise: Conv, second: Folded, shuffle_groups: int) -> Value:
        if self.dots:
            return super()._separable_folded(x, depthwise, second, shuffle_groups)
        first, order = Folded(depthwise, None), shuffle_order(second.out_channels, shuffle_groups)
        dense = second.dense()[order, :, 0, 0]
        weight = dense[:, :, None, None] * first.weight[:, 0]
        bias = second.bias[order] + dense @ first.bias
        merged = ConvParams(torch.from_numpy(weight), torch.from_numpy(bias), 1, 1, 1)
        value = self.conv(x, merged)
        value.node.name = self._name(depthwise, "bifpn")
        value.node.macs = first.weight.size + second.weight.size
        return value

    def ssh_grouped(
        self, x: Value, convs: Sequence[Conv], bns: Sequence[Norm], shuffle_groups: int = 1
    ) -> tuple[Value, Value]:
        if x.order is not None:
            raise ValueError("an engine takes no context of a shuffled map")
        pending = x.gate is not None
        x = self._stored_map(x)
        x.node.joins = pending
        shapes = [(c.groups, c.weight.shape[0]) for c in convs]
        doubles = self.dots and x.channels == 32 and shapes == [(4, 16), *[(4, 8)] * 4]

        def conv(source: Value, index: int, inner: bool = False) -> Value:
            value = self.conv(source, convs[index], bns[index], "relu")
            value.node.joins = True
            if inner and doubles:
                value.node.cs = 16
                value.node.fields["p3"] = 1
            return value

        shared = conv(x, 1, inner=True)
        parts = [conv(x, 0).node, conv(shared, 2).node, conv(conv(shared, 3, inner=True), 4).node]
        channels = sum(part.channels for part in parts)
        whole = Node("parts", parts[0].name, parts, channels)
        order = tuple(shuffle_order(channels, shuffle_groups).tolist()) if shuffle_groups > 1 else None
        return Value(whole, order), x

    def gate_mix(self, x: Value, context: Value, weight: Tensor, bias: Tensor, like: Value) -> Value:
        return super().gate_mix(x, self._whole(context), weight, bias, like)

    def progressive(self, x: Value, groups: int = 4, steps: int = 3) -> Value:
        return super().progressive(self._whole(x), groups, steps)

    def add_chunk_mean(self, x: Value, raw: Value, scale: float) -> Value:
        return super().add_chunk_mean(self._float(x), self._float(raw), scale)

    def add_resized(self, x: Value, others: Sequence[tuple[Value, float]]) -> Value:
        return super().add_resized(self._float(x), [(self._float(other), scale) for other, scale in others])

    def deform_conv2d(self, x: Value, fields: Value, *layers: Any, **options: Any) -> Value:
        node = fields.node
        if node.cs:
            stored = -(-node.channels // self.lanes) * self.lanes
            node.cs = 0
            node.fields |= {"p0": -(-stored // CHANNELS), "p2": last_panel(stored), "p5": 1}
        return super().deform_conv2d(self._float(x), fields, *layers, **options)

    def concat(self, values: Sequence[Value], activation: str = "none") -> Value:
        whole = super().concat(values, activation)
        for value in values:
            if value.node.low:
                value.node.cs = 0
                self._into(value.node, whole.node, value.node.first)
        return whole

    def multi_head(self, features: Sequence[Value], heads: Sequence[Any]) -> None:
        whole = [x if head.trunk is not None else self._whole(x) for x, head in zip(features, heads)]
        super().multi_head(whole, heads)

    def _predictors(self, node: Node, weight: np.ndarray, bias: np.ndarray) -> dict[str, int]:
        if not node.inputs[0].cs:
            return super()._predictors(node, weight, bias)
        node.low = True
        weight = padded(weight.T, -(-node.inputs[0].cs // self.step) * self.step).T
        return {"w0": self.weights.add(self._tiled(weight, len(weight))), "w1": self.weights.add(bias)}


def numbers(channels: int) -> int:
    """Numbers per pixel of a bfloat16 map: 8, 16 or a multiple of 32."""
    return next((n for n in (8, 16) if channels <= n), -(-channels // DEPTH) * DEPTH)


def last_panel(channels: int) -> int:
    """Channels of the last panel of 32."""
    return channels - (-(-channels // (2 * CHANNELS)) - 1) * 2 * CHANNELS


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """Zeros appended along the first axis."""
    return np.pad(values, [(0, size - len(values)), *[(0, 0)] * (values.ndim - 1)])


def depthwise_halves(cs: int, stride: int) -> np.ndarray:
    """(halves, lanes): the channels of the halves of all blocks of ``Depthwise``."""
    if cs == 8 and stride == 1:
        return np.stack([np.tile(np.arange(4), 4), np.tile(np.arange(4, 8), 4)])
    size = min(cs, 32)
    return np.arange(cs).reshape(-1, size // 8, 2, 4).transpose(0, 2, 1, 3).reshape(-1, size // 2)


def panels(weight: np.ndarray) -> np.ndarray:
    """(tiles, 16, steps, rows, 2) -> panels of up to two tiles, each (steps, tiles, rows, 16, 2), as bfloat16."""
    parts = [weight[i : i + 2].transpose(2, 0, 3, 1, 4).reshape(-1) for i in range(0, len(weight), 2)]
    return rounded(np.concatenate(parts))


def diffused(weight: np.ndarray) -> np.ndarray:
    """(O, ...) as bfloat16 numbers, each row's error carried from weight to weight: its sum stays, and with it what the
    row makes of the part that its inputs have in common."""
    rows = weight.reshape(len(weight), -1)
    kept, carry = np.empty_like(rows), np.zeros(len(rows))
    for i, column in enumerate(rows.T):
        wanted = column + carry
        kept[:, i] = (rounded(wanted).astype(np.uint32) << 16).view(np.float32)
        carry = wanted - kept[:, i]
    return kept.reshape(weight.shape)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    word = values.astype(np.float32).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
