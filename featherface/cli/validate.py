"""``featherface validate``."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..detector import resolve_device
from ..evaluation.report import AVERAGE_PRECISION_RULES as AP
from ..evaluation.report import CONFIDENCE, percent, span, versions
from ..files import atomic_write
from . import options

if TYPE_CHECKING:
    from ..training.comparison import Validated


def validate(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE|NAME ...", help="Weights files, or models whose weights come with the package."),
    ],
    preset: Annotated[str, typer.Option(help="default, cpu or seed.")] = "default",
    config: Annotated[
        Path | None, typer.Option(help="Configuration of the training, such as RUN/config.toml: its data and split.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that sources are relative to (data.root).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.option=value. May be repeated.")] = None,
    long_side: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            metavar="PIXELS",
            help="Longer side of the images, 0 as stored; may be repeated. Default: validation.long_side.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Use at most so many images, evenly spread; 0 for all.")] = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as JSON.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table.")] = False,
) -> None:
    """Compare weights on the images that a training keeps for validation, to choose among runs or shares of an average.

    AP at IoU 0.5 of all faces and by size, with 95 % bootstrap intervals and paired differences from the first file.
    """
    from ..training import preset as named_preset
    from ..training.comparison import validate_weights

    if json is not None:
        options.writable_file(json, "--json")
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = options.configuration(named_preset(preset), config, set_, data)
    results = validate_weights(
        files,
        chosen,
        long_side or (),
        limit,
        resolve_device(device),
        folder=config.parent if config is not None else None,
        report=lambda text: print(f"featherface: {text}", file=sys.stderr),
    )
    if not quiet:
        _print(results)
    if json is not None:
        document = {
            "images": len(results[0].result.scores.names),
            "score_threshold": chosen.validation.score_threshold,
            "nms_threshold": chosen.validation.nms_threshold,
            "results": [
                {"weights": r.weights, "model": r.model, "long_side": r.long_side, AP: r.result.to_dict()}
                for r in results
            ],
            "confidence": CONFIDENCE,
            "versions": versions(),
        }
        with atomic_write(json) as temporary:
            temporary.write_text(json_format.dumps(document, indent=2) + "\n", encoding="utf-8")


def _print(results: list[Validated]) -> None:
    console = options.console()
    scores = results[0].result.scores
    console.print(f"{len(scores.names)} images, {scores.faces['all']} faces; {AP} in percent")
    for side in dict.fromkeys(r.long_side for r in results):
        title = f"long side {side} pixels" if side else "stored size"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("weights", overflow="fold")
        for heading in (*scores.matches, "all, minus the first"):
            table.add_column(heading, justify="right", no_wrap=True)
        for r in results:
            if r.long_side == side:
                change = r.result.difference["all"] if r.result.difference else None
                difference = f"{percent(change.value, '+')} ({span(change, '+')})" if change else ""
                aps = (percent(interval.value) for interval in r.result.intervals.values())
                table.add_row(escape(r.weights), *aps, difference)
        console.print(table)
