"""Measures which blocks the Triton kernels should use on this GPU and writes them to ffkernels/triton/blocks.json.

    python scripts/tune_triton.py --minutes 8

The models run once, forward in evaluation and forward and backward in training, in float16 and float32; every call of
a launcher is kept with its arguments. For each key that the launchers asked a block for (kind of kernel, columns,
depth, size of an element), each candidate is then timed in all calls that asked for it, in CUDA graphs, and the best
one is written at once. A stopped run goes on where it was; another GPU of the same capability, other versions or
another commit begin anew. Exit code 0: all keys are measured; 3: the time was up, start it again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_check import environment, in_graph, milliseconds, write

import ffkernels
from featherface import create_model
from ffkernels.triton import (
    batch_norm,
    bifpn_node,
    blocks,
    cbam,
    conv,
    conv_chain,
    deform_conv2d,
    multi_head,
    separable,
    ssh_grouped,
)
from ffkernels.triton.blocks import Block, Key

MODULES = (batch_norm, bifpn_node, cbam, conv, conv_chain, deform_conv2d, multi_head, separable, ssh_grouped)
LAUNCHERS = (
    batch_norm.apply,
    batch_norm.reduce,
    bifpn_node.fuse,
    bifpn_node.fuse_backward,
    cbam.forward,
    cbam.backward,
    conv.conv_forward,
    conv.conv_input_gradient,
    conv.conv_weight_gradient,
    deform_conv2d.forward,
    deform_conv2d._sample_gradients,
    deform_conv2d._weight_gradient,
    separable.separable_forward,
    ssh_grouped.join_branches,
    ssh_grouped.split_branch,
)
"""The functions that ask for blocks."""

MODELS = ("featherface_v2", "featherface_v2_ultra", "featherface_v1_ssh", "featherface_v1")
CALLS = 8
"""Calls of a launcher in one CUDA graph."""
MARGIN = 0.98
"""A candidate replaces the default where it takes at most this part of the default's time."""


def products(
    *sizes: tuple[int, int, int], warps: tuple[int, ...] = (4,), stages: tuple[int, ...] = (3,)
) -> list[Block]:
    return [Block(*size, w, s) for size in sizes for w in warps for s in stages]


def maps(*sizes: tuple[int, int], warps: tuple[int, ...] = (4,)) -> list[Block]:
    return [Block(*size, warps=w) for size in sizes for w in warps]


CANDIDATES: dict[tuple[str, int], list[Block]] = {
    ("conv", 2): products((64, 32, 32), (128, 32, 32), (64, 64, 32), (128, 64, 32), (128, 64, 64), stages=(2, 4)),
    ("conv", 4): products((32, 32, 16), (64, 32, 16), (64, 64, 16), (128, 32, 16), stages=(2, 3)),
    ("weight_gradient", 2): products((16, 64, 64), (32, 64, 64), (32, 128, 32), (64, 64, 32), stages=(2, 3)),
    ("weight_gradient", 4): products((16, 64, 16), (32, 32, 32), (32, 64, 16), stages=(2, 3)),
    ("separable", 2): products(
        (32, 64, 32), (32, 128, 32), (64, 128, 16), (64, 128, 32), (32, 256, 32), warps=(4, 8), stages=(1,)
    ),
    ("separable", 4): products((32, 64, 16), (32, 128, 16), (64, 64, 16), warps=(4, 8), stages=(1,)),
    **{
        ("deform", size): products((16, 32, 32), (32, 32, 32), (32, 64, 16), (64, 32, 16), stages=(1, 2))
        for size in (2, 4)
    },
    **{("depthwise", size): maps((32, 16), (64, 16), (32, 32), (64, 32), (16, 64), warps=(2, 4)) for size in (2, 4)},
    **{("elementwise", size): maps((32, 32), (64, 32), (128, 32), (32, 64), warps=(2, 4, 8)) for size in (2, 4)},
    **{("pooling", size): maps((16, 32), (32, 32), (64, 32), (32, 16), warps=(2, 4)) for size in (2, 4)},
    **{("reduction", size): maps((64, 16), (128, 16), (256, 16), (64, 32), (128, 32), warps=(4, 8)) for size in (2, 4)},
}


