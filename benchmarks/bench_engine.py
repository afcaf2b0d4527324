"""The CPU engine beside other runtimes, all in turn, after a check that their outputs are the same.

    python benchmarks/bench_engine.py --model featherface_v2 --threads 1 2 --seconds 10 --output results/engine.json

Prints a Markdown table of medians and percentiles and what the machine can do: products of a loop that does nothing
else, PyTorch's matrix product, copies. With --steps also the engine's plan with the time of every step and its share of
the peak, with --faces the time from a frame of bytes to faces beside the network's own, with --start how long the first
results take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featherface
from featherface.benchmark import Missing, Results, Setup, Timing, Unavailable, interleave, prepare
from featherface.files import atomic_write
from ffkernels import engine

ENGINES = {"engine": "float32", "engine bf16": "bfloat16"}
NAMES = [*ENGINES, "eager", "channels_last", "torch.compile", "torch.compile frozen", "onnxruntime", "openvino"]
NAMES += ["openvino bf16", "ncnn"]
FACES = 20
START = """
import time, torch
torch.set_num_threads({threads})
start = time.perf_counter()
import featherface
from ffkernels import engine
model = featherface.create_model("{model}").eval()
engine.build(model, {shape})(torch.zeros({shape}))
print(1e3 * (time.perf_counter() - start))
"""


def peaks(threads: int) -> dict[str, float]:
    """GFLOP/s of loops of products and of a 1024 matrix product, and GB/s, read and written, of copies."""
    a = torch.randn(1024, 1024)

    def best(run: Callable[[], Any], work: float, repeats: int) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            times.append((time.perf_counter() - start) / repeats)
        return work / min(times) / 1e9

    found: dict[str, float] = {"threads": threads}
    for dtype in ENGINES.values():
        speeds = [engine.peak(dtype, threads) for _ in range(5)]
        if None not in speeds:
            found[f"{dtype} GFLOP/s"] = max(speeds)
    found["matmul GFLOP/s"] = best(lambda: a @ a, 2 * 1024**3, 3)
    for name, size, repeats in (("L2 copy GB/s", 2**16, 200), ("memory copy GB/s", 2**26, 1)):
        x, y = torch.zeros(size), torch.zeros(size)
        found[name] = best(lambda x=x, y=y: y.copy_(x), 8 * size, repeats)
    return found


def measure_network(arguments: argparse.Namespace, results: Results, threads: int, height: int, width: int) -> None:
    model = featherface.create_model(arguments.model).eval()
    setup = Setup(model, "cpu", threads)
    x = setup.input(arguments.batch, max(height, width))[..., :height, :width].contiguous()
    case = f"{threads} threads"
    runs, differences = {}, {}
    for name in arguments.names:
        try:
            runs[name], differences[name] = prepare(name, setup, x)
        except Unavailable as error:
            results.missing.append(Missing(case, name, str(error)))
            print(f"{case}: no {name}: {error}", flush=True)
    timings = interleave(case, runs, arguments.seconds)
    for timing in timings:
        timing.difference = differences[timing.contender]
    results.timings += timings
    own = {t.contender: t.median_ms for t in timings if t.contender in ENGINES}
    fastest = min((t.median_ms for t in timings if t.contender not in ENGINES), default=None)
    print(f"\n| {arguments.model}, {case} | ms | p10 | p90 |" + "".join(f" {e} is faster by |" for e in own))
    print("|---" * (4 + len(own)) + "|")
    for t in timings:
        name = t.contender + (" (fastest peer)" if t.median_ms == fastest else "")
        ratios = "".join(f" {t.median_ms / ms:.2f} |" for ms in own.values())
        print(f"| {name} | {t.median_ms:.2f} | {t.p10_ms:.2f} | {t.p90_ms:.2f} |{ratios}")
    found = peaks(threads)
    results.protocol["peaks"].append(found)
    print({name: round(value, 1) for name, value in found.items()}, flush=True)
    for name in own:
        built = engine.build(model, tuple(x.shape), ENGINES[name], threads=threads)
        peak = found[f"{ENGINES[name]} GFLOP/s"]
        built.profile(x, 3)
        plan = built.profile(x, 50, peak)
        achieved = plan.splitlines()[-1]
        results.protocol["steps"].append(f"{name}, {case}: {achieved.strip()}")
        print(plan if arguments.steps else f"{name}: {achieved.strip()}", flush=True)


def measure_faces(arguments: argparse.Namespace, results: Results, threads: int) -> None:
    """A decoded frame of 1280x720 to faces, at full size. Its pixels are random, so the threshold is the one that makes
    faces of the best-scored places."""
    frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    for name, dtype in ENGINES.items():
        if name not in arguments.names or engine.peak(dtype) is None:
            continue
        detector = featherface.FaceDetector(
            arguments.model, device="cpu", threads=threads, dtype=dtype, score_threshold=0.0, keep_top_k=FACES + 1
        )
        scores = detector.detect(frame).scores
        detector.score_threshold = float(scores[FACES - 1] + scores[FACES]) / 2
        if len(detector.detect(frame)) != FACES:
            raise RuntimeError(f"{len(detector.detect(frame))} faces instead of {FACES}")
        network = engine.build(detector.model, (736, 1280, 3), dtype, threads, "uint8_hwc", order="rgb")
        runs = {
            f"{name}, image in, faces out": lambda detector=detector: detector.detect(frame),
            f"{name}, network": lambda network=network: network(torch.from_numpy(frame), canvas=(736, 1280)),
        }
        timings = interleave(f"{threads} threads, frame of 1280x720, {FACES} faces", runs, arguments.seconds / 2)
        results.timings += timings
        whole, alone = (t.median_ms for t in timings)
        print(
            f"{name}, {threads} threads, 1280x720: image in, faces out {whole:.2f} ms ({1000 / whole:.1f} frames/s), "
            f"{whole / alone:.3f} of the network's own {alone:.2f} ms",
            flush=True,
        )


def measure_start(arguments: argparse.Namespace, results: Results, threads: int) -> None:
    """From the import of this package, torch being imported, to the first result; a new size in a built engine."""
    code = START.format(threads=threads, model=arguments.model, shape=(1, 3, 640, 640))
    first = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
             for _ in range(7)]  # fmt: skip
    built = engine.build(featherface.create_model(arguments.model).eval(), (1, 3, 64, 64), threads=threads)
    plans = []
    for side in range(608, 672, 8):
        start = time.perf_counter()
        built.prepare((1, 3, side, side + 32))
        plans.append(1e3 * (time.perf_counter() - start))
    for name, values in (("import to first result", first[1:]), ("plan for a new size", plans)):
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        case = f"start, {threads} threads"
        results.timings.append(Timing(case, name, statistics.median(values), deciles[0], deciles[-1], len(values)))
        print(f"{case}: {name} {statistics.median(values):.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="featherface_v2", choices=featherface.list_models())
    parser.add_argument("--size", default="640", metavar="HxW", help="320 or 720x1280")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--names", nargs="*", default=NAMES)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the rounds of one number of threads")
    parser.add_argument("--steps", action="store_true", help="print the engine's plan with times")
    parser.add_argument("--faces", action="store_true", help="also from a frame to faces (a model with weights)")
    parser.add_argument("--start", action="store_true", help="also the time to the first result")
    parser.add_argument("--only", action="store_true", help="no networks: --faces or --start alone")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()

    sides = [int(side) for side in arguments.size.split("x")]
    torch.manual_seed(0)
    protocol = {"model": arguments.model, "size": arguments.size, "batch": arguments.batch, "peaks": [], "steps": []}
    results = Results(protocol)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with torch.no_grad():
            if not arguments.only:
                measure_network(arguments, results, threads, sides[0], sides[-1])
            if arguments.faces:
                measure_faces(arguments, results, threads)
            if arguments.start:
                measure_start(arguments, results, threads)
    if arguments.output:
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(json.dumps(results.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
