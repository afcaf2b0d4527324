"""From a graph and an input size to a list of steps: sizes, chains, ring buffers, one arena, barriers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Node

CHAIN_BYTES = 1024 * 1024
"""A map that takes more than this of each thread is never stored whole where its reader can pull it row by row: it
would leave the L2 cache. Below that, a chain costs more in rows that neighbouring threads both compute."""
TILE_BYTES = 28 * 1024
"""Tile buffers are at most this large, to stay in the L1 cache with the weights they meet."""
MAX_ROWS = 4
"""``kMaxRows`` of csrc/cpu/engine_rows.h."""
MAX_BLOCKS = 16
"""``kMaxBlocks`` of csrc/cpu/engine.cpp."""
TILE_STRIDE = 272
"""``kTileStride`` of csrc/cpu/engine_gemm.h."""
TILES = {4: 6, 8: 6, 16: 14}
"""``kTile`` of csrc/cpu/engine_gemm.h by vector width; a narrower tile than the machine's is always right."""

PACKED_TILE = 32
"""The same where the reader of a packed map holds its weights in registers."""


@dataclass
class Step:
    """What a plan runs between two decisions of the executor: some blocks, the last of which is stored."""

    name: str
    kind: str
    output: tuple[int, int, int]
    flops: int
    bytes: int
    dtype: str
    last_row: int


@dataclass
class Plan:
    """A network for one input size. ``rows`` is what csrc/cpu/engine.h describes."""

    rows: np.ndarray
    steps: list[Step]
    arena: int
    scratch: int
    scratch_size: int
    anchors: int
    barriers: int

    @property
    def floats(self) -> int:
        """Of the arena, with every thread's scratch."""
        return self.arena


