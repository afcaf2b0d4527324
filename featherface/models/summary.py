"""What a model is made of: parameters and operations of each component, beside the seed document's table."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ffkernels import set_fused

from .base import FeatherFace

# Components and the attributes of the models that make them up.
COMPONENTS = {
    "backbone": ("body",),
    "attention": ("backbone_cbam_manager", "bifpn_cbam_manager"),
    "pyramid": ("bifpn",),
    "context": ("ssh1", "ssh2", "ssh3"),
    "channel shuffle": ("ssh1_cs", "ssh2_cs", "ssh3_cs"),
    "dynamic gate": ("dynamic_gate",),
    "heads": ("shared_heads", "ClassHead", "BboxHead", "LandmarkHead"),
}

V1_TABLE = {"backbone": 213_072, "attention": 22_184, "pyramid": 113_610, "context": 148_296, "heads": 7_200}
V2_TABLE = {
    "backbone": 213_072,
    "attention": 1_248,
    "pyramid": 18_432,
    "context": 12_288,
    "channel shuffle": 0,
    "heads": 11_520,
}
SEED: dict[str, tuple[dict[str, int], int]] = {
    "featherface_v1": (V1_TABLE, 487_103),
    "featherface_v2": (V2_TABLE, 256_148),
    "featherface_v2_ultra": ({}, 248_136),
}
"""The seed's parameters by component and in total. Its rows do not sum to its totals."""


@dataclass(frozen=True)
class Component:
    """One row: ``parameters`` counts a tensor that several components share where it comes first; ``seed`` is the
    seed's figure or None; ``flops`` counts both the multiplication and the addition of a multiply-add."""

    name: str
    parameters: int
    seed: int | None
    flops: int


@dataclass(frozen=True)
class Summary:
    """A model's components and totals for one image of ``height`` x ``width`` pixels.

    ``flops`` are those of convolutions and matrix products, two per multiply-add; normalisation, activations, pooling,
    interpolation and bilinear sampling are not counted. ``weight_bytes`` is the size of the parameters in float32.
    """

    model: str
    height: int
    width: int
    components: tuple[Component, ...]
    parameters: int
    seed: int | None
    flops: int
    weight_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries and lists, for JSON."""
        return asdict(self)


def summarize(model: FeatherFace, height: int = 640, width: int = 640) -> Summary:
    """Parameters and FLOPs of ``model`` by component, FLOPs for one image of ``height`` x ``width`` pixels.

    Nothing is computed: the model's shapes are followed on PyTorch's meta device, on a copy.
    """
    table, seed = SEED.get(model.name or "", ({}, None))
    flops, total_flops = count_flops(model, height, width)
    counted: set[int] = set()
    components = []
    for name, attributes in COMPONENTS.items():
        modules = [module for a in attributes if isinstance(module := getattr(model, a, None), nn.Module)]
        if not modules and name not in table:
            continue
        fresh = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in counted}
        counted.update(fresh)
        components.append(
            Component(name, sum(fresh.values()), table.get(name), sum(flops.pop(a, 0) for a in attributes))
        )
    parameters = sum(p.numel() for p in model.parameters())
    return Summary(
        model.name or type(model).__name__,
        height,
        width,
        tuple(components),
        parameters,
        seed,
        total_flops,
        4 * parameters,
    )


def count_flops(model: FeatherFace, height: int, width: int) -> tuple[dict[str, int], int]:
    """FLOPs by attribute of the model, the work of no attribute's module being the heads', and in total."""
    shadow = set_fused(copy.deepcopy(model).to("meta").eval(), False)
    dtype = next(shadow.parameters()).dtype
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, height, width, device="meta", dtype=dtype))
    root = type(model).__name__ + "."
    flops = {
        name.removeprefix(root): sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name.startswith(root) and "." not in name.removeprefix(root)
    }
    total = counter.get_total_flops()
    heads = next(a for a in COMPONENTS["heads"] if hasattr(model, a))
    flops[heads] = flops.get(heads, 0) + total - sum(flops.values())
    return flops, total


def render(summary: Summary) -> Table:
    """The summary as a table for a terminal (``rich.print``)."""
    table = Table(
        title=f"{summary.model}, FLOPs of one {summary.height} x {summary.width} image",
        caption="2 FLOPs per multiply-add, convolutions and matrix products only; seed: the design document",
        show_footer=True,
    )
    table.add_column("component", "total")
    table.add_column("parameters", f"{summary.parameters:,}", justify="right")
    table.add_column("seed", "-" if summary.seed is None else f"{summary.seed:,}", justify="right")
    table.add_column("MFLOPs", f"{summary.flops / 1e6:,.1f}", justify="right")
    for row in summary.components:
        seed = "-" if row.seed is None else f"{row.seed:,}"
        table.add_row(row.name, f"{row.parameters:,}", seed, f"{row.flops / 1e6:,.1f}")
    return table
