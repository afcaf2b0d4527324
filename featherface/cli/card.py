"""``featherface card``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FeatherFaceError
from ..files import atomic_write, sha256
from . import options


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the training run.")],
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE ...", help="What `featherface evaluate --output` and `featherface benchmark --json` wrote."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", metavar="FILE", help="Weights that the card is of, where not the run's own."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write; default: standard output.")
    ] = None,
) -> None:
    """Write the model card of a training run, with measured results."""
    from ..training.model_card import model_card

    if output is not None:
        options.writable_file(output, "--output")
    reports: dict[str, dict[str, Any]] = {}
    speed = []
    for file in results or []:
        result = _read(file)
        if "average_precision" in result:
            if lacking := {"data_set", "protocol", "input_multiple", "weights", "weights_sha256"} - result.keys():
                raise FeatherFaceError(f"{file} is no whole report of featherface evaluate: {min(lacking)} is missing")
            _check_weights(result, weights or run / "final.safetensors", file)
            title = _title(result)
            if title in reports:
                raise FeatherFaceError(f"{file} is a second result of {title}; name one of the two")
            reports[title] = result
        elif "timings" in result:
            speed.append(result)
        else:
            raise FeatherFaceError(f"{file} holds no result of featherface evaluate or featherface benchmark")
    text = model_card(run, reports, weights, speed)
    if output is None:
        print(text, end="")
    else:
        with atomic_write(output) as temporary:
            temporary.write_text(text)


def _read(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FeatherFaceError(f"cannot read {file} as JSON: {error}") from error
    return result if isinstance(result, dict) else {}


def _title(report: dict[str, Any]) -> str:
    protocol, multiple = report["protocol"], report["input_multiple"]
    size = "original size" if protocol["name"] == "orig" else protocol["name"]
    return f"{report['data_set']}, {size}" + (f", padded to multiples of {multiple}" if multiple > 1 else "")


def _check_weights(report: dict[str, Any], weights: Path, file: Path) -> None:
    if not weights.is_file():
        raise FeatherFaceError(f"{weights} is not a file; --weights names the file that {file} was measured with")
    if report["weights_sha256"] != sha256(weights):
        raise FeatherFaceError(
            f"{file} was measured with other weights ({report['weights'] or 'it does not say which'}) than {weights}"
        )
