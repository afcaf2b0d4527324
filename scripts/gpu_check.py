"""Checks and measurements that need a GPU, in stages: tests, sanitize, ops, model.

A stage is a list of items. Each finished item is written to ``benchmarks/results/gpu_<stage>.json`` at once, so that a
stage can be stopped and started again; items of another commit, GPU or PyTorch are done anew. ``gpu_summary.md``
beside it is rewritten from all stages. The exit code is 0 when every item is done and none failed, 3 when the time
limit left items for the next start, 1 otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "sanitize", "ops", "model")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = ("channel_shuffle", "conv_chain_gpu", "detection_gpu", "preprocess_gpu")
RESERVE = 45
"""Seconds an item is given at least; with less than that left, the stage stops."""

Item = tuple[str, Callable[[float], dict[str, Any]]]
"""A name, and a function of the seconds left that returns what to record; ``ok`` False marks a failure."""


def environment() -> dict[str, Any]:
    import torch

    import ffkernels

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    dirty = output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": sys.version.split()[0],
        "ffkernels": ffkernels.__version__,
        "commit": output("git", "rev-parse", "HEAD") + ("-dirty" if dirty else ""),
    }


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def load(path: Path, environment: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What an earlier run in the same environment recorded, or an empty record."""
    if path.exists() and not fresh:
        record = json.loads(path.read_text())
        if record.get("environment") == environment:
            return record
    return {"environment": environment, "items": {}}


def run_stage(items: list[Item], record: dict[str, Any], save: Callable[[], None], limit: float) -> int:
    """Runs what ``record`` does not hold or holds as failed. Returns the exit code."""
    begin = time.monotonic()
    for name, run in items:
        if record["items"].get(name, {}).get("ok"):
            continue
        left = limit - (time.monotonic() - begin)
        if left < min(RESERVE, limit):
            print(f"{name}: left for the next start")
            save()
            return 3
        start = time.monotonic()
        try:
            result = {"ok": True, **run(left)}
        except Exception as error:
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.monotonic() - start, 1)
        result["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record["items"][name] = result
        save()
        print(f"{name}: {'ok' if result['ok'] else 'FAILED'} {describe(result)}", flush=True)
    return 0 if all(record["items"][name]["ok"] for name, _ in items) else 1


def describe(result: dict[str, Any]) -> str:
    hidden = ("ok", "date", "output", "seconds")
    return ", ".join(f"{key} {value}" for key, value in result.items() if key not in hidden)


def summary(folder: Path) -> str:
    """The stages' records as one page."""
    lines = [
        "# Checks on a GPU",
        "",
        "Written by `scripts/gpu_check.sh`; the numbers are in the JSON files beside this page.",
    ]
    for stage in STAGES:
        path = folder / f"gpu_{stage}.json"
        lines += ["", f"## {stage}", ""]
        if not path.exists():
            lines.append("Not yet run on a GPU.")
            continue
        record = json.loads(path.read_text())
        where = record["environment"]
        lines += [
            f"{where['gpu']}, driver {' '.join(where['driver'])}, torch {where['torch']} (CUDA {where['cuda']}), "
            f"triton {where['triton']}, Python {where['python']}, commit {where['commit'][:12]}",
            "",
            "| item | result | details | date |",
            "|---|---|---|---|",
        ]
        for name, result in record["items"].items():
            details = describe(result).replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {'ok' if result['ok'] else 'FAILED'} | {details} | {result['date'][:10]} |")
    return "\n".join(lines) + "\n"


# ---- tests and sanitize


def pytest_counts(output: str) -> dict[str, Any]:
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    tail = next(
        (line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|skipped|error)", line)), ""
    )
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail):
        counts[word] = int(number)
    return counts


def run_pytest(arguments: list[str], left: float, prefix: list[str] | None = None) -> dict[str, Any]:
    command = [*(prefix or []), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=left)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"did not finish in {left:.0f} s; give the stage more with --limit"}
    counts = pytest_counts(result.stdout)
    good = result.returncode == 0 and counts["passed"] > 0
    extra = {} if good else {"returncode": result.returncode, "output": (result.stdout + result.stderr)[-4000:]}
    return {"ok": good, **{k: v for k, v in counts.items() if v}, **extra}


