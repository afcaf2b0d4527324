"""How modules describe themselves to an engine: ``ff_plan(builder, *inputs)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..batch_norm import BatchNorm
from ..params import ChannelMLP, ConvParams, HeadParams
from .graph import ACTIVATIONS, Folded, Gate, Node, Value, Weights, affine, bits, pack_panels, permuted

Conv = nn.Conv2d | ConvParams
Norm = nn.BatchNorm2d | BatchNorm | None

MAX_CHANNELS = 256
"""``kTileStride`` of csrc/cpu/engine_gemm.h leaves room for these."""


class Builder:
    """Collects the blocks of one network. A module that can be part of an engine has::

        def ff_plan(self, builder, *inputs): ...

    which calls methods of the builder instead of ops, passes values on, and calls :meth:`module` for its children.
    Batch normalisations are folded with their running statistics, whatever mode the module is in.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.weights = Weights()
        self.nodes: list[Node] = []
        self.heads: list[Node] = []
        self.anchors_per_pixel = 0
        self.priors: tuple[Callable[[int, int], Tensor], tuple[float, float]] | None = None
        self.image_mean = (104.0, 117.0, 123.0)
        self._zeros = self.weights.add(np.zeros((2 * 14 + 4) * (MAX_CHANNELS + 16)))
        self._path: list[str] = []
        self._names: dict[nn.Module, str] = {}
        self._weight_names: dict[int, str] = {}

    def describe(self, model: nn.Module) -> None:
        """Collect the blocks of a whole network."""
        image = Node("image", "image", [], 3)
        self.module(model, Value(image))
        if not self.heads:
            raise ValueError("an engine's network ends in multi_head, and this one has none")
        for node in self.nodes:
            if node.pool and node.kind not in ("separable", "conv", "deform", "apply", "reuse", "blend", "to_bf16"):
                raise ValueError(f"an engine cannot pool the output of {node.name} ({node.kind})")
            if any(source.into not in (None, node) for source in node.inputs):
                raise ValueError(f"an engine concatenates what nothing else reads; {node.name} does")

    def packed(self) -> set[Node]:
        """Stem nodes whose reader, a depthwise convolution, puts two pixels in one vector."""
        readers = [(n, source) for n in self.nodes for source in n.inputs if source.kind == "stem"]
        found = {source for n, source in readers if n.kind == "separable" and self.packs(source, n.stride)}
        if found and len(readers) > 1:
            raise ValueError("an engine's first convolution feeds one block only")
        return found

    def module(self, module: nn.Module, *inputs: Any) -> Any:
        """The values of a module for these inputs."""
        if hasattr(module, "ff_plan"):
            return module.ff_plan(self, *inputs)
        if isinstance(module, nn.Sequential):
            for child in module:
                inputs = (self.module(child, *inputs),)
            return inputs[0]
        if isinstance(module, nn.Identity):
            return inputs[0]
        name = self._names.get(module, "")
        raise TypeError(
            f"an engine cannot plan {name or 'the model'} ({type(module).__name__}): "
            "it has no ff_plan(builder, *inputs), see docs/engine.md"
        )

    def label(self, owner: object) -> str:
        """Name of the module that owns these parameters."""
        return self._names.get(owner, "") if isinstance(owner, nn.Module) else ""

    def _add(self, node: Node) -> Value:
        self.nodes.append(node)
        return Value(node)

    def _name(self, conv: object, fallback: str) -> str:
        weight = conv.weight if isinstance(conv, (nn.Conv2d, ConvParams)) else None
        return self._weight_names.get(id(weight), fallback) if weight is not None else fallback

    def name_parameters(self, model: nn.Module) -> None:
        """Remember the names of modules and parameters, for messages and the printed plan."""
        self._names = {module: name for name, module in model.named_modules()}
        self._weight_names = {
            id(parameter): name.rsplit(".", 1)[0] for name, parameter in model.named_parameters(remove_duplicate=True)
        }

    def _stored(self, node: Node, weight: np.ndarray, bias: np.ndarray) -> None:
        """Packs a (O, C, taps) weight for ``store_panels``."""
        panels, padded, vectors = pack_panels(weight, bias, self.lanes)
        node.fields |= {
            "w1": self.weights.add(panels),
            "w2": self.weights.add(padded),
            "w3": self._zeros,
            "p0": vectors,
            "p1": 0,
            "p2": self.lanes,
        }

    def conv(
        self, x: Value, conv: Conv, bn: Norm = None, activation: str = "none", negative_slope: float = 0.1
    ) -> Value:
        """act(bn(conv(x))): 1x1 or 3x3, padding half the kernel, stride 1 or 2, any groups.

        On the image: 3x3, stride 2, three channels to a multiple of 8.
        """
        folded = Folded(conv, bn)
        size = folded.kernel
        if size not in ((1, 1), (3, 3)) or folded.padding != size[0] // 2 or folded.stride not in (1, 2):
            raise ValueError(
                f"an engine runs 1x1 and 3x3 convolutions of stride 1 or 2 that pad by half their kernel; "
                f"{self._name(conv, 'a convolution')} is {size[0]}x{size[1]}, stride {folded.stride}, "
                f"padding {folded.padding}"
            )
        if x.node.kind == "image":
            if (
                folded.weight.shape[1:] != (3, 3, 3)
                or folded.stride != 2
                or folded.groups != 1
                or len(folded.weight) % 8
            ):
                raise ValueError("an engine's first convolution is 3x3 of stride 2 from 3 to a multiple of 8 channels")
            return self._stem(x, conv, folded, activation, negative_slope)
        k = size[0]
        self._check_map(x)
        if (k, folded.stride) != (1, 1):
            x = self.materialised(x)
        node = Node("conv", self._name(conv, "conv"), [x.node], folded.out_channels, folded.stride, k)
        node.groups = folded.groups if x.order is None else 1
        node.fields = activation_fields(activation, negative_slope) | {"p3": folded.stride * k}
        self._attend(node, x)
        if node.gate is not None:
            node.fields["p3"] = 0
        weight = permuted(folded.dense(), x.order)
        self._stored(node, weight.reshape(*weight.shape[:2], -1), folded.bias)
        node.macs = weight[0].size * folded.out_channels // folded.groups
        self._check_channels(node)
        return self._add(node)

    def _attend(self, node: Node, x: Value) -> None:
        if x.gate is None:
            return
        node.gate = x.gate
        node.fields["mode"] = x.mode
        if x.residual is not None and x.residual is not x.node:
            node.inputs.append(x.residual)

    def _check_channels(self, *nodes: Node) -> None:
        for node in nodes:
            for n in (node, *node.inputs):
                if n.channels > MAX_CHANNELS:
                    raise ValueError(f"an engine takes at most {MAX_CHANNELS} channels, {n.name} has {n.channels}")

    def _stem(self, x: Value, conv: Conv, folded: Folded, activation: str, negative_slope: float) -> Value:
        out = folded.out_channels
        block = 8 if self.lanes == 16 else 4
        packed = folded.weight.reshape(out // block, block, 27).transpose(0, 2, 1)
        node = Node("stem", self._name(conv, "stem"), [], out, 2, 3, macs=27 * out)
        node.fields = activation_fields(activation, negative_slope) | {
            "w0": self.weights.add(packed),
            "w1": self.weights.add(folded.bias),
            "w2": self.weights.add(np.array(self.image_mean)),
        }
        return self._add(node)

    def depthwise_separable(
        self,
        x: Value,
        depthwise: Conv,
        depthwise_bn: Norm,
        pointwise: Conv,
        pointwise_bn: Norm,
        activation: str = "leaky_relu",
        negative_slope: float = 0.1,
        depthwise_activation: str | None = None,
        shuffle_groups: int = 1,
    ) -> Value:
        """3x3 depthwise, BN, activation, 1x1, BN, activation; then a channel shuffle folded into the store."""
        x = self._stored_map(x)
        first, second = Folded(depthwise, depthwise_bn), Folded(pointwise, pointwise_bn)
        channels = x.channels
        if first.groups != channels or first.kernel != (3, 3) or first.padding != 1 or first.stride not in (1, 2):
            raise ValueError("an engine's depthwise convolutions are 3x3 of padding 1 and stride 1 or 2")
        if second.kernel != (1, 1) or second.stride != 1 or second.padding != 0:
            raise ValueError("an engine's pointwise convolutions are 1x1 of stride 1 without padding")
        node = Node("separable", self._name(depthwise, "separable"), [x.node], second.out_channels, first.stride, 3)
        inner = activation if depthwise_activation is None else depthwise_activation
        node.fields = activation_fields(activation, negative_slope) | {"mode": ACTIVATIONS[inner], "p3": 0}
        taps = permuted(first.weight.reshape(1, channels, 9), x.order)[0]
        bias = permuted(first.bias[None], x.order)[0]
        self._depthwise(node, taps, bias)
        weight = permuted(second.dense()[:, :, 0, 0], x.order)
        order = shuffle_order(second.out_channels, shuffle_groups)
        weight, bias = weight[order], second.bias[order]
        self._stored(node, weight[:, :, None], bias)
        groups = order // (len(order) // second.groups)
        if self.lanes == 16 and x.order is None and self._pairs(channels, groups):
            node.fields |= {"p5": channels // second.groups, "w1": self._grouped(weight, groups)}
        node.macs = channels * 9 + weight.size // second.groups
        self._check_channels(node)
        return self._add(node)

    def _pairs(self, channels: int, groups: np.ndarray) -> bool:
        """Whether a grouped 1x1 takes two vectors to two in which lane l belongs to the same group. ``groups`` has the
        group of each output."""
        lanes = self.lanes
        if groups.max() == 0 or channels != 2 * lanes or len(groups) != 2 * lanes:
            return False
        return bool((groups[:lanes] == groups[lanes:]).all())

    def _grouped(self, weight: np.ndarray, groups: np.ndarray) -> int:
        """The k-th input of each lane's group, int32 (K, L), and its weights for two vectors of outputs, (K, 2 L)."""
        size = len(groups) // (groups.max() + 1)
        source = groups * size + np.arange(size)[:, None]
        offset = self.weights.add(source[:, : self.lanes].astype(np.int32))
        self.weights.add(np.take_along_axis(weight.T, source, axis=0))
        return offset

    def _depthwise(self, node: Node, taps: np.ndarray, bias: np.ndarray) -> None:
        """Packs the (C, 9) weight of the depthwise half of a separable block."""
        channels, lanes = len(taps), self.lanes
        if self.packs(node.inputs[0], node.stride):
            lines = np.tile(np.concatenate([taps, bias[:, None]], axis=1).T, (1, lanes // channels))[None]
        else:
            vectors = -(-channels // lanes)
            padded = np.zeros((vectors * lanes, 10))
            padded[:channels, :9], padded[:channels, 9] = taps, bias
            lines = padded.reshape(vectors, lanes, 10).transpose(0, 2, 1)
        node.fields["w0"] = self.weights.add(lines)

    def packs(self, node: Node, stride: int) -> bool:
        """Whether a depthwise convolution of this map puts two pixels in one vector."""
        return node.kind == "stem" and node.channels * 2 == self.lanes and stride == 1

    def cbam(
        self,
        x: Value,
        channel_mlp: ChannelMLP,
        spatial: Conv,
        spatial_bn: Sequence[Norm],
        spatial_order: str = "mean_max",
        residual: bool = False,
    ) -> Value:
        """The attention of :func:`ffkernels.cbam`; the reader of the value applies its last gate."""
        x = self._stored_map(x)
        if x.order is not None:
            raise ValueError("an engine takes no attention on a shuffled map")
        original = x.node
        node = original
        for bn in spatial_bn[:-1]:
            gate = self._gate(node, channel_mlp, spatial, bn, spatial_order)
            node = self.materialised(Value(node, gate=gate, mode=1, residual=node)).node
        gate = self._gate(node, channel_mlp, spatial, spatial_bn[-1], spatial_order)
        return Value(node, gate=gate, mode=2 if residual else 0, residual=original)

    def _gate(self, node: Node, mlp: ChannelMLP, spatial: Conv, bn: Norm, order: str) -> Gate:
        node.pool = True
        hidden, width = mlp.fc1_weight.shape
        name = self._name(spatial, "cbam")
        channel = Node("gate", f"{node.name} channel gate", [node], node.channels)
        zero = np.zeros(max(hidden, width))
        channel.fields = {
            "mode": 0,
            "w0": self.weights.add(mlp.fc1_weight),
            "w1": self.weights.add(zero if mlp.fc1_bias is None else mlp.fc1_bias),
            "w2": self.weights.add(mlp.fc2_weight),
            "w3": self.weights.add(zero if mlp.fc2_bias is None else mlp.fc2_bias),
            "p0": width,
            "p1": hidden,
        }
        folded = Folded(spatial, bn)
        groups = folded.groups
        if folded.weight.shape != (groups, 2, 7, 7) or folded.padding != 3 or node.channels % groups:
            raise ValueError(f"an engine's spatial gate is a 7x7 convolution of 2 G to G channels, {name} is not")
        maps = Node("maps", f"{node.name} spatial maps", [node], 2 * groups, planar=True, scalar=channel)
        maps.macs = node.channels
        maps.fields = {"groups": groups, "p0": int(order == "max_mean")}
        # The kernel reads [mean, max]; "max_mean" stores the maximum first, where the weights expect it.
        self.nodes += [channel, maps]
        return Gate(channel, maps, groups, self._spatial(folded))

    def _spatial(self, folded: Folded) -> int:
        """Packs the 7x7 convolution behind a spatial gate."""
        packed = np.concatenate([folded.weight.reshape(folded.groups, 98), folded.bias[:, None]], axis=1)
        return self.weights.add(packed)

    def materialised(self, x: Value) -> Value:
        """The same value with no gate pending."""
        if x.gate is None:
            return x
        node = Node("apply", f"{x.node.name} attention", [x.node], x.channels, macs=2 * x.channels)
        self._attend(node, x)
        return self._add(node)

    def _stored_map(self, x: Value) -> Value:
        """x as the blocks read it that take neither a pending gate nor another form of the map."""
        return self._plain(x)

    def _plain(self, x: Value, planar: bool = False) -> Value:
        """x with no gate pending, refused as :meth:`_check_map` says."""
        self._check_map(x, planar)
        return self.materialised(x)

    def _check_map(self, x: Value, planar: bool = False) -> None:
        """Refuses the image and, unless ``planar`` allows them, planar rows."""
        if x.node.kind == "image":
            raise ValueError("an engine's first block is a 3x3 convolution of stride 2 of the image")
        if x.node.planar and not planar:
            raise ValueError(
                "an engine gives the output of ssh_grouped to heads, gate_mix, progressive and channel_shuffle only"
            )

    def _in_order(self, what: str, *values: Value) -> None:
        if any(x.order is not None for x in values):
            raise ValueError(f"an engine {what} no shuffled maps")

    def bifpn_node(
        self,
        inputs: Sequence[Value],
        resample: Sequence[str],
        fusion_weight: Tensor,
        depthwise: Conv,
        pointwise: Conv | None,
        bn: Norm,
        shuffle_groups: int = 1,
        pool: str = "max",
        epsilon: float = 1e-4,
    ) -> Value:
        """:func:`ffkernels.bifpn_node`."""
        inputs = [self._stored_map(x) for x in inputs]
        self._in_order("fuses", *inputs)
        weight = fusion_weight.detach().double().cpu().clamp(min=0)
        weight = (weight / (weight.sum() + epsilon)).numpy()[: len(inputs)]
        node = Node("fuse", f"{self._name(depthwise, 'bifpn')} fusion", [x.node for x in inputs], inputs[0].channels)
        how = [{"none": 0, "up": 1, "down": 2 if pool == "max" else 3}[r] for r in resample]
        node.fields = dict(zip(("p0", "p1", "p2"), [*how, -1, -1])) | {"w0": self.weights.add(weight)}
        node.macs = len(inputs) * node.channels
        fused = self._add(node)
        if pointwise is None:
            return self.conv(fused, depthwise, bn)
        order = shuffle_order(pointwise.weight.shape[0], shuffle_groups)
        params = ConvParams.of(pointwise) if isinstance(pointwise, nn.Conv2d) else pointwise
        folded = Folded(params, None)
        scale, shift = affine(bn)
        # bn(shuffle(z)) = shuffle(bn'(z)) with the affine map of channel order^-1.
        inverse = np.argsort(order)
        folded.weight = folded.weight * scale[inverse][:, None, None, None]
        folded.bias = folded.bias * scale[inverse] + shift[inverse]
        return self._separable_folded(fused, depthwise, folded, shuffle_groups)

    def _separable_folded(self, x: Value, depthwise: Conv, second: Folded, shuffle_groups: int) -> Value:
        import torch

        pointwise = ConvParams(
            torch.from_numpy(second.weight), torch.from_numpy(second.bias), second.stride, second.padding, second.groups
        )
        return self.depthwise_separable(
            x, depthwise, None, pointwise, None, "none", shuffle_groups=shuffle_groups, depthwise_activation="none"
        )

    def channel_shuffle(self, x: Value, groups: int) -> Value:
        """:func:`ffkernels.channel_shuffle`: nothing moves, the next block reads in another order."""
        x = self._plain(x, planar=True)
        order = shuffle_order(x.channels, groups)
        before = range(x.channels) if x.order is None else x.order
        return replace(x, order=tuple(before[i] for i in order))

    def ssh_grouped(
        self, x: Value, convs: Sequence[Conv], bns: Sequence[Norm], shuffle_groups: int = 1
    ) -> tuple[Value, Value]:
        """:func:`ffkernels.ssh_grouped` on planar rows. Returns the context and x as planar rows."""
        if x.order is not None:
            raise ValueError("an engine takes no context of a shuffled map")
        self._check_map(x)
        if x.residual not in (None, x.node):
            x = self.materialised(x)
        load = Node("load_planar", f"{self._name(convs[0], 'ssh')} input", [x.node], x.channels, planar=True)
        self._attend(load, x)
        load.macs = 2 * x.channels
        self.nodes.append(load)
        folded = [Folded(conv, bn) for conv, bn in zip(convs, bns)]
        conv3, conv5_1, conv5_2, conv7_2, conv7_3 = folded
        shared = self._planar([(load, conv5_1, None)], "relu", self._name(convs[1], "ssh"))
        middle = self._planar([(shared, conv7_2, None)], "relu", self._name(convs[3], "ssh"))
        out = sum(c.out_channels for c in (conv3, conv5_2, conv7_3))
        order = np.argsort(shuffle_order(out, shuffle_groups))
        parts, first = [], 0
        for source, conv in ((load, conv3), (shared, conv5_2), (middle, conv7_3)):
            parts.append((source, conv, order[first : first + conv.out_channels]))
            first += conv.out_channels
        context = self._planar(parts, "relu", self._name(convs[0], "ssh"))
        return Value(context), Value(load)

    def _planar(self, parts: Sequence[tuple[Node, Folded, np.ndarray | None]], activation: str, name: str) -> Node:
        """3x3 convolutions of planar rows into one map; each part's channels go where its order says."""
        table, macs = [], 0
        for _, conv, order in parts:
            if conv.kernel != (3, 3) or conv.padding != 1 or conv.stride != 1:
                raise ValueError(f"an engine's context is made of 3x3 convolutions of stride 1, {name} is not")
            out, per_group = conv.weight.shape[:2]
            rows = out // conv.groups
            packed, counts = [], chunks(rows)
            for g in range(conv.groups):
                first = g * rows
                for count in counts:
                    packed.append(conv.weight[first : first + count].transpose(1, 2, 3, 0).reshape(-1))
                    first += count
            order = np.arange(out) if order is None else order
            table += [
                per_group,
                rows,
                conv.groups,
                self.weights.add(np.concatenate(packed)),
                self.weights.add(conv.bias),
                self.weights.add(np.asarray(order, dtype=np.int32)),
            ]
            macs += conv.weight.size
        node = Node(
            "conv_planar",
            name,
            [source for source, _, _ in parts],
            sum(conv.out_channels for _, conv, _ in parts),
            kernel=3,
            planar=True,
        )
        node.fields = activation_fields(activation, 0.1) | {
            "p0": len(parts),
            "w0": self.weights.add(np.array(table, dtype=np.int32)),
        }
        node.macs = macs
        self.nodes.append(node)
        return node

    def gate_mix(self, x: Value, context: Value, weight: Tensor, bias: Tensor, like: Value) -> Value:
        """g * context + (1 - g) * relu(x), g = sigmoid(weight . mean_hw(x) + bias), one gate per image.

        Args:
            x, context: planar values of :meth:`ssh_grouped`.
            weight, bias: (C,) and ().
            like: x as it was before :meth:`ssh_grouped`.
        """
        source = like.node
        if like.gate is not None:
            raise ValueError("gate_mix needs a map with no attention pending")
        self._in_order("gates", x, context)
        source.pool = True
        gate = Node("gate", f"{source.name} dynamic gate", [source], 1)
        gate.fields = {"mode": 1, "w0": self.weights.add(weight), "w1": self.weights.add(bias.reshape(1))}
        gate.fields |= {"w2": 0, "w3": 0}
        self.nodes.append(gate)
        node = Node("mix", f"{context.node.name} gate", [context.node, x.node], x.channels, planar=True, scalar=gate)
        node.fields = {"p0": 0, "w0": self.weights.add(np.arange(x.channels, dtype=np.int32))}
        node.macs = 2 * x.channels
        return self._add(node)

    def progressive(self, x: Value, groups: int = 4, steps: int = 3) -> Value:
        """``steps`` times x + 0.1 tanh(x), channel shuffle, times 1 + 0.1 i: element by element, then one shuffle."""
        if not (x.node.planar or x.node.low):
            raise ValueError("progressive needs the planar output of ssh_grouped")
        node = Node("mix", f"{x.node.name} enhancement", [x.node], x.channels, planar=True)
        node.fields = {"p0": steps, "w0": self.weights.add(np.arange(x.channels, dtype=np.int32))}
        node.macs = 20 * steps * x.channels
        value = replace(self._add(node), order=x.order)
        for _ in range(steps):
            value = self.channel_shuffle(value, groups)
        return value

    def add_chunk_mean(self, x: Value, raw: Value, scale: float) -> Value:
        """x + scale * mean over chunks of consecutive channels of raw."""
        x, raw = self._plain(x), self._plain(raw)
        self._in_order("adds to", x, raw)
        node = Node("reuse", f"{x.node.name} reuse", [x.node, raw.node], x.channels, macs=raw.channels)
        node.fields = {"w0": self.weights.add(np.array([scale]))}
        return self._add(node)

    def add_resized(self, x: Value, others: Sequence[tuple[Value, float]]) -> Value:
        """x + sum of scale * other, resized bilinearly (align_corners=False); one or two others."""
        x, values = self._plain(x), [self._plain(other) for other, _ in others]
        self._in_order("adds to", x, *values)
        node = Node("blend", f"{x.node.name} blend", [x.node, *[v.node for v in values]], x.channels)
        node.fields = {"w0": self.weights.add(np.array([scale for _, scale in others]))}
        node.macs = 5 * x.channels * len(others)
        return self._add(node)

    def deform_conv2d(
        self,
        x: Value,
        fields: Value,
        first: int,
        conv: Conv,
        bn: Norm,
        activation: str = "none",
        negative_slope: float = 0.1,
    ) -> Value:
        """:func:`ffkernels.deform_conv2d` of stride 1, padding 1.

        Args:
            fields: map with the 18 offsets from channel ``first`` on, then the 9 modulators before 2 * sigmoid.
        """
        x = self._plain(x)
        folded = Folded(conv, bn)
        if folded.kernel != (3, 3) or folded.stride != 1 or folded.padding != 1 or x.order is not None:
            raise ValueError("an engine's deformable convolutions are 3x3 of stride 1 and padding 1")
        node = Node("deform", self._name(conv, "deform"), [x.node, fields.node], folded.out_channels)
        node.fields = activation_fields(activation, negative_slope) | {
            "p3": 0,
            "p4": first,
            "p5": first + 18,
        }
        weight = folded.dense()
        self._stored(node, weight.reshape(*weight.shape[:2], 9), folded.bias)
        node.macs = folded.weight.size + 36 * x.channels
        self._check_channels(node)
        return self._add(node)

    def stack(self, convs: Sequence[Conv]) -> ConvParams:
        """Convolutions of the same input as one."""
        import torch

        params = [ConvParams.of(c) if isinstance(c, nn.Conv2d) else c for c in convs]
        zero = [p.weight.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias for p in params]
        return ConvParams(torch.cat([p.weight for p in params]), torch.cat(zero), *params[0][2:])

    def concat(self, values: Sequence[Value], activation: str = "none") -> Value:
        """Channels of several convolutions side by side, then an activation: each stores into its part."""
        self._in_order("concatenates", *values)
        total = sum(v.channels for v in values)
        whole = Node("concat", f"{values[0].node.name} concatenation", [v.node for v in values], total)
        first = 0
        for value in values:
            node = value.node
            if node.kind not in ("conv", "deform") or node.fields["act"] or node.pool:
                raise ValueError("an engine concatenates convolutions without activation that nothing else reads")
            vectors = node.fields["p0"]
            node.into, node.first = whole, first
            node.fields |= {
                "act": ACTIVATIONS[activation],
                "p1": first,
                "p2": node.channels - (vectors - 1) * self.lanes,
            }
            first += value.channels
        return self._add(whole)

    def multi_head(self, features: Sequence[Value], heads: Sequence[HeadParams | Any]) -> None:
        """:func:`ffkernels.multi_head`: the outputs of the network."""
        for x, head in zip(features, heads):
            x = self._plain(x, planar=True)
            if head.trunk is not None:
                if not x.node.planar:
                    x = self.conv(x, head.trunk, head.trunk_bn, "relu")
                else:
                    folded = Folded(head.trunk, head.trunk_bn)
                    if folded.groups != 1:
                        raise ValueError("an engine's head has a trunk of one group")
                    folded.weight = permuted(folded.weight, x.order)
                    x = Value(self._planar([(x.node, folded, None)], "relu", self._name(head.trunk, "trunk")))
            predictors = [Folded(conv, None) for conv in (head.bbox, head.cls, head.landmarks)]
            anchors = predictors[0].out_channels // 4
            if [p.out_channels for p in predictors] != [4 * anchors, 2 * anchors, 10 * anchors]:
                raise ValueError("a head predicts 4, 2 and 10 channels per anchor")
            if self.anchors_per_pixel not in (0, anchors):
                raise ValueError("all heads must have the same number of anchors per pixel")
            self.anchors_per_pixel = anchors
            weight = permuted(np.concatenate([p.dense()[:, :, 0, 0] for p in predictors]), x.order)
            bias = np.concatenate([p.bias for p in predictors])
            node = Node("head", self._name(head.cls, "head"), [x.node], 16 * anchors, planar=x.node.planar)
            node.fields = {"p0": anchors, "mode": int(x.node.planar)} | self._predictors(node, weight, bias)
            node.macs = weight.size
            self._check_channels(*node.inputs)
            self.nodes.append(node)
            self.heads.append(node)

    def _predictors(self, node: Node, weight: np.ndarray, bias: np.ndarray) -> dict[str, int]:
        """Packs the (O, C) weight of a head."""
        vectors = -(-weight.shape[0] // self.lanes)
        padded, padded_bias = np.zeros((vectors * self.lanes, weight.shape[1])), np.zeros(vectors * self.lanes)
        padded[: len(weight)], padded_bias[: len(bias)] = weight, bias
        lines = padded.reshape(vectors, self.lanes, -1).transpose(0, 2, 1)
        return {"w0": self.weights.add(lines), "w1": self.weights.add(padded_bias)}

    def anchors(self, priors: Callable[[int, int], Tensor], variances: tuple[float, float]) -> None:
        """How boxes are decoded: ``priors(height, width)`` gives (N, 4) cx cy w h for an input of that size."""
        self.priors = (priors, variances)


def activation_fields(activation: str, negative_slope: float) -> dict[str, int]:
    """The activation of a row. ``leaky_relu`` is computed as max(x, slope * x)."""
    if negative_slope > 1:
        raise ValueError(f"an engine's leaky ReLU has a slope of at most 1, not {negative_slope}")
    return {"act": ACTIVATIONS[activation], "slope": bits(negative_slope)}


def shuffle_order(channels: int, groups: int) -> np.ndarray:
    """Source of each channel of a channel shuffle: out i * groups + j is in j * (channels / groups) + i."""
    return np.arange(channels).reshape(groups, channels // groups).T.reshape(-1)


def chunks(count: int) -> list[int]:
    """How conv_planar divides the output channels of a group: by four, then two, then one."""
    sizes = []
    while count:
        sizes.append(4 if count >= 4 else 2 if count >= 2 else 1)
        count -= sizes[-1]
    return sizes
