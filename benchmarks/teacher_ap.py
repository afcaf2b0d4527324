"""AP of the published teacher on every annotated set of photographs: ``python benchmarks/teacher_ap.py --data DIR``.

Each measurement goes to a JSON file; one that is there already is kept, so a stopped run goes on where it stopped.
``README.md`` beside them is made from all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

from featherface import FaceDetector
from featherface.evaluation.report import AVERAGE_PRECISION_RULES, WIDER_RULES
from featherface.evaluation.run import evaluate
from featherface.files import atomic_write
from ffkernels.info import info

# Data set, protocol, whether it is a part of WIDER FACE val, multiple that inputs are padded to.
RUNS = (
    ("wider_val_bench", "orig", True, 1),
    ("wider_val_bench", "vga640", True, 1),
    ("wider_val_bench", "s1600", True, 1),
    ("wider_val_bench", "orig", True, 32),
    ("eden_mask", "orig", False, 1),
    ("dlib_examples", "orig", False, 1),
    ("dlib_examples", "orig", False, 32),
    ("ytf_keypoints", "orig", False, 1),
    ("ytf_keypoints", "orig", False, 32),
    ("wider_val_train", "orig", True, 1),
)
SIZES = ("all", "tiny", "small", "medium", "large")
COMMAND = "python benchmarks/teacher_ap.py --data DIR"
HERE = Path(__file__).parent


def file_name(name: str, protocol: str, multiple: int) -> str:
    return f"{name}_{protocol}{'' if multiple == 1 else f'_multiple{multiple}'}.json"


def measure(data: Path, weights: Path, output: Path, device: str, only: list[str]) -> None:
    for name, protocol, official, multiple in RUNS:
        target = output / file_name(name, protocol, multiple)
        if target.exists() or (only and target.stem not in only):
            continue
        print(f"{name}, {protocol}, inputs padded to a multiple of {multiple}", flush=True)
        report = evaluate(
            FaceDetector(weights, "featherface_v1_ssh", device),
            data / "faces" / name,
            protocol,
            ground_truth=data / "widerface_gt" if official else None,
            multiple=multiple,
        )
        report.print()
        machine = info()
        content = {
            **report.to_dict(),
            "command": COMMAND,
            "revision": revision(),
            "processor": machine["processor"],
            "threads": machine["threads"],
            "gpus": machine["gpus"] if report.device != "cpu" else [],
        }
        with atomic_write(target) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def revision() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def percent(entry: dict) -> str:
    if entry["ap"] is None:
        return "-"
    return f"{100 * entry['ap']:.1f} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def write_readme(output: Path) -> None:
    contents = []
    for name, protocol, _, multiple in RUNS:
        path = output / file_name(name, protocol, multiple)
        if path.exists():
            contents.append(json.loads(path.read_text(encoding="utf-8")))
    if not contents:
        return
    first = contents[0]
    official, plain, landmarks = [], [], []
    for content in contents:
        protocol = content["protocol"]["name"]
        if content["input_multiple"] > 1:
            protocol += f", padded to a multiple of {content['input_multiple']}"
        name = [f"`{content['data_set']}`, {protocol}", str(content["images"])]
        results = content["average_precision"]
        if WIDER_RULES in results:
            official.append(name + [percent(results[WIDER_RULES][s]) for s in ("easy", "medium", "hard")])
        sizes = results[AVERAGE_PRECISION_RULES]
        plain.append(name + [str(sizes["all"]["faces"])] + [percent(sizes[s]) for s in SIZES])
        if "landmark_error" in content:
            error = content["landmark_error"]
            values = [f"{100 * error[key]:.2f}" for key in ("mean", "median")]
            landmarks.append([*name, *values, f"{error['found']} of {error['faces']}"])
    dates = sorted(content["date"][:10] for content in contents)
    devices = ", ".join(sorted({f"{content['processor']}, device {content['device']}" for content in contents}))
    versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items() if key != "featherface")
    lines = [
        "# The published teacher's average precision",
        "",
        f"`{first['model']}`, weights `{first['weights']}` (SHA-256 `{first['weights_sha256']}`), "
        f"score > {first['score_threshold']:g}, NMS {first['nms_threshold']:g}. "
        f"Measured {' to '.join(sorted({dates[0], dates[-1]}))} with {versions}; "
        f"{devices}. In brackets: 95 % bootstrap interval over images, {first['bootstrap_replicates']} replicates. "
        "This page and the JSON files beside it come from",
        "",
        f"    {COMMAND}",
        "",
        "Protocols: "
        + "; ".join(sorted({f"`{c['protocol']['name']}`, {c['protocol']['description']}" for c in contents}))
        + ". Images are not padded unless a row says so.",
        "",
        "## By WIDER FACE's rules, restricted to the images of the set",
        "",
        *table(["set, protocol", "images", "easy", "medium", "hard"], official),
        "`wider_val_train` holds re-encoded images of 512 to 960 pixels, scored in original pixels: its numbers cannot "
        "be set beside published ones.",
        "",
        "## AP at IoU 0.5, by size of face",
        "",
        "Size is the square root of the box's area in stored pixels: tiny below 16, small below 32, medium below 96.",
        "",
        *table(["set, protocol", "images", "faces", *SIZES], plain),
        "`eden_mask` leaves many small and averted faces unlabelled; the boxes of `dlib_examples` are tight squares, "
        "those of `ytf_keypoints` are derived from landmarks, so their AP says little about boxes.",
        "",
        "## Landmark error",
        "",
        "Mean distance of the five landmarks from their places, in percent of the distance between the eyes.",
        "",
        *table(["set, protocol", "images", "mean", "median", "found"], landmarks),
        "The network was trained on 640 x 640 images, and its bottom-up max-pooling pads by TensorFlow's SAME rule: "
        "windows start at pixel 2 i of a map of even size and at 2 i - 1 of one of odd size. Where both sides of an "
        "image are multiples of 32, all pooled maps are even, as in training; elsewhere landmarks are displaced, while "
        "boxes hardly suffer. `FaceDetector` pads to a multiple of 32 by default.",
    ]
    with atomic_write(output / "README.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FEATHERFACE_DATA"), help="folder of shared data")
    parser.add_argument("--weights", type=Path, help="default: DATA/weights/featherface_v1_published.pth")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "teacher_ap")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[], help="measure these alone, such as wider_val_bench_orig")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data DIR or set FEATHERFACE_DATA")
    weights = arguments.weights or arguments.data / "weights" / "featherface_v1_published.pth"
    try:
        measure(arguments.data, weights, arguments.output, arguments.device, arguments.only)
    finally:
        write_readme(arguments.output)


if __name__ == "__main__":
    main()