class Case(NamedTuple):
    """A call that models make ``count`` times, and the keys it asked blocks for."""

    name: str
    run: Callable[[], object]
    keys: frozenset[Key]
    count: int = 1


class Asked(dict):
    """Stands in for the measured table: notes every key that is asked for."""

    def __init__(self) -> None:
        self.keys_asked: set[Key] = set()

    def get(self, key: Key, otherwise: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, otherwise)


@contextlib.contextmanager
def table(found: dict[Key, Block]) -> Iterator[None]:
    """Launchers take their blocks from ``found``."""
    before, blocks.measured = blocks.measured, lambda: found
    try:
        yield
    finally:
        blocks.measured = before


def describe(value: Any) -> Any:
    """What tells two calls apart: shapes and numbers, not the contents of tensors."""
    if isinstance(value, torch.Tensor):
        return value.dtype, *value.shape
    if isinstance(value, dict):
        return tuple((name, describe(v)) for name, v in value.items())
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *(describe(v) for v in value)
    return value


@contextlib.contextmanager
def recorded() -> Iterator[dict[Any, Case]]:
    """The launchers' calls inside the block, each kind of call once."""
    cases: dict[Any, Case] = {}
    stack: list[Asked] = []

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            asked = Asked()
            stack.append(asked)
            try:
                with table(asked):
                    result = function(*arguments, **options)
            finally:
                stack.pop()
            key = function.__module__, function.__name__, describe(arguments), describe(options)
            run = functools.partial(function, *arguments, **options)
            case = cases.setdefault(key, Case(".".join(key[:2]), run, frozenset(asked.keys_asked), 0))
            cases[key] = case._replace(count=case.count + 1)
            return result

        return call

    wrapped = {function: wrap(function) for function in LAUNCHERS}
    replaced = [
        (module, name, value)
        for module in MODULES
        for name, value in vars(module).items()
        if callable(value) and value in LAUNCHERS
    ]
    for module, name, value in replaced:
        setattr(module, name, wrapped[value])
    try:
        yield cases
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def run_model(name: str, dtype: torch.dtype, device: str, batch: int, size: int) -> None:
    """Every launch that evaluation and training make."""
    torch.manual_seed(0)
    model = create_model(name, fused="1").to(device, dtype)
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with ffkernels.use("1", "triton", model=model):
        with torch.no_grad():
            model.eval()(x)
        outputs = model.train()(x)
        sum(y.float().square().mean() for y in outputs).backward()


def cases_of(models: list[str], device: str, batch: int, size: int) -> list[Case]:
    with recorded() as cases:
        for name in models:
            for dtype in (torch.float16, torch.float32):
                run_model(name, dtype, device, batch, size)
    return list(cases.values())


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""

    def several() -> None:
        for _ in range(CALLS):
            run()

    return milliseconds(in_graph(several), budget_ms=20) / CALLS


def time_of(cases: list[Case], key: Key, chosen: Block, timer: Callable[[Callable[[], object]], float]) -> float:
    """Time of all calls that ask for ``key``, with ``chosen`` for it and the defaults for the rest."""
    with table({key: chosen}):
        return sum(case.count * timer(case.run) for case in cases if key in case.keys)


def best_block(
    cases: list[Case], key: Key, timer: Callable[[Callable[[], object]], float]
) -> tuple[Block, dict[str, float]]:
    """The fastest candidate and what was measured; candidates that do not fit the GPU are left out."""
    first = blocks.default(key.kind, key.element_size, key.capability)
    default_ms = time_of(cases, key, first, timer)
    best, best_ms = first, default_ms
    for chosen in CANDIDATES[key.kind, key.element_size]:
        if chosen == first:
            continue
        try:
            ms = time_of(cases, key, chosen, timer)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        if ms < min(best_ms, MARGIN * default_ms):
            best, best_ms = chosen, ms
    return best, {"ms": round(best_ms, 5), "default_ms": round(default_ms, 5)}


