"""Every fused layer of a model against PyTorch eager on the same input, forward and forward + backward.

    python benchmarks/op_table.py --model featherface_v2 --batch 8 --size 320 --threads 1 --output ops.json

The layers and their inputs are those of one pass through the model; the blocks of a chain are also timed alone. Eager
is the faster of NCHW and channels_last. Contenders take turns, and medians are compared. With ``--evaluation``, layers
are in evaluation mode and only their forward pass is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import featherface
from featherface.files import atomic_write
from ffkernels import multi_head, set_fused
from ffkernels.info import info
from ffkernels.nn import FusedModule

CONTENDERS = {"eager": "0", "channels_last": "0", "fused": "require"}


class Heads(FusedModule):
    """The heads of all levels, which models run as one op."""

    ff_op = "multi_head"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return multi_head(features, self.model.heads(), not self.training, policy=self.ff_policy)


def layers(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Module, tuple, dict]]:
    """Name and size -> (module, arguments, keyword arguments) of every fused layer that takes part in model(x)."""
    found: dict[str, tuple[nn.Module, tuple, dict]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.setdefault(f"{name} {tuple(tensors(args)[0].shape[1:])}", (module, args, kwargs))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, FusedModule) and module.ff_op and module is not model:
            handles.append(module.register_forward_pre_hook(remember(name), with_kwargs=True))
    features = model.forward_features(x)
    for handle in handles:
        handle.remove()
    found["heads"] = Heads(model).train(model.training), tuple(features), {}
    return found


def convert(value: Any, memory_format: torch.memory_format, record: bool) -> Any:
    """Arguments with every map a leaf of its own in the given memory format."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dim() == 4:
            value = value.contiguous(memory_format=memory_format).clone()
        # Models take no gradient of their input, the only map of three channels.
        return value.requires_grad_(record and value.dim() == 4 and value.shape[1] > 3)
    if isinstance(value, (list, tuple)):
        return type(value)(convert(v, memory_format, record) for v in value)
    return value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def runner(contender: str, module: nn.Module, args: tuple, kwargs: dict, backward: bool) -> Callable[[], object]:
    memory_format = torch.contiguous_format if contender == "eager" else torch.channels_last
    args = convert(args, memory_format, backward)
    leaves = [*(t for t in tensors(args) if t.requires_grad), *(p for p in module.parameters() if backward)]
    grads: list[Tensor] = []

    def run() -> object:
        set_fused(module, CONTENDERS[contender])
        if not backward:
            with torch.no_grad():
                return module(*args, **kwargs)
        outputs = tensors(module(*args, **kwargs))
        if not grads:
            grads.extend(torch.ones_like(y) for y in outputs)
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    return run


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="featherface_v2", help="name of the model (default: featherface_v2)")
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--size", type=int, default=320, help="height and width of the images (default: 320)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="runs per layer and contender (default: 9)")
    parser.add_argument("--evaluation", action="store_true", help="evaluation mode, forward pass only")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = featherface.create_model(arguments.model, fused="1").train(not arguments.evaluation)
    with torch.no_grad():
        found = layers(model, torch.randn(arguments.batch, 3, arguments.size, arguments.size) * 50)
    rows = []
    for name, (module, args, kwargs) in found.items():
        for mode in ["forward"] if arguments.evaluation else ["forward", "forward+backward"]:
            runs = {c: runner(c, module, args, kwargs, mode != "forward") for c in CONTENDERS}
            times = measure(runs, arguments.rounds)
            shape = " ".join("x".join(map(str, t.shape)) for t in tensors(args))
            ratio = min(times["eager"], times["channels_last"]) / times["fused"]
            rows.append({"op": module.ff_op, "layer": name, "input": shape, "mode": mode, "ms": times, "ratio": ratio})
            print(
                f"{module.ff_op:20} {name:32} {shape:18.18} {mode:17} {times['fused']:8.2f} ms {ratio:6.2f}x",
                flush=True,
            )
    slower = [row for row in rows if row["ratio"] < 1]
    print(f"{len(rows)} rows, {len(slower)} slower than eager")
    if arguments.output:
        setting = {key: value for key, value in vars(arguments).items() if key != "output"}
        with atomic_write(arguments.output) as path:
            path.write_text(json.dumps({"setting": setting, "rows": rows, "machine": info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