def test_items() -> Iterator[Item]:
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if re.search(r"backends\(|backend_dtypes\(|pytest\.mark\.gpu", path.read_text()):
            yield path.name, lambda left, path=path: run_pytest(["-m", "gpu and not slow", str(path)], left)
    yield "whole model, fused against plain", lambda left: compare_models()
    yield "detection in a CUDA graph", lambda left: capture_detection()


def compare_models() -> dict[str, Any]:
    """V2 with every kernel there is against plain PyTorch, in float32 without TF32."""
    import torch

    import featherface
    import ffkernels

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    worst = {}
    for name in ("featherface_v2", "featherface_v2_ultra", "featherface_v1"):
        model = featherface.create_model(name, fused="0").cuda().eval()
        x = torch.randn(2, 3, 320, 256, device="cuda") * 60
        with torch.no_grad():
            exact = [t.double() for t in model.double()(x.double())]
            plain = model.float()(x)
            fused = ffkernels.set_fused(model, "1")(x)
        for found, torch_found, truth in zip(fused, plain, exact):
            error, allowed = ((t - truth).abs().max().item() for t in (found, torch_found))
            if not error <= 4 * allowed + 1e-5 * truth.abs().max().item():
                raise AssertionError(f"{name}: off by {error:.3g}, PyTorch by {allowed:.3g}")
            worst[name] = max(worst.get(name, 0.0), error)
    return {f"largest error of {name}": f"{error:.2g}" for name, error in worst.items()}


