"""Time of a whole step of distillation, student and teacher, with FF_USE_FUSED=0 and 1.

    python benchmarks/distillation_step.py --batch 8 --size 640 --threads 2 1 --output distillation_step.json

A step is what ``featherface train`` does with a batch: the teacher's and the student's forward passes, target
assignment, all loss terms, backward, clipping, AdamW, moving average; preparing the batch is not part of it. Two
trainers with the same weights take turns on the same batches of made-up photographs; the losses of their first steps
are compared before anything is timed. ``--features`` adds the term of the teacher's features, for which the fused
teacher runs as a module and not in an inference engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from featherface.files import atomic_write
from featherface.models import create_model, save_weights
from featherface.training import override, preset
from featherface.training.trainer import Trainer, World
from ffkernels.info import info

TEACHER = "featherface_v1_ssh"


def make_data(root: Path, images: int, size: int) -> None:
    """Noise with about twelve annotated squares a photograph, and a teacher with random weights."""
    rng = np.random.default_rng(0)
    folder = root / "faces" / "images"
    folder.mkdir(parents=True)
    lines = []
    for number in range(images):
        name = f"{number}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        coarse.resize((size, size)).save(folder / name)
        sides = np.exp(rng.uniform(np.log(10), np.log(size / 3), 12)).round()
        corners = (rng.random((12, 2)) * (size - sides[:, None])).round()
        lines += [name, "12"]
        lines += [f"{x:g} {y:g} {side:g} {side:g} 0 0 0 0 0 0" for (x, y), side in zip(corners, sides)]
    (root / "faces" / "faces_bbx_gt.txt").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    save_weights(create_model(TEACHER), root / "teacher.safetensors")


def make_trainer(root: Path, fused: str, arguments: argparse.Namespace) -> Trainer:
    changes = [
        f"data.root={root}",
        'data.sources=[{folder="faces"}]',
        f"batches.size={arguments.batch}",
        "batches.workers=0",
        f"augmentation.sizes=[{arguments.size}]",
        f"model.fused={fused}",
        "model.backbone_weights=",
        "distillation.weights=teacher.safetensors",
        f"distillation.feature_weight={0.5 if arguments.features else 0.0}",
        "runtime.device=cpu",
    ]
    config = override(preset("default"), changes)
    return Trainer(config, root / f"run_{fused}", False, World(0, 1, torch.device("cpu")), quiet=True)


def measure(arguments: argparse.Namespace, threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root, 2 * arguments.batch, arguments.size)
        trainers = {fused: make_trainer(root, fused, arguments) for fused in ("0", "1")}
        batches = list(trainers["0"].loader.epoch(0))
        losses = {}
        for fused, trainer in trainers.items():
            trainer.images = 0
            trainer._step([batches[0]])
            losses[fused] = float(trainer.sums["loss"])
        if abs(losses["1"] / losses["0"] - 1) > 1e-3:
            sys.exit(f"the trainers do not agree: first losses {losses}")
        times: dict[str, list[float]] = {fused: [] for fused in trainers}
        for number in range(arguments.rounds):
            for fused, trainer in trainers.items():
                start = time.perf_counter()
                trainer._step([batches[number % len(batches)]])
                times[fused].append((time.perf_counter() - start) * 1e3)
        for trainer in trainers.values():
            trainer.close()
    plain = statistics.median(times["0"])
    rows = []
    for fused, values in times.items():
        median = statistics.median(values)
        rows.append({"FF_USE_FUSED": fused, "threads": threads, "ms": median, "least_ms": min(values)})
        rows[-1] |= {"speedup": plain / median, "images_per_second": 1e3 * arguments.batch / median}
        print(f"{threads} threads  FF_USE_FUSED={fused}  {median:8.1f} ms  {plain / median:5.2f}x", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--size", type=int, default=640, help="side of the views in pixels (default: 640)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="numbers of threads (default: 2 1)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each (default: 7)")
    parser.add_argument("--features", action="store_true", help="distil the teacher's features too")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    rows = [row for threads in arguments.threads for row in measure(arguments, threads)]
    if arguments.output:
        names = ("batch", "size", "rounds", "features")
        setting = {"student": "featherface_v2", "teacher": TEACHER} | {name: getattr(arguments, name) for name in names}
        with atomic_write(arguments.output) as path:
            path.write_text(json.dumps({"setting": setting, "rows": rows, "machine": info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
