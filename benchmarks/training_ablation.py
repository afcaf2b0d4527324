"""Short trainings with one thing changed at a time: ``python benchmarks/training_ablation.py --data DIR --runs DIR``.

Every variant trains with the same budget, seed and data. Its AP on the validation part goes into a table, with paired
bootstrap intervals of the difference from the first variant of the same model. A run that is there is resumed or, when
it is finished, kept, so the command may be stopped and repeated. Equal short budgets rank terms; they do not say what a
full training reaches.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from featherface.data import FaceData
from featherface.evaluation import bootstrap, bootstrap_difference, evaluate_average_precision
from featherface.files import atomic_write
from featherface.models import create_model
from featherface.training import Config, override, preset, train
from featherface.training.data import read_data
from featherface.training.validation import detect_validation, validation_indices

ULTRA = ("reuse", "attention", "progressive", "multiscale", "dynamic")
V2 = {
    "default": [],
    "no teacher": [
        'distillation.teacher=""',
        'data.sources=[{folder="faces/wider_val_train", validation=0.1}, {folder="faces/eden_mask"}]',
    ],
    "without class term": ["distillation.class_weight=0"],
    "without box term": ["distillation.box_weight=0"],
    "without landmark term": ["distillation.landmark_weight=0"],
    "without feature term": ["distillation.feature_weight=0"],
    "feature term": ["distillation.feature_weight=0.5"],
    "class term masked": ["distillation.class_kind=masked"],
    "seed's class term": [
        "distillation.class_kind=kl",
        "distillation.class_weight=0.7",
        "distillation.task_weight=0.3",
    ],
    "ATSS": ["task.assigner=atss"],
    "ATSS, quality focal": ["task.assigner=atss", "task.classification=quality_focal"],
    "SimOTA, quality focal": ["task.assigner=simota", "task.classification=quality_focal"],
    "quality focal": ["task.classification=quality_focal"],
    "smooth L1": ["task.box=smooth_l1", "task.landmark_weight=1"],
    "EIoU": ["task.box=eiou"],
    "half of the views mosaics": ["augmentation.mosaic=0.5"],
    "crops 0.3 to 1": ["augmentation.scales=[0.3, 0.45, 0.6, 0.8, 1.0]"],
    "without unlabelled photographs": [
        'data.sources=[{folder="faces/wider_val_train", validation=0.1}, {folder="faces/eden_mask"}]'
    ],
    "random backbone": ["model.backbone_weights="],
    "lr 0.004": ["optimizer.lr=0.004"],
    "Muon": ["optimizer.name=muon"],
    "Muon, lr 0.004": ["optimizer.name=muon", "optimizer.lr=0.004"],
    "faces alike": ["task.face_balance=1"],
    "Muon, faces alike": ["optimizer.name=muon", "task.face_balance=1"],
    "class term's exponent 1": ["distillation.focal_beta=1"],
    "class term's exponent 2": ["distillation.focal_beta=2"],
    "class term's exponent 0": ["distillation.focal_beta=0", "distillation.class_weight=1"],
    "landmark term 0.1": ["distillation.landmark_weight=0.1"],
}
INNOVATIONS = {"ultra": ["model.name=featherface_v2_ultra"]} | {
    f"ultra without {name}": [
        "model.name=featherface_v2_ultra",
        f"model.options.innovations={json.dumps([other for other in ULTRA if other != name])}",
    ]
    for name in ULTRA
}
COMMAND = "python benchmarks/training_ablation.py --data DIR --runs DIR"


def variants(groups: list[str]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for group, members in (("v2", V2), ("ultra", INNOVATIONS)):
        if group in groups:
            chosen |= members
    return chosen


def configuration(arguments: argparse.Namespace, changes: list[str]) -> Config:
    shared = [
        f"data.root={arguments.data}",
        "data.cache=disk",
        f"data.cache_dir={(arguments.runs / 'cache').resolve()}",
        f"schedule.epochs={arguments.epochs}",
        "schedule.warmup_epochs=1",
        "average.decay=0.998",
        "validation.every=0",
        f"batches.size={arguments.batch}",
        f"augmentation.sizes=[{arguments.size}]",
        f"runtime.seed={arguments.seed}",
        f"runtime.device={arguments.device}",
        f"runtime.amp={arguments.amp}",
    ]
    return override(preset("default"), [*shared, *arguments.set, *changes])


def stem(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def predictions(config: Config, folder: Path, data: FaceData) -> dict[str, np.ndarray]:
    """Detections of a finished run on the validation part; kept beside it."""
    path = folder / "predictions.npz"
    if path.exists():
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    model = create_model(config.model.name, weights=folder / "final.safetensors", fused=config.model.fused or None)
    device = config.runtime.device
    model.to("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    found = detect_validation(model, data, validation_indices(data, config.validation), config.validation)
    with atomic_write(path) as temporary:
        np.savez(temporary, **found)
    return found


def table(arguments: argparse.Namespace, finished: dict[str, dict[str, np.ndarray]], data: FaceData) -> str:
    annotations = [data.annotation(index) for index in data.validation.tolist()]
    scores = {name: evaluate_average_precision(found, annotations) for name, found in finished.items()}
    groups = ("all", "tiny", "small", "medium", "large")
    only = f" --only {shlex.join(arguments.only)}" if arguments.only else ""
    lines = [
        "# Ablation of the training recipe",
        "",
        f"`{COMMAND} --epochs {arguments.epochs} --batch {arguments.batch} --size {arguments.size} "
        f"--seed {arguments.seed}{''.join(f' --set {change}' for change in arguments.set)}{only}`",
        "",
        f"AP at IoU 0.5 on the {len(annotations)} images of the validation part at their stored size, by square root "
        "of the faces' area (tiny below 16 pixels, small below 32, medium below 96). Difference: paired bootstrap over",
        "images against the first row of the same model, 95 %.",
        f"PyTorch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        f"| variant | {' | '.join(groups)} | 95 % | difference in all |",
        f"|---|{'---|' * (len(groups) + 2)}",
    ]
    for name, score in scores.items():
        first = "ultra" if name.startswith("ultra") else next(iter(V2))
        interval = bootstrap(score, arguments.replicates)["all"]
        ap = " | ".join("" if score.ap[g] != score.ap[g] else f"{100 * score.ap[g]:.1f}" for g in groups)
        difference = ""
        if name != first and first in scores:
            d = bootstrap_difference(score, scores[first], arguments.replicates)["all"]
            difference = f"{100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
        lines.append(f"| {name} | {ap} | {100 * interval.low:.1f} to {100 * interval.high:.1f} | {difference} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data root with faces/ and weights/")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, help="write the table here too")
    parser.add_argument("--groups", nargs="+", default=["v2", "ultra"], choices=["v2", "ultra"])
    parser.add_argument("--only", nargs="+", default=[], help="names of variants")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="off")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--stop-after", type=float, help="minutes in all; repeat the command to go on")
    parser.add_argument(
        "--set", action="append", default=[], help="section.option=value, for variants that do not set it"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.stop_after if arguments.stop_after else None
    chosen = variants(arguments.groups)
    if unknown := [name for name in arguments.only if name not in chosen]:
        parser.error(f"no variant {unknown[0]!r}; there are: {', '.join(chosen)}")
    finished: dict[str, dict[str, np.ndarray]] = {}
    base = configuration(arguments, [])
    data = read_data(base)
    for name, changes in chosen.items():
        if arguments.only and name not in arguments.only:
            continue
        config, folder = configuration(arguments, changes), arguments.runs / stem(name)
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if left == 0 and not (folder / "final.safetensors").exists():
            continue
        print(f"{name}: {folder}", flush=True)
        if train(config, folder, resume=True, stop_after=left).finished:
            finished[name] = predictions(config, folder, data)
    text = table(arguments, finished, data)
    print(text)
    if arguments.output:
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
