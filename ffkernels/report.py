"""Which backend runs each fused module of a model, and why not a better one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import registry
from .nn.module import FusedModule


class ReportRow(NamedTuple):
    """One op of one module: its path in the model, the op, the backend that runs it, reasons for a fallback."""

    layer: str
    op: str
    backend: str
    reason: str


class Report(list[ReportRow]):
    """Rows of :func:`report`; prints as a table."""

    def __str__(self) -> str:
        rows = [ReportRow("layer", "op", "backend", "reason"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]).rstrip() for row in rows)


def report(model: nn.Module, *inputs: Any) -> Report:
    """A table of (layer, op, backend, reason) for every fused module inside ``model``.

    Without ``inputs`` the registry is asked what would run for float tensors like the module's parameters. With
    ``inputs`` the model is run once on them, without gradients and in evaluation mode, and the calls that were made
    are listed. The model is left as it was.
    """
    return _observed(model, inputs) if inputs else _expected(model)


def _running(model: nn.Module) -> list[tuple[str, FusedModule]]:
    """The fused modules whose ``forward`` runs, with their paths: those that no other one absorbs."""
    fused = [(name, m) for name, m in model.named_modules() if isinstance(m, FusedModule)]
    absorbed = {inner for _, module in fused for child in module.ff_absorbed() for inner in child.modules()}
    return [(name, module) for name, module in fused if module not in absorbed]


def _expected(model: nn.Module) -> Report:
    rows = Report()
    like = next(model.parameters(), torch.empty(0))
    for name, module in _running(model):
        if module.ff_op is None:
            continue
        if (reason := module.ff_bypassed()) is not None:
            rows.append(ReportRow(name or type(module).__name__, module.ff_op, "reference", reason))
            continue
        sample: Tensor = next(module.parameters(), like)
        needs_grad = module.training and any(p.requires_grad for p in model.parameters())
        request = registry.Request(sample.device.type, sample.dtype, needs_grad, False, module.ff_facts())
        selection = registry.explain(module.ff_op, module.ff_policy, request)
        rows.append(ReportRow(name or type(module).__name__, module.ff_op, selection.backend, selection.reason))
    return rows


def _observed(model: nn.Module, inputs: tuple[Any, ...]) -> Report:
    rows = Report()
    path: list[str] = []
    handles = []
    # Absorbed modules stay unhooked: a chain calls a block that has hooks instead of running it itself.
    for name, module in _running(model):
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: path.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, o: path.pop() and None, always_call=True))
    training = {m: m.training for m in model.modules()}
    model.eval()

    class Calls(list):
        def append(self, call: tuple[str, registry.Selection]) -> None:
            op, selection = call
            rows.append(ReportRow(path[-1] if path else "", op, selection.backend, selection.reason))

    try:
        with registry.record(Calls()), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return rows
