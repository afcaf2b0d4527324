"""``featherface info``."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from ffkernels.info import info as kernels_info
from ffkernels.info import render as render_kernels

from ..errors import FeatherFaceError
from ..models import create_model, list_models
from ..models.registry import WEIGHTS
from ..models.summary import render, summarize
from . import options


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model; without it, this installation.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="HxW", help="Input size for a model's operations: 480x640, or 640, the default."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, kernels and devices; or a model's parameters and operations by component.

    The parameters stand beside those of the design document, which do not always add up.
    """
    console = options.console()
    if model is not None:
        summary = summarize(create_model(model), *_size(size or "640"))
        if json:
            print(json_format.dumps(summary.as_dict(), indent=2))
        else:
            console.print(render(summary))
        return
    if size is not None:
        raise FeatherFaceError("--size is of a model's operations; name the model")
    report = kernels_info()
    report["models"] = {
        name: "weights included" if (WEIGHTS / f"{name}.safetensors").is_file() else "no weights included"
        for name in list_models()
    }
    print(json_format.dumps(report, indent=2) if json else render_kernels(report))


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise FeatherFaceError(f"--size {text} is not a size; write 640 or 480x640 (height x width)")
    return int(parts[0]), int(parts[-1])