def same(where: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two environments are one, whatever this script itself has changed since."""
    commits = (w.get("commit", "").removesuffix("-dirty") for w in (where, other))
    return {**where, "commit": next(commits)} == {**other, "commit": next(commits)}


def device_of(record: dict[str, Any], capability: int, where: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The record's entry of this capability: the one begun in the same environment, else an empty one."""
    for device in record["devices"]:
        if device["capability"] == capability and same(device["environment"], where) and not fresh:
            return device
    device = {"capability": capability, "environment": where, "date": "", "rows": []}
    record["devices"] = [d for d in record["devices"] if d["capability"] != capability] + [device]
    record["devices"].sort(key=lambda d: d["capability"])
    return device


def tune(
    cases: list[Case],
    device: dict[str, Any],
    save: Callable[[], None],
    limit: float,
    timer: Callable[[Callable[[], object]], float] = timed,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measures the keys that ``device`` has no row for. Returns the exit code."""
    begin = clock()
    done = {(row["kind"], row["element_size"], row["columns"], row["depth"]) for row in device["rows"]}
    keys = sorted({key for case in cases for key in case.keys})
    for number, key in enumerate(keys, 1):
        if key[1:] in done:
            continue
        if clock() - begin > limit:
            print(f"{len(keys) - number + 1} of {len(keys)} keys left for the next start")
            return 3
        chosen, measured = best_block(cases, key, timer)
        names = dict(zip(("kind", "element_size", "columns", "depth"), key[1:]))
        device["rows"].append({**names, "block": chosen._asdict(), **measured})
        device["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        save()
        print(f"{number}/{len(keys)} {names}: {tuple(chosen)} {measured}", flush=True)
    return 0


def load(path: Path, fresh: bool) -> dict[str, Any]:
    """The table as it is; a malformed one is an error, unless it is to be written anew."""
    if fresh or not path.exists():
        return {"devices": []}
    try:
        record = json.loads(path.read_text())
        blocks.parse(record)
    except ValueError as error:
        sys.exit(f"tune_triton: {path}: {error}; --fresh writes a new table")
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="when to stop; the next start goes on")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--fresh", action="store_true", help="forget what the table holds")
    parser.add_argument("--list", action="store_true", help="print the keys and stop; TRITON_INTERPRET=1 without a GPU")
    parser.add_argument("--out", type=Path, default=blocks.TABLE)
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.list and not torch.cuda.is_available():
        for module in MODULES:
            module.launch = lambda *arguments, **constants: None  # shapes are all that matters
        for key in sorted({k for case in cases_of(options.models, "cpu", 1, options.size) for k in case.keys}):
            print(*key[1:])
        return 0
    if not torch.cuda.is_available():
        sys.exit("tune_triton: PyTorch finds no CUDA device; run this on a machine with an NVIDIA GPU")
    cases = cases_of(options.models, "cuda", options.batch, options.size)
    if options.list:
        for key in sorted({k for case in cases for k in case.keys}):
            print(*key[1:])
        return 0
    record = load(options.out, options.fresh)
    capability = blocks.capability(torch.device("cuda", torch.cuda.current_device()))
    device = device_of(record, capability, environment(), options.fresh)
    device["inputs"] = f"{', '.join(options.models)} at {options.size}x{options.size}, batch {options.batch}"
    save = lambda: write(options.out, json.dumps(record, indent=1) + "\n")  # noqa: E731
    return tune(cases, device, save, 60 * options.minutes - (time.monotonic() - begin))


if __name__ == "__main__":
    sys.exit(main())