class _Map:
    """Where a node's output lies, and how."""

    def __init__(self, node: Node, h: int, w: int, lanes: int, packed: bool) -> None:
        self.h, self.w, self.c = h, w, node.channels
        if node.planar:
            self.cs = -(-w // lanes) * lanes + 2 * lanes
            self.row = self.c * self.cs
        else:
            self.cs = node.channels if packed else -(-node.channels // lanes) * lanes
            slack = (lanes + 2) * self.cs if node.kind == "stem" else 0
            self.row = -(-((w + 2) * self.cs + slack) // 16) * 16
        self.item_size, self.slack = 4, 2 * lanes
        if node.low and node.kind == "maps":
            # Segments of 16 pixels read 32 numbers, from three before the first pixel on.
            self.cs = -(-(-(-w // 16) * 16 + 16) // 32) * 32
            self.row, self.item_size = self.c * self.cs // 2, 2
        elif node.cs:
            # Tiles read up to 64 bytes behind a row, and of the last one 16 pixels of a stride of 2 and their windows.
            self.cs = node.cs
            self.row = -(-((w + 2) * self.cs + 32) // 32) * 16
            self.item_size, self.slack = 2, 18 * self.cs + 32
        self.ring = h
        self.base = -1
        self.in_scratch = False


def out_size(node: Node, sizes: dict[Node, tuple[int, int]], image: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a node's output."""
    if node.kind == "stem":
        h, w = image
    elif node.kind == "fuse":
        same = next(i for i, how in enumerate(("p0", "p1", "p2")) if node.fields[how] == 0)
        return sizes[node.inputs[same]]
    else:
        h, w = sizes[node.inputs[0]]
    return -(-h // node.stride), -(-w // node.stride)


def make_plan(
    nodes: list[Node],
    heads: list[Node],
    fields: list[str],
    lanes: int,
    packed: set[Node],
    image: tuple[int, int],
    threads: int,
    stem_mode: int,
    softmax: bool,
) -> Plan:
    """Plan a graph for images of one size.

    Args:
        nodes: of the graph, in the order they were described.
        heads: those that write the network's outputs, in the order of levels.
        fields: names of a row's columns.
        lanes: vector width in floats.
        packed: stem nodes whose readers put two pixels in one vector.
        image: height and width.
        threads: at most so many will run the plan.
        stem_mode: what the image is: 0 float32 planes, 1 bytes in the order of the planes, 2 in the opposite order.
        softmax: whether classes are probabilities.
    """
    sizes: dict[Node, tuple[int, int]] = {}
    maps: dict[Node, _Map] = {}
    for node in nodes:
        sizes[node] = out_size(node, sizes, image)
        maps[node] = _Map(node, *sizes[node], lanes, node in packed)
    groups = _chains(nodes, maps, threads)

    column = {name: i for i, name in enumerate(fields)}
    producer = {node: i for i, group in enumerate(groups) for node in group}
    for i, group in enumerate(groups):
        for node in group:
            if node.into is not None:
                producer.setdefault(node.into, i)

    depends = [_dependencies(group) for group in groups]
    epoch: list[int] = []
    for i in range(len(groups)):
        before = {producer[d] for d in depends[i] if d.kind != "concat"}
        for d in depends[i]:
            if d.kind == "concat":
                before |= {producer[part] for part in d.inputs}
        epoch.append(1 + max((epoch[j] for j in before if j != i), default=-1))
    order = sorted(range(len(groups)), key=lambda i: epoch[i])

    arena = _Arena(lanes)
    pools: dict[Node, int] = {}
    gates: dict[Node, int] = {}
    scratch_size = 0
    ends: dict[Node, int] = {}
    for i in range(len(groups)):
        for d in depends[i]:
            ends[d] = max(ends.get(d, 0), epoch[i])
    scratch_offsets: list[dict[Node, int]] = []
    for i, group in enumerate(groups):
        sink = group[-1]
        for node in group:
            if node.pool:
                gate_epochs = [epoch[producer[g]] for g in nodes if g.kind == "gate" and g.inputs[0] is node]
                pools[node] = arena.reserve(sizes[node][0] * 2 * maps[node].cs, epoch[i], max(gate_epochs))
        if sink.kind == "gate":
            gates[sink] = arena.reserve(max(maps[sink.inputs[0]].cs, lanes), epoch[i], ends.get(sink, epoch[i]))
        elif sink.kind != "head" and sink.into is None:
            arena_map = maps[sink]
            # Vectors may read past the last pixel.
            arena.place(arena_map, arena_map.row * arena_map.h + arena_map.slack, epoch[i], ends.get(sink, epoch[i]))
        rows_of = {node: _rows(node, maps, lanes) for node in group}
        used = _rings(group, maps, rows_of)
        own = max(_own_scratch(node, maps, rows_of[node], lanes) for node in group)
        scratch_offsets.append(dict.fromkeys(group, used))
        scratch_size = max(scratch_size, used + own)
    for node in nodes:
        if node.kind == "concat":
            parts = [epoch[producer[p]] for p in node.inputs]
            whole = maps[node]
            arena.place(whole, whole.row * whole.h + whole.slack, min(parts), ends.get(node, max(parts)))
    arena.assign()

    first_anchor, anchors = {}, 0
    for head in heads:
        h, w = sizes[head]
        first_anchor[head] = anchors
        anchors += h * w * head.fields["p0"]

    table = np.zeros((sum(len(group) for group in groups), len(fields)), np.int64)
    for name in ("a_block", "b_block", "c_block", "a_base", "b_base", "c_base", "o_base", "pool", "gate", "maps"):
        table[:, column[name]] = -1
    steps: list[Step] = []
    at = 0
    for position, i in enumerate(order):
        group = groups[i]
        index = {node: k for k, node in enumerate(group)}
        for node in group:
            row = table[at]

            def put(name: str, value: int, row: np.ndarray = row) -> None:
                row[column[name]] = value

            put("kind", node.kernel_kind)
            put("rows", _rows(node, maps, lanes))
            put("stride", node.stride)
            put("kernel", node.kernel)
            put("pad", node.kernel // 2)
            put("tile", _tile(sizes[node][1], lanes, node.inputs[:1] and node.inputs[0] in packed))
            put("scratch", scratch_offsets[i][node])
            for name, value in node.fields.items():
                put(name, value)
            for letter, source in zip("abc", node.inputs):
                m = maps[source]
                put(f"{letter}_block", index.get(source, -1))
                put(f"{letter}_base", arena.at(m))
                for key in ("row", "ring", "h", "w", "c", "cs"):
                    put(f"{letter}_{key}", getattr(m, key))
            m = maps[node if node.into is None else node.into]
            if node.kind not in ("head", "gate"):
                put("o_base", arena.at(m))
            put("o_block", int(m.in_scratch))
            for key in ("row", "ring", "h", "w", "c", "cs"):
                put(f"o_{key}", getattr(m, key))
            if node.kind == "stem":
                put("a_h", image[0])
                put("a_w", image[1])
                put("mode", stem_mode)
                put("p0", _stem_line(node, m.w) if node.low else -(-m.w // lanes) * lanes + 2 * lanes)
            if node.kind == "head":
                put("p1", first_anchor[node])
                put("p2", int(softmax))
            if node.kind == "gate":
                put("pool", arena.offset(pools[node.inputs[0]]))
                put("gate", arena.offset(gates[node]))
            if node.pool:
                put("pool", arena.offset(pools[node]))
            if node.kind == "maps":
                put("p1", m.cs)
            if node.scalar is not None:
                put("gate", arena.offset(gates[node.scalar]))
            if node.gate is not None:
                g = node.gate
                put("gate", arena.offset(gates[g.channel]))
                put("maps", arena.at(maps[g.maps]))
                put("maps_row", maps[g.maps].row)
                put("groups", g.groups)
                put("spatial", g.spatial)
            at += 1
        table[at - 1, column["last"]] = 1
        is_last = position + 1 == len(order)
        table[at - 1, column["sync"]] = int(is_last or epoch[order[position + 1]] != epoch[i])
        steps.append(_describe(group, maps, sizes, at - 1))
    scratch_size = -(-scratch_size // 16) * 16 + 16
    total = arena.size + threads * scratch_size
    return Plan(table, steps, total, arena.size, scratch_size, anchors, int(table[:, column["sync"]].sum()))


def _dependencies(group: list[Node]) -> set[Node]:
    inside = set(group)
    found: set[Node] = set()
    for node in group:
        found.update(n for n in node.inputs if n not in inside)
        if node.scalar is not None:
            found.add(node.scalar)
        if node.gate is not None:
            found.update((node.gate.channel, node.gate.maps))
    return found


def _chains(nodes: list[Node], maps: dict[Node, _Map], threads: int) -> list[list[Node]]:
    """Nodes grouped into steps, in an order in which every step comes after those it reads."""
    readers: dict[Node, list[Node]] = {node: [] for node in nodes}
    whole = set()
    for node in nodes:
        for source in node.inputs:
            readers[source].append(node)
            if node.kind in ("fuse", "blend", "reuse", "apply", "maps", "gate") or (
                node.kind == "deform" and source is node.inputs[0]
            ):
                whole.add(source)
        if node.gate is not None:
            whole.update(node.inputs)
    group = {node: [node] for node in nodes if node.kind != "concat"}

    def join(producer: Node, reader: Node) -> None:
        a, b = group[producer], group[reader]
        if a is b or len(a) + len(b) > MAX_BLOCKS:
            return
        merged = a + b
        for node in merged:
            group[node] = merged

    for node in nodes:
        for source in node.inputs:
            if source in whole or source.pool or source not in group or node.kind == "concat":
                continue
            planar = source.planar and node.planar and source.kind != "maps"
            if planar or source.joins or (len(readers[source]) == 1 and _chainable(source, node, maps, threads)):
                join(source, node)
    position = {node: i for i, node in enumerate(nodes)}
    unique = {id(g): sorted(g, key=position.__getitem__) for g in group.values()}
    return sorted(unique.values(), key=lambda g: position[g[-1]])


def _chainable(source: Node, reader: Node, maps: dict[Node, _Map], threads: int) -> bool:
    pair = (source.kind, reader.kind)
    if pair in (("fuse", "separable"), ("fuse", "conv"), ("conv", "head"), ("conv", "deform"), ("stem", "separable")):
        return True
    if pair == ("separable", "separable"):
        m = maps[source]
        return 4 * m.row * m.h > CHAIN_BYTES * threads
    return False


def _tile(width: int, lanes: int, packed: bool = False) -> int:
    return -(-width // -(-width // (PACKED_TILE if packed else TILES[lanes])))


def _rows(node: Node, maps: dict[Node, _Map], lanes: int) -> int:
    """Rows that a block makes at a time."""
    if node.kind in ("stem", "load_planar", "apply"):
        return MAX_ROWS
    if node.kind in ("separable", "conv") and node.inputs:
        if node.low:
            return MAX_ROWS if max(n.cs for n in node.inputs) <= 128 else MAX_ROWS // 2
        m = maps[node.inputs[0]]
        fit = TILE_BYTES // (4 * m.cs * _tile(maps[node].w, lanes))
        return max(1, min(MAX_ROWS, fit))
    return 1


def _rings(group: list[Node], maps: dict[Node, _Map], rows: dict[Node, int]) -> int:
    """Rows that each map inside a step must hold, and their place in scratch. Returns the floats used.

    Relative to the row y that the sink makes next, scaled by strides: ``high`` is the last row that may have been made,
    ``next_row`` a lower bound of the one to be made next. A row is needed until every reader's next window is past it.
    """
    inside = set(group)
    sink = group[-1]
    high, next_row = {sink: rows[sink] - 1}, {sink: 0}
    used = 0
    for node in reversed(group[:-1]):
        readers = [n for n in group if node in n.inputs and n in inside]
        high[node] = max(high[n] * n.stride - n.kernel // 2 + n.kernel - 1 for n in readers) + rows[node] - 1
        next_row[node] = max((next_row[n] - 1) * n.stride - n.kernel // 2 + n.kernel for n in readers)
        needed = min(next_row[n] * n.stride - n.kernel // 2 for n in readers)
        m = maps[node]
        m.ring = min(m.h, high[node] - needed + 1)
        m.base, m.in_scratch = used, True
        used += -(-(m.ring * m.row + max(m.slack, 32)) // 16) * 16
    return used


def _own_scratch(node: Node, maps: dict[Node, _Map], rows: int, lanes: int) -> int:
    m = maps[node]
    gated = rows * maps[node.gate.maps].row if node.gate is not None else 0
    if node.low:
        return _bf16_scratch(node, m, rows, gated)
    if node.kind == "stem":
        plane = -(-m.w // lanes) * lanes + 2 * lanes
        return 24 * plane + 24 * lanes + 64
    source = maps[node.inputs[0]] if node.inputs else m
    if node.kind in ("separable", "conv"):
        return MAX_ROWS * (TILES[lanes] + 2) * TILE_STRIDE + gated
    if node.kind == "gate":
        return 2 * source.cs + max(node.fields.get("p1", 0), 1) + lanes
    if node.kind in ("maps", "load_planar"):
        return 2 * source.cs * lanes + gated
    if node.kind == "head":
        return 16 * (16 * node.fields["p0"] + lanes)
    if node.kind == "fuse":
        return 3 * m.w * m.cs
    if node.kind == "deform":
        return TILES[lanes] * 9 * source.cs
    return gated


def _stem_line(node: Node, width: int) -> int:
    """Numbers of one row of the image, with what strips of 16 pixels read on both sides."""
    joined = node.fields["p4"]
    strips = -(-width // (16 * joined))
    return -(-(6 * 16 * joined * strips + 64) // 32) * 32


def _bf16_scratch(node: Node, m: _Map, rows: int, gated: int) -> int:
    if node.kind == "stem":
        return (2 * MAX_ROWS + 2) * _stem_line(node, m.w) // 2
    if node.kind == "separable":
        return 2 * rows * 16 * max(node.inputs[0].cs, 32) // 2
    if node.kind == "conv":
        return gated + rows * 16 * node.inputs[0].cs // 2
    if node.kind == "maps":
        return node.inputs[0].cs
    if node.kind == "fuse":
        return m.w * m.cs
    if node.kind == "head":
        return 16 * 16 * node.fields["p0"]
    return gated


class _Arena:
    """Offsets of buffers that live from one epoch to another, overlapping in memory where they do not in time."""

    def __init__(self, lanes: int) -> None:
        self.entries: list[tuple[int, int, int, _Map | None]] = []
        self.offsets: list[int] = []
        self.size = 0

    def reserve(self, floats: int, first: int, last: int, target: _Map | None = None) -> int:
        self.entries.append((-(-floats // 16) * 16, first, last, target))
        return len(self.entries) - 1

    def place(self, target: _Map, floats: int, first: int, last: int) -> None:
        target.base = self.reserve(floats, first, last, target)

    def assign(self) -> None:
        """Largest first, each at the lowest offset where nothing that lives at the same time is in the way."""
        self.offsets = [0] * len(self.entries)
        placed: list[tuple[int, int, int, int]] = []
        for i in sorted(range(len(self.entries)), key=lambda i: -self.entries[i][0]):
            floats, first, last, _ = self.entries[i]
            offset = 0
            for start, end, other_first, other_last in sorted(placed):
                if other_first <= last and first <= other_last and start < offset + floats and offset < end:
                    offset = end
            self.offsets[i] = offset
            placed.append((offset, offset + floats, first, last))
            self.size = max(self.size, offset + floats)

    def offset(self, entry: int) -> int:
        return self.offsets[entry]

    def at(self, m: _Map) -> int:
        return m.base if m.in_scratch or m.base < 0 else self.offsets[m.base]


def _describe(group: list[Node], maps: dict[Node, _Map], sizes: dict[Node, tuple[int, int]], last_row: int) -> Step:
    sink = group[-1]
    inside = set(group)
    flops = 0
    moved = 0
    for node in group:
        h, w = sizes[node]
        flops += 2 * node.macs * h * w
        moved += sum(_map_bytes(maps[n]) for n in node.inputs if n not in inside)
        if node.kind == "stem":
            moved += 4 * 3 * (2 * h) * (2 * w)
    h, w = sizes[sink]
    moved += _map_bytes(maps[sink])
    kinds, dtype = " + ".join(n.kind for n in group), "bfloat16" if sink.low else "float32"
    return Step(sink.name, kinds, (sink.channels, h, w), flops, moved, dtype, last_row)


def _map_bytes(m: _Map) -> int:
    return m.item_size * m.h * m.w * m.c
