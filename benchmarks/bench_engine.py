"""The CPU engine beside other runtimes, all in turn, after a check that their outputs are the same.

    python benchmarks/bench_engine.py --model featherface_v2 --threads 1 2 --seconds 10 --output results/engine.json

Prints a Markdown table of medians and percentiles, what the machine can do (PyTorch's matrix product and copies)
and, with --steps, the engine's plan with the time and rate of every step.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch

import featherface
from featherface.benchmark import Results, Run, Setup, Unavailable, contenders, interleave, prepare
from featherface.files import atomic_write
from ffkernels import engine

NAMES = ["engine", "engine bf16", "eager", "channels_last", "torch.compile", "onnxruntime", "openvino"]
NAMES += ["openvino bf16", "ncnn"]


ENGINES = {"engine": "float32", "engine bf16": "bfloat16"}


def frozen(setup: Setup, x: torch.Tensor) -> Run:
    """torch.compile with the weights as constants."""
    from torch._inductor import config

    x = x.contiguous(memory_format=torch.channels_last)
    with config.patch(freezing=True), torch.no_grad():
        model = torch.compile(copy.deepcopy(setup.model).to(memory_format=torch.channels_last), dynamic=False)
        model(x)
    return lambda: model(x)


def peaks(threads: int) -> dict[str, float]:
    """GFLOP/s of a 1024 matrix product and GB/s, read and written, of copies of 256 KB and 256 MB."""
    a = torch.randn(1024, 1024)

    def best(run: Run, work: float, repeats: int) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            times.append((time.perf_counter() - start) / repeats)
        return work / min(times) / 1e9

    found = {"matmul GFLOP/s": best(lambda: a @ a, 2 * 1024**3, 3)}
    for name, size, repeats in (("L2 copy GB/s", 2**16, 200), ("memory copy GB/s", 2**26, 1)):
        x, y = torch.zeros(size), torch.zeros(size)
        found[name] = best(lambda x=x, y=y: y.copy_(x), 8 * size, repeats)
    return {"threads": threads} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="featherface_v2", choices=featherface.list_models())
    parser.add_argument("--size", default="640", metavar="HxW", help="320 or 720x1280")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--names", nargs="+", default=[*NAMES, "torch.compile frozen"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for the rounds of one number of threads")
    parser.add_argument("--steps", action="store_true", help="print the engine's plan with times")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()

    sides = [int(side) for side in arguments.size.split("x")]
    height, width = sides[0], sides[-1]
    torch.manual_seed(0)
    model = featherface.create_model(arguments.model).eval()
    results = Results({"model": arguments.model, "size": arguments.size, "batch": arguments.batch, "peaks": []})
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        setup = Setup(model, "cpu", threads)
        x = setup.input(arguments.batch, max(height, width))[..., :height, :width].contiguous()
        case = f"{threads} threads"
        runs = {}
        with torch.no_grad():
            for name in arguments.names:
                try:
                    runs[name] = prepare(name, setup, x)[0] if name in contenders() else frozen(setup, x)
                except Unavailable as error:
                    print(f"{case}: no {name}: {error}", flush=True)
            timings = interleave(case, runs, arguments.seconds, setup.device)
        results.timings += timings
        results.protocol["peaks"].append(peaks(threads))
        own = {t.contender: t.median_ms for t in timings if t.contender in ENGINES}
        fastest = min((t.median_ms for t in timings if t.contender not in ENGINES), default=None)
        print(f"\n| {arguments.model}, {case} | ms | p10 | p90 |" + "".join(f" {e} is faster by |" for e in own))
        print("|---" * (4 + len(own)) + "|")
        for t in timings:
            name = t.contender + (" (fastest peer)" if t.median_ms == fastest else "")
            ratios = "".join(f" {t.median_ms / ms:.2f} |" for ms in own.values())
            print(f"| {name} | {t.median_ms:.2f} | {t.p10_ms:.2f} | {t.p90_ms:.2f} |{ratios}")
        print(results.protocol["peaks"][-1], flush=True)
        if arguments.steps:
            for name in own:
                built = engine.build(model, tuple(x.shape), ENGINES[name], threads=threads)
                built.profile(x)
                print(built.profile(x, 50))
    if arguments.output:
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(json.dumps(results.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
