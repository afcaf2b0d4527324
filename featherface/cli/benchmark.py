"""``featherface benchmark``."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..benchmark import Results, benchmark_model, benchmark_stages, contenders
from ..detector import DEFAULT_MODEL, resolve_device, resolve_weights
from ..errors import FeatherFaceError
from ..files import atomic_write
from ..models import create_model
from . import options


def benchmark(
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help="Model to time.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", "-w", metavar="FILE|NAME", help="Its weights; default: random, which costs the same."
        ),
    ] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, help="Side of the input, repeatable.  [320, 640]")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size, repeatable.  [1, 8]")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="CONTENDER", help=f"One of: {', '.join(contenders('cpu'))}; repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each case.")] = 10.0,
    stages: Annotated[bool, typer.Option("--stages/--no-stages", help="Time what is around the network too.")] = True,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write results as JSON; - is stdout.")] = None,
    quiet: options.Quiet = False,
) -> None:
    """Time a model beside other runtimes, and the stages of detection.

    All contenders have the same weights and input, and their outputs are compared before they are timed, in turn.
    Runtimes that are not installed (extra: bench) or cannot run the model are named with the reason.
    """
    to_stdout = json is not None and str(json) == "-"
    if json is not None and not to_stdout:
        options.writable_file(json, "--json")
    name, path = resolve_weights(weights, model) if weights is not None else (model or DEFAULT_MODEL, None)
    network = create_model(name, weights=path)
    target = resolve_device(device)
    if device == "auto" and only and any(choice not in contenders(target) for choice in only):
        raise FeatherFaceError(f"--only {', '.join(only)}: not all of these run on {target}; name another --device")
    status = Console(stderr=True)
    with status.status("starting") if status.is_terminal and not quiet else _NoStatus() as spinner:
        results = benchmark_model(
            network, size or (320, 640), batch or (1, 8), only, target, seconds, threads, spinner.update
        )
        around = None
        if stages:
            spinner.update("stages of detection")
            around = benchmark_stages(network, target, seconds / 2, threads)
    if not to_stdout:
        _print(results, f"{name} on {target}, {results.protocol['threads']} threads", compare_with="eager")
        if around is not None:
            _print(around, "around the network", compare_with="PyTorch")
    if json is not None:
        document = results.to_dict() | ({"stages": around.to_dict()["timings"]} if around is not None else {})
        text = json_format.dumps(document, indent=2)
        if to_stdout:
            print(text)
        else:
            with atomic_write(json) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")


def _print(results: Results, title: str, compare_with: str) -> None:
    console = options.console()
    table = Table("case", "contender", title=title)
    for heading in ("median ms", "10 %", "90 %", "speed-up"):
        table.add_column(heading, justify="right")
    base = {t.case: t.median_ms for t in results.timings if t.contender == compare_with}
    last = None
    for t in results.timings:
        if last not in (None, t.case):
            table.add_section()
        ratio = f"{base[t.case] / t.median_ms:.2f}x" if t.case in base else "-"
        numbers = (f"{value:.2f}" for value in (t.median_ms, t.p10_ms, t.p90_ms))
        table.add_row(t.case if t.case != last else "", t.contender, *numbers, ratio)
        last = t.case
    console.print(table)
    for missing in results.missing:
        console.print(f"{missing.case}: no {missing.contender}: {missing.reason}", markup=False)


class _NoStatus:
    def __enter__(self) -> _NoStatus:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, text: str) -> None:
        pass
