"""Where to end a chain of convolutions with deferred batch normalisation: docs/batch_norm_fusion.md.

    python benchmarks/batch_norm_fusion.py --batch 8 --size 320 --threads 1 2 --output fusion.json

The backbone runs forward and backward with its convolutions grouped into chains of one convolution, of one block and
of one stage; the activated output is stored at the end of every chain. Saved memory is the sum of all distinct tensors
that autograd keeps between the two passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ffkernels
from featherface.files import atomic_write
from featherface.models.backbone import MobileNetV1
from ffkernels import ConvUnit, Policy
from ffkernels.info import info

FUSED = Policy("require", "cpu")


def forward(model: MobileNetV1, x: Tensor, chain: str) -> list[Tensor]:
    """C3, C4, C5 with chains of ``chain``: "eager", "convolution", "block" or "stage"."""
    outputs = []
    for stage in (model.stage1, model.stage2, model.stage3):
        blocks: list[list[ConvUnit]] = [block.units() for block in stage]
        units = [unit for block in blocks for unit in block]
        groups = {"eager": [units], "convolution": [[unit] for unit in units], "block": blocks, "stage": [units]}
        for group in groups[chain]:
            x = ffkernels.conv_chain(x, group, policy=Policy("0") if chain == "eager" else FUSED)
        outputs.append(x)
    return outputs


def saved_bytes(run: Callable[[], list[Tensor]], model: MobileNetV1) -> int:
    known = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = run()
    del outputs
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--size", type=int, default=320, help="height and width (default: 320)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions (default: 11)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = MobileNetV1()
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    x = x.contiguous(memory_format=torch.channels_last)
    chains = ("eager", "convolution", "block", "stage")
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[tuple[float, float]]] = {chain: [] for chain in chains}
        for i in range(arguments.rounds + 2):
            for chain in chains:
                start = time.perf_counter()
                outputs = forward(model, x, chain)
                middle = time.perf_counter()
                sum(y.square().mean() for y in outputs).backward()
                if i >= 2:
                    times[chain].append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
        for chain in chains:
            ahead, back = (statistics.median(t) for t in zip(*times[chain]))
            mib = saved_bytes(lambda chain=chain: forward(model, x, chain), model) / 2**20
            rows.append(
                {"chain": chain, "threads": threads, "forward_ms": ahead, "backward_ms": back, "saved_mib": mib}
            )
            print(
                f"{threads} threads  {chain:12} forward {ahead:6.1f} ms  backward {back:6.1f} ms  saved {mib:6.1f} MiB"
            )
    if arguments.output:
        setting = {"batch": arguments.batch, "size": arguments.size, "rounds": arguments.rounds}
        with atomic_write(arguments.output) as path:
            path.write_text(json.dumps({"setting": setting, "rows": rows, "machine": info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
