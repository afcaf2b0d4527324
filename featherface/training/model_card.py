"""A model card made from a run's folder and measured results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featherface.errors import FeatherFaceError
from featherface.models import create_model
from featherface.models.checkpoint import read_metadata
from featherface.models.summary import summarize

from .config import Config, from_dict
from .run_folder import RunFolder, Table


def model_card(
    folder: str | os.PathLike,
    reports: Mapping[str, Mapping[str, Any]] | None = None,
    weights: str | os.PathLike | None = None,
    speed: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of a run's model, as Markdown.

    It states what the run's files and ``reports`` say, and nothing else: a result that was not measured is said not to
    have been.

    Args:
        folder: of the run.
        reports: title -> what ``featherface evaluate --output`` wrote, as dictionaries.
        weights: the file that the card is of, where it is not the run's own: an average of several
            (:func:`featherface.training.averaging.average_weights`) is described.
        speed: what ``featherface benchmark --json`` wrote, as dictionaries.

    Raises:
        FeatherFaceError: the folder holds no run, or ``speed`` is another model's.
    """
    folder = Path(folder)
    state = RunFolder.peek(folder)
    if state is None:
        raise FeatherFaceError(f"{folder} holds no checkpoint of a training run")
    config = from_dict(state["config"])
    for report in speed:
        if report["protocol"]["model"] != config.model.name:
            raise FeatherFaceError(
                f"{folder} is a run of {config.model.name}, but times of {report['protocol']['model']} are given"
            )
    facts = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
    validation, metrics = (Table(folder / name, []).read() for name in ("validation.csv", "metrics.csv"))
    landmarks = any(float(row.get(name) or 0) for row in metrics for name in ("landmark", "teacher_landmark"))
    sections = [
        f"# {config.model.name}",
        "A face detector: boxes, scores and five landmarks (eyes, nose, corners of the mouth).",
        _parameters(config),
        _data(config),
        _training(config, state, facts, json.loads(read_metadata(weights).get("average_of", "[]")) if weights else []),
        _results(config, validation, reports or {}),
        _speed(speed),
        _limits(config, landmarks),
    ]
    return "\n\n".join(sections) + "\n"


def _parameters(config: Config) -> str:
    summary = summarize(create_model(config.model.name, fused=False, **config.model.options))
    options = f" Options: `{json.dumps(config.model.options)}`." if config.model.options else ""
    lines = [
        "## Network",
        "",
        f"{summary.parameters:,} parameters, {summary.flops / 1e9:.3f} GFLOP for {summary.width} x {summary.height} "
        "pixels (convolutions and matrix products, two per multiply-add); input BGR minus (104, 117, 123), any size."
        + options,
        "",
        "| part | parameters | MFLOP |",
        "|---|---|---|",
    ]
    rows = [f"| {part.name} | {part.parameters:,} | {part.flops / 1e6:.1f} |" for part in summary.components]
    return "\n".join(lines + rows)


def _data(config: Config) -> str:
    rows = []
    for source in config.data.sources:
        use = "no annotations, through the teacher alone" if source.labels == "none" else "annotated"
        held = f", {100 * source.validation:g} % of it kept for validation" if source.validation else ""
        rows.append(f"- `{source.folder}`: {use}{held}; weight {source.weight:g}.")
    return "\n".join(["## Training data", "", *rows])


def _training(config: Config, state: Mapping[str, Any], facts: Mapping[str, Any], average: list[dict[str, Any]]) -> str:
    distillation = config.distillation
    sides = [f"{side} x {side}" for side in sorted(set(config.augmentation.sizes))]
    lines = [
        f"- {state['step']:,} steps, {state['epoch']} of {config.schedule.epochs} epochs, "
        f"{config.batches.size * config.batches.accumulate * state['world_size']} views of "
        f"{' or '.join(sides)} pixels a step.",
        f"- {config.task.assigner} assignment, {config.task.classification} and {config.task.box} losses; "
        f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}.",
    ]
    model = config.model
    starts = {
        "all weights": model.weights,
        "what it has in common with the weights": model.transfer_weights,
        "the backbone": model.backbone_weights,
    }
    for part, file in starts.items():
        if file:
            lines.append(f"- Started from {part} of `{Path(file).name}`.")
            break
    if distillation.teacher:
        weights = {
            "class": distillation.class_weight,
            "box": distillation.box_weight,
            "landmark": distillation.landmark_weight,
            "feature": distillation.feature_weight,
        }
        terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
        lines.append(
            f"- Teacher `{distillation.teacher}` (`{Path(distillation.weights).name}`); weights of its terms: {terms}; "
            f"of the loss against annotations: {distillation.task_weight:g}."
        )
    if config.average.decay:
        lines.append(f"- The weights are an exponential moving average with decay {config.average.decay:g}.")
    if average:
        parts = " and ".join(f"{p['share']:g} of `{p['file']}` (SHA-256 `{p['sha256'][:12]}`)" for p in average)
        lines.append(f"- They were then averaged with other weights of the model: {parts}.")
    made = [f"commit {facts['git']}" if facts.get("git") else "", f"PyTorch {facts['torch']}" if facts else ""]
    made.append(facts.get("gpu") or ("CPU" if facts else ""))
    if any(made):
        lines.append(f"- Made with {', '.join(filter(None, made))}.")
    return "\n".join(["## Training", "", *lines])


