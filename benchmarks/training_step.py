"""Time and memory of one training step of a model: eager, channels_last, torch.compile, and FF_USE_FUSED=1.

    python benchmarks/training_step.py --model featherface_v2 --batch 8 --size 320 --threads 1 2 --output steps.json

A step is forward, loss (the sum of the mean squares of the three outputs), backward and AdamW(foreach=True); with
``--evaluation``, it is the forward pass in evaluation mode. ``--append`` adds the run to those that the output holds.
``engine``, in evaluation, is the inference engine, in which a training step runs its teacher. ``grid_sample`` is eager
with the deformable convolutions of V1 written with torch.nn.functional.grid_sample, for models that have them.

Variants run in one process and take turns: in every round each makes two steps, of which the second is timed. The
medians are printed with their ratios to eager, and those of the step's parts: forward pass and loss, backward pass,
optimiser. Memory is the peak resident size of a fresh process after its third
step, less its size before the first. A variant whose fresh process dies (the backward graph that PyTorch 2.13's
inductor makes of the NCHW model crashes) is reported, and left out.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import featherface
import ffkernels
from featherface.files import atomic_write
from ffkernels.info import info
from ffkernels.reference.layers import activate, batch_norm

VARIANTS = (
    "eager",
    "channels_last",
    "compile",
    "compile_channels_last",
    "grid_sample",
    "grid_sample_channels_last",
    "fused",
    "fused_channels_last",
    "engine",
)


def grid_sample_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    conv: ffkernels.ConvParams,
    bn: ffkernels.BatchNorm | None,
    activation: str = "none",
    negative_slope: float = 0.1,
) -> Tensor:
    """ffkernels.reference.deform_conv2d written with torch.nn.functional.grid_sample: all taps in one call."""
    height, width = x.shape[2:]
    kh, kw = conv.weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    offset = offset.unflatten(1, (kh * kw, 2))
    taps = torch.arange(kh * kw)
    rows = torch.arange(out_h) * conv.stride - conv.padding + taps.div(kw, rounding_mode="floor")[:, None]
    columns = torch.arange(out_w) * conv.stride - conv.padding + taps.remainder(kw)[:, None]
    y = offset[:, :, 0] + rows[:, :, None]
    x_places = offset[:, :, 1] + columns[:, None, :]
    # Pixel p is at (2 p + 1) / n - 1 with align_corners=False.
    grid = torch.stack(((2 * x_places + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    samples = F.grid_sample(x, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
    samples = samples.unflatten(2, (kh * kw, out_h)) * mask[:, None]
    columns = samples.flatten(1, 2)  # (B, C * K, H', W')
    out = F.conv2d(columns, conv.weight.flatten(1)[:, :, None, None], conv.bias)
    return activate(batch_norm(out, bn), activation, negative_slope)


def with_grid_sample(model: nn.Module) -> Callable[..., object]:
    """``model`` with :func:`grid_sample_deform_conv2d` in place of the package's own definition."""
    op = importlib.import_module("ffkernels.ops.deform_conv2d")

    def call(x: Tensor) -> object:
        with mock.patch.object(op, "reference", grid_sample_deform_conv2d):
            return model(x)

    return call