def capture_detection() -> dict[str, Any]:
    """The raw detection op neither allocates outside the graph's pool nor synchronises."""
    import torch

    import ffkernels  # noqa: F401

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(16800, 4, generator=generator), torch.rand(16800, generator=generator)]
    tensors += [torch.randn(16800, 10, generator=generator), torch.rand(16800, 4, generator=generator)]
    bbox, scores, landmarks, priors = (t.cuda() for t in tensors)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.ops.ffkernels._detect(bbox, scores, landmarks, priors, 0.5, 0.4, 5000, 750, [0.1, 0.2], "cuda")

    expected = [t.clone() for t in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for _ in range(3):
        graph.replay()
    count = int(expected[3])
    if int(outputs[3]) != count or not all(
        torch.equal(a[:count], b[:count]) for a, b in zip(outputs[:3], expected[:3])
    ):
        raise AssertionError("the graph's results differ from the eager ones")
    return {"faces": count, "ms": round(milliseconds(graph.replay), 4)}


def sanitize_items() -> Iterator[Item]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise SystemExit("gpu_check: compute-sanitizer is not on PATH; it is part of the CUDA toolkit")
    for name in SANITIZERS:
        # PyTorch's own kernels are not initcheck's business here, and its allocator reuses memory.
        options = ["--kernel-name-exclude", "kernel_substring=at::"] if name == "initcheck" else []
        prefix = [tool, "--tool", name, "--error-exitcode", "9", "--launch-timeout", "0", *options]
        for op in SANITIZED:
            arguments = ["-k", "cuda and not opcheck and not compiles", str(ROOT / "tests" / f"test_{op}.py")]
            yield f"{name} {op}", lambda left, a=arguments, p=prefix: run_pytest(a, left, p)


# ---- ops and model


def milliseconds(run: Callable[[], object], budget_ms: float = 300) -> float:
    """Median of the device time of ``run``, by events around batches of calls."""
    import torch

    for _ in range(5):
        run()
    torch.cuda.synchronize()

    def timed(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    calls = max(1, int(budget_ms / 20 / max(timed(3), 1e-3)))
    return sorted(timed(calls) for _ in range(20))[10]


def in_graph(run: Callable[[], object]) -> Callable[[], object]:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> dict[str, Any]:
    import torch

    x = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return {"GB/s": round(2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6)}


def layer_table() -> list[tuple[str, str, Callable[..., Callable[[Any], object]]]]:
    """(op, layer, make(batch, dtype, device) -> (run(policy), elements of x, bytes that must move, FLOP))
    at 640x640."""
    import torch

    import ffkernels
    from ffkernels import BatchNorm, ConvParams

    def feature(batch, channels, size, dtype, device):
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def conv(out, per_group, k, dtype, device, groups=1, stride=1):
        return ConvParams(
            torch.randn(out, per_group, k, k, device=device, dtype=dtype) * 0.1, None, stride, k // 2, groups
        )

    def norm(channels, dtype, device):
        ones = torch.ones(channels, device=device, dtype=dtype)
        return BatchNorm(ones, ones * 0.1, ones * 0.2, ones * 1.5, False, 0.1, 1e-5)

    def shuffle(size):
        def make(batch, dtype, device):
            x = feature(batch, 32, size, dtype, device)
            return lambda policy: ffkernels.channel_shuffle(x, 4, policy=policy), x.numel(), 2 * x.nbytes, 0

        return make

    def separable(channels, out, size, stride):
        def make(batch, dtype, device):
            x = feature(batch, channels, size, dtype, device)
            depthwise = conv(channels, 1, 3, dtype, device, channels, stride)
            pointwise = conv(out, channels, 1, dtype, device)
            norms = norm(channels, dtype, device), norm(out, dtype, device)
            pixels = batch * (size // stride) ** 2
            moved = x.nbytes + pixels * out * x.element_size()

            def run(policy):
                return ffkernels.depthwise_separable(x, depthwise, norms[0], pointwise, norms[1], policy=policy)

            return run, x.numel(), moved, 2 * pixels * channels * (9 + out)

        return make

    def grouped(channels, out, size, groups):
        def make(batch, dtype, device):
            x = feature(batch, channels, size, dtype, device)
            params, bn = conv(out, channels // groups, 3, dtype, device, groups), norm(out, dtype, device)
            moved = x.nbytes * (channels + out) // channels
            run = lambda policy: ffkernels.grouped_conv_bn_act(x, params, bn, "relu", policy=policy)  # noqa: E731
            return run, x.numel(), moved, 2 * batch * size * size * out * channels // groups * 9

        return make

    def context(size):
        def make(batch, dtype, device):
            x = feature(batch, 32, size, dtype, device)
            widths = ((16, 8), (8, 8), (8, 2), (8, 2), (8, 2))
            convs = [conv(out, per_group, 3, dtype, device, 4) for out, per_group in widths]
            bns = [norm(out, dtype, device) for out, _ in widths]
            flops = sum(2 * batch * size * size * out * per_group * 9 for out, per_group in widths)
            run = lambda policy: ffkernels.ssh_grouped(x, convs, bns, 4, policy=policy)  # noqa: E731
            return run, x.numel(), 2 * x.nbytes, flops

        return make

    return [
        ("channel_shuffle", "32 channels, 80x80", shuffle(80)),
        ("grouped_conv_bn_act", "32 -> 16 in 4 groups, 80x80", grouped(32, 16, 80, 4)),
        ("depthwise_separable", "16 -> 32, 320x320, stride 2", separable(16, 32, 320, 2)),
        ("depthwise_separable", "64 -> 64, 80x80", separable(64, 64, 80, 1)),
        ("depthwise_separable", "128 -> 128, 40x40", separable(128, 128, 40, 1)),
        ("depthwise_separable", "256 -> 256, 20x20", separable(256, 256, 20, 1)),
        ("ssh_grouped", "32 channels, 80x80", context(80)),
    ]


def op_items() -> Iterator[Item]:
    import torch

    from ffkernels import Policy, registry

    yield "copy", lambda left: copy_bandwidth()
    for op, layer, make in layer_table():
        for batch in (1, 64):
            for dtype in (torch.float32, torch.float16):
                for backend in ("eager", "cuda", "triton"):
                    known = backend == "eager" or backend in registry.implementations(op)
                    if not known or (backend != "eager" and registry.backend_unavailable(backend, "cuda")):
                        continue
                    policy = Policy("0") if backend == "eager" else Policy("require", backend)

                    def measure(left, make=make, batch=batch, dtype=dtype, policy=policy):
                        run, elements, moved, flops = make(batch, dtype, "cuda")
                        with torch.no_grad():
                            graph = in_graph(lambda: run(policy))
                            ms = milliseconds(graph)
                        return {
                            "ms": round(ms, 5),
                            "elements": elements,
                            "GB/s": round(moved / ms / 1e6),
                            "TFLOP/s": round(flops / ms / 1e9, 2),
                        }

                    yield f"{op}, {layer}, batch {batch}, {str(dtype)[6:]}, {backend}", measure


def preference_table(record: dict[str, Any]) -> dict[str, Any]:
    """What ffkernels/measurements.json holds, from the record of the stage ops."""
    rows: dict[str, dict[str, Any]] = {}
    for name, result in record["items"].items():
        case, _, backend = name.rpartition(", ")
        if not result["ok"] or backend not in ("cuda", "triton"):
            continue
        op, dtype = case.split(", ")[0], case.split(", ")[-1]
        row = rows.setdefault(case, {"op": op, "dtype": dtype, "elements": result["elements"], "ms": {}})
        row["ms"][backend] = result["ms"]
    return {"measured": record["environment"], "rows": [row for row in rows.values() if len(row["ms"]) > 1]}


def model_items() -> Iterator[Item]:
    import torch

    for batch in (1, 8, 64):
        for variant in ("eager", "compile default", "compile reduce-overhead", "compile max-autotune", "fused"):
            for graph in (False, True):
                if graph and variant in ("compile reduce-overhead", "compile max-autotune"):
                    continue  # these capture graphs themselves
                name = f"V2 forward, batch {batch}, float16 channels_last, {variant}{', CUDA graph' if graph else ''}"
                yield name, lambda left, b=batch, v=variant, g=graph: time_forward(b, v, g)
    for variant in ("eager", "compile default", "compile max-autotune-no-cudagraphs", "fused"):
        yield f"V2 training step, batch 32, autocast channels_last, {variant}", lambda left, v=variant: time_training(v)

    def tensorrt(left: float) -> dict[str, Any]:
        try:
            import torch_tensorrt
        except ImportError:
            return {"result": "torch_tensorrt is not installed"}
        model, x = v2("eager").half(), torch.randn(1, 3, 640, 640, device="cuda").half()
        compiled = torch_tensorrt.compile(model, inputs=[x], enabled_precisions={torch.float16})
        return rate(milliseconds(lambda: compiled(x)), 1)

    yield "V2 forward, batch 1, TensorRT", tensorrt


def v2(variant: str) -> Any:
    import torch

    import featherface

    torch.manual_seed(0)
    model = featherface.create_model("featherface_v2", fused="1" if variant == "fused" else "0")
    return model.cuda().eval().to(memory_format=torch.channels_last)


def compiled(model: Any, variant: str) -> Any:
    import torch

    torch._dynamo.reset()
    return torch.compile(model, mode=variant.removeprefix("compile ")) if variant.startswith("compile") else model


def rate(ms: float, batch: int) -> dict[str, Any]:
    return {"ms": round(ms, 4), "images/s": round(1000 * batch / ms)}


def time_forward(batch: int, variant: str, graph: bool) -> dict[str, Any]:
    import torch

    model = compiled(v2(variant).half(), variant)
    x = (torch.randn(batch, 3, 640, 640, device="cuda") * 60).half().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        run = lambda: model(x)  # noqa: E731
        return rate(milliseconds(in_graph(run) if graph else run, budget_ms=1500), batch)


def time_training(variant: str) -> dict[str, Any]:
    import torch

    model = v2(variant).train()
    forward = compiled(model, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x = (torch.randn(32, 3, 640, 640, device="cuda") * 60).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16):
            outputs = forward(x)
            loss = sum(t.float().square().mean() for t in outputs)
        loss.backward()
        optimizer.step()

    step()
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(step, budget_ms=4000)
    return {**rate(ms, 32), "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


ITEMS = {"tests": test_items, "sanitize": sanitize_items, "ops": op_items, "model": model_items}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs recorded")
    parser.add_argument("--limit", type=float, default=570, help="seconds; what is left goes on at the next start")
    parser.add_argument(
        "--table", action="store_true", help="stage ops: then write ffkernels/measurements.json, by which ops choose"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        sys.exit("gpu_check: PyTorch is not installed")
    if not torch.cuda.is_available():
        sys.exit("gpu_check: PyTorch finds no CUDA device; run this on a machine with an NVIDIA GPU")
    where = environment()
    path = options.out / f"gpu_{options.stage}.json"
    record = load(path, where, options.fresh)

    def save() -> None:
        write(path, json.dumps(record, indent=1) + "\n")
        write(options.out / "gpu_summary.md", summary(options.out))

    code = run_stage(list(ITEMS[options.stage]()), record, save, options.limit)
    if options.table and options.stage == "ops" and code == 0:
        table = preference_table(record)
        write(ROOT / "ffkernels" / "measurements.json", json.dumps(table, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