def _results(config: Config, validation: list[dict[str, str]], reports: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["## Results", ""]
    if validation:
        last = validation[-1]
        values = [(key[3:], float(last[key])) for key in last if key.startswith("ap_")]
        shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in values if not math.isnan(value))
        side = config.validation.long_side
        size = f"longer side {side} pixels" if side else "stored size"
        lines += [
            f"Own validation part of the run (plain AP at IoU 0.5, {size}, epoch {last['epoch']}): {shown}.",
            "",
        ]
    if not reports:
        lines.append("Not measured on any other data.")
    for title, report in reports.items():
        facts = (
            f"{report['images']} images, {report['protocol']['description']}; score > {report['score_threshold']:g}, "
            f"NMS {report['nms_threshold']:g}; percent, {100 * report['confidence']:g} % bootstrap interval; "
            f"{report['date'][:10]}; weights with SHA-256 `{report['weights_sha256'][:12]}`"
        )
        lines += [f"### {title}", "", facts, "", "| rules | faces | number | AP | interval |", "|---|---|---|---|---|"]
        for rules, groups in report["average_precision"].items():
            for group, result in groups.items():
                values = [result[key] for key in ("ap", "low", "high")]
                if None not in values:
                    ap, low, high = (f"{100 * value:.1f}" for value in values)
                    lines.append(f"| {rules} | {group} | {result['faces']} | {ap} | {low} to {high} |")
        lines.append("")
        error = report.get("landmark_error")
        if error and error["mean"] is not None:
            lines += [
                f"Landmark error: mean {100 * error['mean']:.2f} %, median {100 * error['median']:.2f} % of the "
                f"distance between the eyes, on {error['found']} of {error['faces']} faces.",
                "",
            ]
        elif error:
            lines += [f"Landmark error: none of the {error['faces']} faces with landmarks was found.", ""]
    return "\n".join(lines).rstrip()


def _speed(reports: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## Speed", ""]
    if not reports:
        return "\n".join([*lines, "Not measured."])
    lines += ["| processor | threads | case | what | median, ms | date |", "|---|---|---|---|---|---|"]
    for report in reports:
        machine, threads = report["machine"]["processor"], report["protocol"]["threads"]
        for timing in report["timings"]:
            lines.append(
                f"| {machine} | {threads} | {timing['case']} | {timing['contender']} | {timing['median_ms']:.2f} | "
                f"{report['date'][:10]} |"
            )
    return "\n".join(lines)


def _limits(config: Config, landmarks: bool) -> str:
    smallest = max(config.augmentation.min_face, 1)
    taught = config.distillation.teacher and config.distillation.landmark_weight
    return "\n".join(
        [
            "## Limits, intended use, licence",
            "",
            f"- Made to find faces of about {smallest:g} pixels and more at the size that the network is shown; very "
            "large faces (over half of the image) and heavily turned ones are found less reliably.",
            "- It finds faces; it does not identify people, and must not be the only basis of a decision about one.",
            "- Photographs from the web are not a fair sample of mankind: error rates by skin colour, age or sex were "
            "not measured. Measure them on your own data before you rely on it.",
            "- Landmarks were not trained; do not use them."
            if not landmarks
            else "- Landmarks come from the teacher where annotations have none."
            if taught
            else "- Landmarks come from the annotations that have them.",
            "- Code: MIT. The weights were trained on photographs whose licences are not clear; WIDER FACE is offered "
            "for research. Judge for yourself whether that allows your use.",
        ]
    )
