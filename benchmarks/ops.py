"""What the per-op benchmarks share: who competes, how a case is timed, what is recorded beside the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ffkernels import Policy, registry

EAGER = "eager"


def competitors(op: str) -> list:
    """PyTorch eager and every backend of the op that runs on this machine, with the device it runs on."""
    rows = [pytest.param(EAGER, "cpu", id="eager-cpu")]
    if torch.cuda.is_available():
        rows.append(pytest.param(EAGER, "cuda", id="eager-cuda"))
    for backend in registry.implementations(op):
        device = "cpu" if backend == "cpu" else "cuda"
        reason = registry.backend_unavailable(backend, device)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        rows.append(pytest.param(backend, device, id=f"{backend}-{device}", marks=marks))
    return rows


def policy(competitor: str) -> Policy:
    return Policy("0") if competitor == EAGER else Policy("require", competitor)


def measure(benchmark, run: Callable[[], object], device: str, bytes_moved: int = 0, flops: int = 0) -> None:
    """Time ``run`` with pytest-benchmark; on a GPU until it has finished. Records GB/s and GFLOP/s of the median."""

    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    benchmark(synchronised if device == "cuda" else run)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(bytes_moved / seconds / 1e9, 2)
        benchmark.extra_info["GFLOP/s"] = round(flops / seconds / 1e9, 2)


def forward_backward(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """A function that runs the op and its backward pass for every input that requires a gradient."""
    wanted = [t for t in inputs if t.requires_grad]
    grad = torch.randn_like(run(*inputs))
    return lambda: torch.autograd.grad(run(*inputs), wanted, grad)