def build(variant: str, name: str, batch: int, size: int) -> tuple[nn.Module, Callable[..., object], Tensor]:
    """The model in training mode, what to call in its place, and an input."""
    torch.manual_seed(0)
    fused = variant.startswith("fused")
    model = featherface.create_model(name, fused="1" if fused else "0").train()
    x = torch.randn(batch, 3, size, size) * 50
    if variant.endswith("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
        if not fused:
            model = model.to(memory_format=torch.channels_last)
    if variant.startswith("grid_sample"):
        return model, with_grid_sample(model), x
    return model, torch.compile(model) if variant.startswith("compile") else model, x


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    return sum(output.square().mean() for output in outputs)


PARTS = ("forward", "backward", "optimizer")


def make_step(
    variant: str, name: str, batch: int, size: int, evaluation: bool = False
) -> Callable[[], tuple[object, list[float]]]:
    """A function that makes one step and returns its loss, or that evaluates the model and returns its outputs; and
    what its parts took, in ms."""
    model, call, x = build(variant, name, batch, size)
    if evaluation:
        model.eval()
        if variant == "engine":
            call = ffkernels.engine.build(model, tuple(x.shape))

        @torch.no_grad()
        def evaluate() -> tuple[object, list[float]]:
            start = time.perf_counter()
            return call(x), [(time.perf_counter() - start) * 1e3]

        return evaluate
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step() -> tuple[object, list[float]]:
        times = [time.perf_counter()]
        optimizer.zero_grad()
        loss = loss_of(call(x))
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        return loss.item(), [(b - a) * 1e3 for a, b in itertools.pairwise(times)]

    return step


def status(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (resident at most) of this process; getrusage would count the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(variant: str, name: str, batch: int, size: int) -> int:
    """Bytes by which the largest resident size during three steps exceeds that before the first."""
    step = make_step(variant, name, batch, size)
    before = status("VmRSS")
    for _ in range(3):
        step()
    return status("VmHWM") - before


def measure_memory(variant: str, arguments: argparse.Namespace, threads: int) -> float | str:
    """MiB, or what became of the process that should have said."""
    command = [sys.executable, __file__, "--memory-of", variant, "--model", arguments.model]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size), "--threads", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode < 0:
        return f"died of {signal.Signals(-run.returncode).name}"
    if run.returncode:
        return f"failed: {run.stderr.strip().splitlines()[-1]}"
    return int(run.stdout.split()[-1]) / 2**20


def measure_time(variants: list[str], arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    """For each variant and round, what the parts of a step took, in ms."""
    steps = {v: make_step(v, arguments.model, arguments.batch, arguments.size, arguments.evaluation) for v in variants}
    losses = {v: step()[0] for v, step in steps.items()}
    if arguments.evaluation:
        for variant, outputs in losses.items():
            for output, expected in zip(outputs, losses["eager"]):
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3, msg=lambda m, v=variant: f"{v}: {m}")
        losses = {v: loss_of(outputs).item() for v, outputs in losses.items()}
    worst = max(abs(loss / losses["eager"] - 1) for loss in losses.values())
    if worst > 1e-3:
        sys.exit(f"the variants do not agree: first losses {losses}")
    times: dict[str, list[list[float]]] = {v: [] for v in variants}
    for _ in range(arguments.rounds):
        for variant, step in steps.items():
            step()  # finds the caches as another variant left them
            times[variant].append(step()[1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="featherface_v2", help="name of the model (default: featherface_v2)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--size", type=int, default=320, help="height and width of the images (default: 320)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=11, help="steps per variant (default: 11)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that fit the model")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--evaluation", action="store_true", help="time the forward pass in evaluation mode")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--append", action="store_true", help="keep the runs that the output file holds")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        torch.set_num_threads(arguments.threads[0])
        print(peak_memory(arguments.memory_of, arguments.model, arguments.batch, arguments.size))
        return

    rows = []
    asked = arguments.variants
    if asked is None:
        deformable = arguments.model in ("featherface_v1_ssh", "featherface_v1_dcn")
        asked = [v for v in VARIANTS if deformable or not v.startswith("grid_sample")]
        asked = [v for v in asked if arguments.evaluation or v != "engine"]
    variants = ["eager", *(v for v in asked if v != "eager")]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        memories = {
            v: measure_memory(v, arguments, threads)
            for v in variants
            if not (arguments.no_memory or arguments.evaluation) or v == "compile"
        }
        for variant, reason in memories.items():
            if isinstance(reason, str):
                rows.append({"variant": variant, "threads": threads, "failed": reason})
                print(f"{threads} threads  {variant:22} {reason}", flush=True)
        times = measure_time([v for v in variants if not isinstance(memories.get(v), str)], arguments)
        eager = statistics.median(map(sum, times["eager"]))
        for variant, parts in times.items():
            values = [sum(part) for part in parts]
            median = statistics.median(values)
            row = {
                "variant": variant,
                "threads": threads,
                "ms": median,
                "least_ms": min(values),
                "speedup": eager / median,
            }
            if not arguments.evaluation:
                row |= {f"{name}_ms": statistics.median(part) for name, part in zip(PARTS, zip(*parts))}
            if not (arguments.no_memory or arguments.evaluation):
                row["peak_mib"] = memories[variant]
            rows.append(row)
            memory = f"  {row['peak_mib']:7.0f} MiB" if "peak_mib" in row else ""
            shares = "" if arguments.evaluation else "  (" + " + ".join(f"{row[f'{p}_ms']:.1f}" for p in PARTS) + ")"
            line = f"{threads} threads  {variant:22} {median:8.1f} ms{shares}  {row['speedup']:5.2f}x eager{memory}"
            print(line, flush=True)
    if arguments.output:
        model = featherface.create_model(arguments.model, fused="1")
        report = [row._asdict() for row in ffkernels.report(model.train())]
        setting = {
            "model": arguments.model,
            "batch": arguments.batch,
            "size": arguments.size,
            "rounds": arguments.rounds,
            "evaluation": arguments.evaluation,
        }
        kept = arguments.append and arguments.output.exists()
        runs = json.loads(arguments.output.read_text())["runs"] if kept else []
        runs.append({"setting": setting, "rows": rows, "ops": report, "machine": info()})
        with atomic_write(arguments.output) as path:
            path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
