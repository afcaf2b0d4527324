"""Checks and measurements that need a GPU, in stages: tests, sanitize, ops, model.

A stage is a list of items. Each finished item is written to ``benchmarks/results/gpu_<stage>.json`` at once, so that a
stage can be stopped and started again; items of another commit, GPU or PyTorch are done anew. Items run in processes of
their own: one that hangs or breaks the CUDA context fails alone. ``gpu_summary.md`` beside it is rewritten from all
stages. The exit code is 0 when every item is done and none failed, 3 when the time limit left items for the next start,
1 otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import select
import shutil
import signal
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
SANITIZED = {
    "cuda_tensor_cores": 2,
    "batch_norm_gpu": 2,
    "conv_chain_gpu": 4,
    "ssh_and_heads_gpu": 2,
    "cbam_gpu": 2,
    "bifpn_node_gpu": 2,
    "deform_conv2d_gpu": 2,
    "detection_gpu": 2,
    "preprocess_gpu": 2,
    "crop_resize_gpu": 1,
    "channel_shuffle": 4,
}
"""Every how many tests of an op one runs under each sanitizer, which makes a test ten to a hundred times slower."""
ONE_BACKEND = {
    "test_cuda_tensor_cores": "cuda",
    "test_detection_gpu": "cuda",
    "test_preprocess_gpu": "cuda",
    "test_crop_resize_gpu": "cuda",
    "test_triton_separable": "triton",
}
"""Files of which only one backend has tests."""
THEIRS = ("at::", "_ZN2at", "cudnn", "cublas", "cutlass", "gemm", "nchw", "nhwc")
"""Parts of the names, mangled or not, of kernels that are PyTorch's and its libraries' own."""
RESERVE = 45
"""Seconds an item is given at least; with less than that left, the stage stops."""
WHOLE = 0.9
"""Of the limit: an item that did not finish in that much fails, one that had less waits for the next start."""

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
        if left < min(RESERVE, limit / 2):
            print(f"{name}: left for the next start")
            save()
            return 3
        start = time.monotonic()
        try:
            result = {"ok": True, **run(left)}
        except subprocess.TimeoutExpired:
            if left < WHOLE * limit:
                print(f"{name}: did not finish in {left:.0f} s, left for the next start")
                save()
                return 3
            result = {"ok": False, "error": f"did not finish in {left:.0f} s; give the stage more with --limit"}
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
        lines += ["", *targets(stage, record["items"])]
    return "\n".join(lines).rstrip() + "\n"


def targets(stage: str, items: dict[str, Any]) -> list[str]:
    """What the measurements say about the goals, a line each; nothing where one is missing."""

    def values(key: str, *parts: str, without: str = "\0") -> list[float]:
        return [
            r[key] for n, r in items.items() if r["ok"] and key in r and without not in n and all(p in n for p in parts)
        ]

    lines = []
    if stage == "ops" and (copied := values("GB/s", "copy")):
        for name, result in items.items():
            if ", batch 64, " in name and name.endswith((", cuda", ", triton")) and result["ok"]:
                lines.append(f"- {name}: {100 * result['GB/s'] / copied[0]:.0f} % of the copy")
    if stage == "model":
        one, many, train = "forward, batch 1, ", "forward, batch 64, ", "training step, batch 32, "
        fused, compiled = values("ms", one, "fused", "CUDA graph"), values("ms", one, "compile")
        if fused and compiled:
            lines.append(
                f"- forward, batch 1, in a CUDA graph: {fused[0] / min(compiled):.2f} of the best torch.compile"
            )
        fused, compiled = values("ms", many, "fused"), values("ms", many, "compile")
        if fused and compiled:
            best = min(fused)
            lines.append(
                f"- forward, batch 64: {min(compiled) / best:.2f}x the best torch.compile, {64e3 / best:.0f} images/s"
            )
        fused, compiled, eager = (values("ms", train, v) for v in ("fused", "compile", "eager"))
        if fused and compiled and eager:
            best = min(fused)
            lines.append(
                f"- training step: {min(eager) / best:.2f}x eager, {min(compiled) / best:.2f}x the best torch.compile"
            )
        fused, eager = (values("peak GiB", train, v, without="CUDA graph") for v in ("fused", "eager"))
        if fused and eager:
            lines.append(f"- training step: {fused[0] / eager[0]:.2f} of eager's peak memory")
    return lines


# ---- tests and sanitize


def pytest_counts(output: str) -> dict[str, Any]:
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    tail = next(
        (line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|skipped|error)", line)), ""
    )
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail):
        counts[word] = int(number)
    return counts


def run_bounded(command: list[str], left: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command; after ``left`` seconds its whole process group is killed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def run_pytest(
    arguments: list[str], left: float, prefix: list[str] | None = None, **environment: str
) -> dict[str, Any]:
    command = [*(prefix or []), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = run_bounded(command, left, **environment)
    counts = pytest_counts(result.stdout)
    good = result.returncode == 0 and counts["passed"] > 0
    extra = {} if good else {"returncode": result.returncode, "output": result.stdout[-4000:]}
    return {"ok": good, **{k: v for k, v in counts.items() if v}, **extra}


class Worker:
    """A process that runs items of one stage, one after the other; a failure ends it, the next item starts another."""

    def __init__(self, stage: str) -> None:
        self.command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage, "--worker"]
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str, left: float) -> dict[str, Any]:
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, start_new_session=True
            )
        self.process.stdin.write(json.dumps([name, left]) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], left)
        if not ready:
            self.stop()
            raise subprocess.TimeoutExpired(self.command, left)
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.process = None
            raise RuntimeError(f"the process ended with code {code}")
        result = json.loads(line)
        if not result["ok"]:
            self.stop()
        return result

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def serve(items: list[Item]) -> None:
    """The other end of :class:`Worker`; what items print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    by_name = dict(items)
    for line in sys.stdin:
        name, left = json.loads(line)
        try:
            result = {"ok": True, **by_name[name](left)}
        except Exception as error:
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(result), file=answers, flush=True)


