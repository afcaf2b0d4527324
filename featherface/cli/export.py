"""``featherface export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..detector import resolve_weights
from ..export import FORMATS
from ..export import export as write
from ..files import sha256
from ..models import create_model
from . import options

Format = Enum("Format", {name: name for name in FORMATS}, type=str)


def export(
    weights: options.Weights = None,
    model: options.Model = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="File format (onnx: extra export).")] = Format.onnx,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write; by default named after the model."),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a model for another runtime, with any batch, height and width.

    The file is loaded again and compared with PyTorch on random inputs before it gets its name. It says inside which
    model and weights it holds, how images are prepared and what the outputs mean.
    """
    name, path = resolve_weights(weights, model)
    output = output or Path(name).with_suffix(FORMATS[format.value])
    options.not_replaced("--output", output, path)
    options.writable_file(output, "--output")
    network = create_model(name, weights=path)
    differences = write(network, output, format.value, {"weights": path.name, "weights_sha256": sha256(path)})
    if not quiet:
        worst = max(differences.values())
        print(f"{output}: {name} as {format.value}, largest difference from PyTorch {worst:.1e} (relative)")
