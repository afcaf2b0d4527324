"""What was built and what runs here: ``python -m ffkernels.info``. Paste its output into bug reports."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch

from . import __version__, config, cpu, engine, registry, triton
from .native import build_info


def info() -> dict[str, Any]:
    """Versions, build record and state of every backend, with the reason for each one that cannot run."""
    built = build_info()
    state = {b: registry.backend_unavailable(b) for b in ("cpu", "cuda", "triton")}
    versions = {"featherface": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if triton.unavailable() is None:
        import triton as triton_package

        versions["triton"] = triton_package.__version__
    return {
        "versions": versions,
        "git_revision": built.get("git_revision"),
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "built": {"cpu": built["cpu"], "cuda": built["cuda"]},
        "backends": {b: "available" if reason is None else reason for b, reason in state.items()},
        "cpu_engine": engine.unavailable() or "available",
        "cpu_instruction_sets": {"usable": cpu.instruction_sets(), "in_use": cpu.loaded_isa()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "policy": config.build_policy()._asdict(),
        "ops": {op: sorted(registry.implementations(op)) for op in registry.ops()},
    }


def processor_name() -> str:
    """Name of the processor as the operating system reports it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


SHORT = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.uint8: "u8"}


def support_table() -> str:
    """Markdown table of what the registry knows: op, then the dtypes of every backend, with "forward only" if so."""
    backends = ("cpu", "cuda", "triton")
    lines = ["| op | C++ (CPU) | CUDA C++ | Triton |", "|---|---|---|---|"]
    for op in registry.ops():
        cells = []
        for backend in backends:
            implementation = registry.implementations(op).get(backend)
            if implementation is None:
                cells.append("-")
            else:
                dtypes = " ".join(SHORT[d] for d in implementation.dtypes)
                cells.append(dtypes if implementation.backward else f"{dtypes}, forward only")
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def render(report: dict[str, Any]) -> str:
    """The report as indented text."""
    lines: list[str] = []

    def walk(value: Any, depth: int) -> None:
        for key, item in value.items():
            if isinstance(item, dict):
                lines.append(f"{'  ' * depth}{key}:")
                walk(item, depth + 1)
            else:
                text = ", ".join(map(str, item)) or "none" if isinstance(item, list) else item
                lines.append(f"{'  ' * depth}{key}: {text}".rstrip())

    walk(report, 0)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ffkernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--ops", action="store_true", help="print the table of ops, backends and dtypes as Markdown")
    arguments = parser.parse_args()
    if arguments.ops:
        print(support_table())
        return 0
    try:
        report = info()
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