def test_items() -> Iterator[Item]:
    from ffkernels import registry

    for backend in ("cuda", "triton"):
        if reason := registry.backend_unavailable(backend, "cuda"):
            if backend == "cuda":
                raise SystemExit(f"gpu_check: the CUDA kernels do not run here: {reason}")
            print(f"no tests of {backend}: {reason}", file=sys.stderr)
            continue
        if importlib.util.find_spec("xdist") is not None:
            arguments = ["-n", str(min(8, os.cpu_count() or 1)), "-m", "gpu", "-k", backend, str(ROOT / "tests")]
            yield f"tests, {backend}", lambda left, a=arguments: run_pytest(a, left)
            continue
        # One process has minutes of work with some files: Triton compiles hundreds of kernels for one.
        for path in sorted((ROOT / "tests").glob("test_*.py")):
            if path.stem in ONE_BACKEND and ONE_BACKEND[path.stem] != backend:
                continue
            if re.search(r"\bbackends\(|backend_dtypes\(|pytest\.mark\.gpu", path.read_text()):
                arguments = ["-m", "gpu", "-k", backend, str(path)]
                yield f"{path.name}, {backend}", lambda left, a=arguments: run_pytest(a, left)
    yield "whole model, fused against plain", lambda left: compare_models()
    yield "whole model in a CUDA graph", lambda left: capture_models()
    yield "training step in a CUDA graph", lambda left: capture_training()
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


def gpu_backends() -> list[str]:
    from ffkernels import registry

    return [name for name in ("cuda", "triton") if registry.backend_unavailable(name, "cuda") is None]


def capture_models() -> dict[str, Any]:
    """A graph of a model's forward pass gives what the pass itself gives, for images that come after the capture, and
    the pass does not wait for the device."""
    import torch

    import featherface
    import ffkernels

    milliseconds_of = {}
    for name, backend, dtype in [
        (name, backend, dtype)
        for name in ("featherface_v2", "featherface_v2_ultra")
        for backend in gpu_backends()
        for dtype in (torch.float32, torch.float16)
    ]:
        torch.manual_seed(0)
        model = featherface.create_model(name, fused="0").cuda().eval().to(dtype)
        ffkernels.set_fused(model, "require", backend)
        images = [(torch.randn(2, 3, 320, 256, device="cuda") * 60).to(dtype) for _ in range(2)]
        x = images[0].clone()
        with torch.no_grad():
            expected = [[t.clone() for t in model(image)] for image in images]
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            outputs: list[torch.Tensor] = []
            graph = in_graph(lambda model=model, x=x: model(x), outputs)
        for image, wanted in zip(images, expected):
            x.copy_(image)
            graph()
            if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(outputs, wanted)):
                raise AssertionError(f"{name}, {backend}, {dtype}: the graph's results differ from the eager ones")
        milliseconds_of[f"ms of {name}, {backend}, {str(dtype)[6:]}"] = round(milliseconds(graph), 4)
    return milliseconds_of


