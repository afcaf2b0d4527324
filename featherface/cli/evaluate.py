"""``featherface evaluate``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FeatherFaceError
from .options import (
    Device,
    Dtype,
    Fused,
    Model,
    Nms,
    Quiet,
    Score,
    Threads,
    Weights,
    console,
    not_replaced,
    writable_file,
    writable_folder,
)


class ProtocolName(str, Enum):
    orig = "orig"
    vga640 = "vga640"
    qvga320 = "qvga320"
    s1600 = "s1600"


# Of the detector, which --predictions does without.
DETECTOR_OPTIONS = (
    *("weights", "model", "protocol", "score", "nms", "multiple", "device", "fused", "threads", "dtype"),
    "save_predictions",
)


def evaluate(
    context: typer.Context,
    weights: Weights = None,
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Data set: a folder with images/ and label.txt, labelv2.txt or one *_bbx_gt.txt."
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            help="Image size: orig; vga640, qvga320 (long side limited to 640 or 320); s1600 (short side 1600, "
            "long at most 2150)."
        ),
    ] = ProtocolName.orig,
    score: Score = 0.02,
    nms: Nms = 0.4,
    multiple: Annotated[
        int, typer.Option(min=1, help="Pad images at right and bottom to a multiple of this; published results do not.")
    ] = 1,
    device: Device = "auto",
    fused: Fused = None,
    threads: Threads = None,
    dtype: Dtype = "float32",
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Score these predictions (WIDER FACE's text format, folder or file) and run no detector.",
        ),
    ] = None,
    ground_truth: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder with WIDER FACE's wider_{face,easy,medium,hard}_val.mat: score by the official rules. With "
            "--predictions an annotation file serves too: plain AP.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw precision-recall curves (.png, .svg, .pdf).")
    ] = None,
    save_predictions: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the predictions, in WIDER FACE's text format.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Predictions to compare with, on the same images (paired bootstrap)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Score at most N images, spread over the set.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure average precision on a data set, or of predictions that another program wrote.

    A part of WIDER FACE val with --ground-truth is scored by the official rules restricted to its images; any other
    set by plain AP at IoU 0.5, over all faces and by size of face.
    """
    from ..evaluation.report import check_plot
    from ..evaluation.run import evaluate as run
    from ..evaluation.run import evaluate_predictions

    # Before the detector runs for minutes.
    file = None if weights is None else Path(weights)
    not_replaced("--output", output, file, plot)
    not_replaced("--plot", plot, file)
    if output is not None:
        writable_file(output, "--output")
    if plot is not None:
        writable_file(plot, "--plot")
        check_plot(plot)
    if predictions is not None:
        given = [name for name in DETECTOR_OPTIONS if context.get_parameter_source(name).name != "DEFAULT"]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise FeatherFaceError(f"--predictions runs no detector; leave out {options}")
        report = evaluate_predictions(predictions, ground_truth, data=data, limit=limit, baseline=baseline)
    else:
        if data is None:
            raise FeatherFaceError("there is nothing to score: give --data DIR, or --predictions with --ground-truth")
        if save_predictions is not None:
            writable_folder(save_predictions, "--save-predictions")
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        from ..detector import FaceDetector

        detector = FaceDetector(weights, model, device, fused=fused, threads=threads, dtype=dtype)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
            task = bar.add_task("images", total=None, visible=False)
            report = run(
                detector,
                data,
                protocol.value,
                ground_truth=ground_truth,
                limit=limit,
                save_predictions=save_predictions,
                baseline=baseline,
                score_threshold=score,
                nms_threshold=nms,
                multiple=multiple,
                progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )
    if not quiet:
        report.print(console())
    if output is not None:
        report.save(output)
    if plot is not None:
        report.plot(plot)
