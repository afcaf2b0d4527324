"""Results as a table, as JSON and as a precision-recall plot."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..errors import DataError, FeatherFaceError
from ..files import atomic_write
from .bootstrap import Interval
from .landmarks import LandmarkScores
from .precision_recall import Scores
from .protocols import Protocol

WIDER_RULES = "WIDER FACE"
AVERAGE_PRECISION_RULES = "AP at IoU 0.5"
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Result:
    """Average precision by one set of rules.

    Attributes:
        rules: ``WIDER_RULES`` or ``AVERAGE_PRECISION_RULES``.
        scores: average precision, matched detections.
        intervals: bootstrap interval (95 %) of each AP.
        difference: AP minus that of the baseline, with its paired interval.
    """

    rules: str
    scores: Scores
    intervals: dict[str, Interval]
    difference: dict[str, Interval] | None = None

    def to_dict(self) -> dict[str, Any]:
        result = {}
        for group, interval in self.intervals.items():
            result[group] = {"faces": self.scores.faces[group], **_interval(interval)}
            if self.difference:
                result[group]["difference"] = _interval(self.difference[group])
        return result


@dataclass(frozen=True, eq=False)
class Report:
    """What was measured, and everything that one must know to repeat it.

    Attributes:
        data_set: name of the data set or of the annotation file.
        results: AP by the official rules where there is official ground truth, plain AP where there are annotations.
        replicates: bootstrap replicates behind the intervals.
        landmarks: landmark error, for a data set with landmarks.
        protocol, score_threshold, nms_threshold, multiple: None for predictions of unknown origin.
        model, weights, weights_sha256, device, kernels: the detector, where it is known; ``weights`` is the file's
            name, ``kernels`` as :attr:`featherface.FaceDetector.kernels`.
        predictions: name of the scored folder or file of predictions.
        unused_predictions: images among the predictions that were not to be scored.
        baseline: name of the predictions compared with.
        baseline_missing: images that it has no predictions of, scored as empty.
        date: ISO 8601, UTC.
    """

    data_set: str
    results: tuple[Result, ...]
    replicates: int
    landmarks: LandmarkScores | None = None
    protocol: Protocol | None = None
    score_threshold: float | None = None
    nms_threshold: float | None = None
    multiple: int | None = None
    model: str | None = None
    weights: str | None = None
    weights_sha256: str | None = None
    device: str | None = None
    kernels: str | None = None
    predictions: str | None = None
    unused_predictions: int = 0
    baseline: str | None = None
    baseline_missing: int = 0
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def images(self) -> int:
        return len(self.results[0].scores.names)

    @property
    def missing(self) -> int:
        """Images without predictions, scored as empty."""
        return len(self.results[0].scores.missing)

    @property
    def ap(self) -> dict[str, float]:
        """AP, 0 to 1, of each group by the first of the results: the official rules, where they apply."""
        return self.results[0].scores.ap

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON's types: AP from 0 to 1 with six decimals, null for what does not exist."""
        content: dict[str, Any] = {
            "data_set": self.data_set,
            "images": self.images,
            "images_without_predictions": self.missing,
            "protocol": self.protocol and {"name": self.protocol.name, "description": self.protocol.description},
            "score_threshold": self.score_threshold,
            "nms_threshold": self.nms_threshold,
            "input_multiple": self.multiple,
            "model": self.model,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "device": self.device,
            "kernels": self.kernels,
            "predictions": self.predictions,
            "baseline": self.baseline,
            "images_without_baseline": self.baseline_missing,
            "average_precision": {result.rules: result.to_dict() for result in self.results},
            "confidence": CONFIDENCE,
            "bootstrap_replicates": self.replicates,
        }
        if self.landmarks:
            content["landmark_error"] = {
                "unit": "share of the distance between the eyes",
                "mean": _number(self.landmarks.error),
                "median": _number(self.landmarks.median),
                "found": self.landmarks.found,
                "faces": self.landmarks.faces,
            }
        return {**content, "date": self.date, "versions": versions()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON.

        Raises:
            DataError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write the report {path}: {error.strerror or error}") from error

    def print(self, console: Console | None = None) -> None:
        """Prints the results as tables, AP in percent."""
        console = console or Console()
        console.print(self._headline(), soft_wrap=True, highlight=False, markup=False)
        for result in self.results:
            table = Table(title=result.rules, title_justify="left")
            table.add_column("faces")
            for column in ("number", "AP %", "95 % interval"):
                table.add_column(column, justify="right")
            if result.difference:
                table.add_column(f"minus {self.baseline}", justify="right")
            for group, interval in result.intervals.items():
                row = [group, str(result.scores.faces[group]), percent(interval.value), span(interval)]
                if result.difference:
                    change = result.difference[group]
                    row.append(f"{percent(change.value, '+')}  ({span(change, '+')})")
                table.add_row(*row)
            console.print(table)
        if self.landmarks:
            console.print(
                f"landmark error: mean {percent(self.landmarks.error)} %, median {percent(self.landmarks.median)} % "
                f"of the distance between the eyes, on {self.landmarks.found} of {self.landmarks.faces} faces",
                soft_wrap=True,
                highlight=False,
            )
        for count, what in (
            (self.missing, "images had no predictions and were scored as empty"),
            (self.baseline_missing, "images were not in the baseline, which was scored as empty there"),
            (self.unused_predictions, "images among the predictions were not to be scored"),
        ):
            if count:
                console.print(f"note: {count} {what}", soft_wrap=True, highlight=False)

    def _headline(self) -> str:
        parts = [f"{self.data_set}: {self.images} images"]
        if self.model or self.weights:
            parts.append(" ".join(part for part in (self.model, self.weights) if part))
        if self.predictions:
            parts.append(f"predictions {self.predictions}")
        if self.protocol:
            parts.append(f"protocol {self.protocol.name} ({self.protocol.description})")
            parts.append(f"score > {self.score_threshold:g}, NMS {self.nms_threshold:g}")
        return "; ".join(parts)

    def plot(self, path: str | os.PathLike) -> None:
        """Draws precision-recall curves; the suffix of ``path`` chooses the format, ``.png`` for example.

        Raises:
            FeatherFaceError: see :func:`check_plot`.
            DataError: the file cannot be written.
        """
        check_plot(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5 * len(self.results), 5), layout="constrained")
        for axes, result in zip(figure.subplots(1, len(self.results), squeeze=False)[0], self.results):
            for group, matches in result.scores.matches.items():
                if not matches.faces.sum():
                    continue
                precision, recall = matches.curve()
                drawn = recall > 0
                # A curve starts at recall 0 with the precision of its first point.
                recall = np.append(np.zeros(int(drawn.any())), recall[drawn])
                precision = np.append(precision[drawn][:1], precision[drawn])
                axes.plot(recall, precision, label=f"{group}  {100 * result.scores.ap[group]:.1f}")
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(title="AP %", loc="lower left")
            protocol = f", {self.protocol.name}" if self.protocol else ""
            axes.set_title(f"{self.data_set}, {self.images} images{protocol}: {result.rules}", fontsize="medium")
        try:
            with atomic_write(path) as temporary:
                figure.savefig(temporary, dpi=150)
        except OSError as error:
            raise DataError(f"cannot write the plot {path}: {error.strerror or error}") from error


def check_plot(path: str | os.PathLike) -> None:
    """Refuses what :meth:`Report.plot` cannot write.

    Raises:
        FeatherFaceError: matplotlib is not installed, or does not know the suffix of ``path``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FeatherFaceError("plotting needs matplotlib; install it with: pip install 'featherface[eval]'") from error
    formats = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise FeatherFaceError(f"plots cannot be written to {path}; its suffix must be one of: {', '.join(formats)}")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    try:
        own = metadata.version("featherface")
    except metadata.PackageNotFoundError:
        own = "source tree"
    return {
        "featherface": own,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"ap": _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def percent(value: float, sign: str = "") -> str:
    """A share in percent, two digits; ``sign="+"`` writes a sign always."""
    return "-" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def span(interval: Interval, sign: str = "") -> str:
    """The ends of an interval as :func:`percent` writes them."""
    if math.isnan(interval.low):
        return "-"
    return f"{percent(interval.low, sign)} to {percent(interval.high, sign)}"