def capture_training() -> dict[str, Any]:
    """The gradients of a graph of V2's training step are those of the step itself."""
    import torch

    for backend in gpu_backends():
        model = v2("fused", backend).train()
        parameters = list(model.parameters())
        x = (torch.randn(4, 3, 160, 128, device="cuda") * 60).contiguous(memory_format=torch.channels_last)

        def step(model=model, x=x, parameters=parameters) -> tuple[torch.Tensor, ...]:
            loss = sum(t.float().square().mean() for t in model(x))
            return torch.autograd.grad(loss, parameters)

        expected = [g.clone() for g in step()]
        outputs: list[torch.Tensor] = []
        graph = in_graph(step, outputs)
        graph()
        if not all(torch.equal(a, b) for a, b in zip(outputs, expected)):
            raise AssertionError(f"{backend}: the graph's gradients differ from the eager ones")
    return {}


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
        prefix = [tool, "--tool", name, "--error-exitcode", "9", "--launch-timeout", "0"]
        if name != "initcheck":  # which must see what others write
            for part in THEIRS:
                prefix += ["--kernel-name-exclude", f"kernel_substring={part}"]
        for op, every in SANITIZED.items():
            tests = ["-m", "gpu and not slow", "-k", "cuda and not opcheck and not compile", "--every", str(every)]
            arguments = [*tests, str(ROOT / "tests" / f"test_{op}.py")]
            # Each tensor an allocation of its own: in PyTorch's pools neighbours would hide what is out of bounds.
            yield (
                f"{name} {op}",
                lambda left, a=arguments, p=prefix: run_pytest(a, left, p, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
            )


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


def in_graph(run: Callable[[], Any], outputs: list[Any] | None = None) -> Callable[[], object]:
    """A replay of ``run`` in a CUDA graph; ``outputs`` receives what it returned."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    if outputs is not None:
        outputs.extend(result)
    return graph.replay


def copy_bandwidth() -> dict[str, Any]:
    import torch

    x = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return {"GB/s": round(2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6)}


def layer_table() -> dict[str, tuple[Any, tuple, dict, float]]:
    """Name -> (module, arguments, keyword arguments, FLOP) of fused layers at 640x640, batch 1, on the CPU: all of V2,
    those of the teachers at 80x80; of equal ones the first."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import featherface

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from op_table import layers, tensors

    table, seen = {}, set()
    for model_name in ("featherface_v2", "featherface_v1_ssh", "featherface_v1"):
        model = featherface.create_model(model_name, fused="0").eval()
        with torch.no_grad():
            for name, (module, args, kwargs) in layers(model, torch.randn(1, 3, 640, 640)).items():
                weights = tuple(tuple(p.shape) for p in module.parameters())
                signature = module.ff_op, tuple(tuple(t.shape) for t in tensors(args)), weights
                other = model_name != "featherface_v2" and tensors(args)[0].shape[3] != 80
                if signature in seen or other:
                    continue
                seen.add(signature)
                with FlopCounterMode(display=False) as counter:
                    module(*args, **kwargs)
                table[f"{module.ff_op}, {model_name[12:]} {name}"] = module, args, kwargs, counter.get_total_flops()
    return table


def make_layer(entry: tuple[Any, tuple, dict, float], batch: int, dtype: Any, device: str) -> tuple[Any, ...]:
    """(run(policy), elements of the first argument, bytes that must move, FLOP) of a layer of the table."""
    import copy

    import torch
    from op_table import tensors

    import ffkernels

    module, args, kwargs, flops = entry
    module = copy.deepcopy(module).to(device, dtype)

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            x = torch.randn(batch, *value.shape[1:], device=device, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last)
        return type(value)(convert(v) for v in value) if isinstance(value, (tuple, list)) else value

    args = convert(args)
    weights = sum(p.nbytes for p in module.parameters())

    def run(policy: Any) -> Any:
        ffkernels.set_fused(module, *policy)
        return module(*args, **kwargs)

    with torch.no_grad():
        moved = weights + sum(t.nbytes for t in [*tensors(args), *tensors(run(ffkernels.Policy("0")))])
    return run, tensors(args)[0].numel(), moved, batch * flops


def op_items() -> Iterator[Item]:
    import torch

    from ffkernels import Policy, registry

    yield "copy", lambda left: copy_bandwidth()
    table = layer_table()
    for layer, entry in table.items():
        served = registry.implementations(layer.split(", ")[0])
        for batch, dtype in ((1, torch.float16), (64, torch.float16), (64, torch.float32)):
            for backend in ("eager", "cuda", "triton"):
                if backend != "eager" and (backend not in served or registry.backend_unavailable(backend, "cuda")):
                    continue
                policy = Policy("0") if backend == "eager" else Policy("require", backend)

                def measure(left, entry=entry, batch=batch, dtype=dtype, policy=policy):
                    run, elements, moved, flops = make_layer(entry, batch, dtype, "cuda")
                    with torch.no_grad():
                        ms = milliseconds(in_graph(lambda: run(policy)))
                    return {
                        "ms": round(ms, 5),
                        "elements": elements,
                        "GB/s": round(moved / ms / 1e6),
                        "TFLOP/s": round(flops / ms / 1e9, 2),
                    }

                yield f"{layer}, batch {batch}, {str(dtype)[6:]}, {backend}", measure


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


FORWARD = ("eager", "fused", "eager autocast", "compile default", "compile reduce-overhead", "compile max-autotune")
TRAINING = ("eager", "fused", "compile default", "compile reduce-overhead", "compile max-autotune-no-cudagraphs")
CAPTURE_THEMSELVES = ("compile reduce-overhead", "compile max-autotune")


def model_items() -> Iterator[Item]:
    # What compiles for minutes comes last.
    for variant in FORWARD:
        for batch in (1, 8, 64):
            for graph in (False, True) if variant not in CAPTURE_THEMSELVES else (False,):
                name = f"V2 forward, batch {batch}, float16 channels_last, {variant}{', CUDA graph' if graph else ''}"
                yield name, lambda left, b=batch, v=variant, g=graph: time_forward(b, v, g)
    for variant in TRAINING:
        for graph in (False, True) if variant not in CAPTURE_THEMSELVES else (False,):
            name = f"V2 training step, batch 32, autocast channels_last, {variant}{', CUDA graph' if graph else ''}"
            yield name, lambda left, v=variant, g=graph: time_training(v, g)
    for batch in (1, 8, 64):
        yield f"V2 forward, batch {batch}, float16, TensorRT", lambda left, b=batch: time_tensorrt(b)


def v2(variant: str, backend: str | None = None) -> Any:
    import torch

    import featherface
    import ffkernels

    torch.manual_seed(0)
    model = featherface.create_model("featherface_v2", fused="0")
    if variant == "fused":
        ffkernels.set_fused(model, "require" if backend else "1", backend)
    return model.cuda().eval().to(memory_format=torch.channels_last)


def compiled(model: Any, variant: str) -> Any:
    import torch

    torch._dynamo.reset()
    return torch.compile(model, mode=variant.removeprefix("compile ")) if variant.startswith("compile") else model


def rate(ms: float, batch: int) -> dict[str, Any]:
    return {"ms": round(ms, 4), "images/s": round(1000 * batch / ms)}


def time_forward(batch: int, variant: str, graph: bool) -> dict[str, Any]:
    import torch

    autocast = variant == "eager autocast"
    model = v2(variant)
    model = compiled(model if autocast else model.half(), variant)
    x = (torch.randn(batch, 3, 640, 640, device="cuda") * 60).contiguous(memory_format=torch.channels_last)
    x = x if autocast else x.half()

    def run() -> Any:
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            return model(x)

    with torch.no_grad():
        return rate(milliseconds(in_graph(run) if graph else run, budget_ms=600), batch)


def time_training(variant: str, graph: bool) -> dict[str, Any]:
    """Forward, a sum of squares as loss, backward and SGD; in a graph the gradients keep their place."""
    import torch

    model = v2(variant).train()
    forward = compiled(model, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x = (torch.randn(32, 3, 640, 640, device="cuda") * 60).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad(set_to_none=not graph)
        with torch.autocast("cuda", torch.float16):
            outputs = forward(x)
            loss = sum(t.float().square().mean() for t in outputs)
        loss.backward()
        optimizer.step()

    step()
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(in_graph(step) if graph else step, budget_ms=1500)
    return {**rate(ms, 32), "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def time_tensorrt(batch: int) -> dict[str, Any]:
    import torch

    try:
        import torch_tensorrt
    except ImportError:
        return {"result": "torch_tensorrt is not installed"}
    model, x = v2("eager").half(), torch.randn(batch, 3, 640, 640, device="cuda").half()
    with torch.no_grad():
        engine = torch_tensorrt.compile(model, inputs=[x], enabled_precisions={torch.float16})
        return rate(milliseconds(lambda: engine(x), budget_ms=600), batch)


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
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        sys.exit("gpu_check: PyTorch is not installed")
    if not torch.cuda.is_available():
        sys.exit("gpu_check: PyTorch finds no CUDA device; run this on a machine with an NVIDIA GPU")
    if options.worker:
        serve(list(ITEMS[options.stage]()))
        return 0
    where = environment()
    path = options.out / f"gpu_{options.stage}.json"
    record = load(path, where, options.fresh)

    def save() -> None:
        write(path, json.dumps(record, indent=1) + "\n")
        write(options.out / "gpu_summary.md", summary(options.out))

    worker = Worker(options.stage)
    items = []
    for name, run in ITEMS[options.stage]():
        alone = options.stage == "sanitize" or name.startswith("test_")  # a process of its own already
        items.append((name, run if alone else lambda left, name=name: worker.run(name, left)))
    try:
        code = run_stage(items, record, save, options.limit)
    finally:
        worker.stop()
    if options.table and options.stage == "ops" and code == 0:
        table = preference_table(record)
        write(ROOT / "ffkernels" / "measurements.json", json.dumps(table, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
