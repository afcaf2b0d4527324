"""``featherface average``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def average(
    files: Annotated[list[Path], typer.Argument(metavar="FILE|NAME ...", help="Weights of one model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    share: Annotated[
        list[float] | None, typer.Option("--share", min=0, help="Of each file, in their order; default: equal shares.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Average weights that came from one another by training, such as a run and its fine-tuned continuation."""
    from ..training.averaging import average_weights

    options.writable_file(output, "--output")
    name = average_weights(files, output, share or None)
    if not quiet:
        print(f"{output}: average of {len(files)} weights files of {name}")
