"""AP and landmark error of the shipped models and their teacher: ``python benchmarks/accuracy.py --data DIR``.

Each measurement goes to a JSON file; one that is there already is kept, so a stopped run goes on where it stopped.
``README.md`` beside them is made from all of them. Where the students are measured, the file also holds the paired
difference from the teacher on the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from featherface import FaceDetector
from featherface.evaluation.report import AVERAGE_PRECISION_RULES, WIDER_RULES, Report
from featherface.evaluation.run import evaluate
from featherface.files import atomic_write
from ffkernels.info import info

TEACHER = "featherface_v1_ssh"
STUDENTS = ("featherface_v2", "featherface_v2_ultra")
# Data set, protocol, whether it is a part of WIDER FACE val, multiple that inputs are padded to, whether the students
# are measured too.
RUNS = (
    ("wider_val_bench", "orig", True, 1, True),
    ("wider_val_bench", "vga640", True, 1, True),
    ("wider_val_bench", "qvga320", True, 1, True),
    ("wider_val_bench", "s1600", True, 1, False),
    ("wider_val_bench", "orig", True, 32, False),
    ("dlib_examples", "orig", False, 32, True),
    ("ytf_keypoints", "orig", False, 32, True),
    ("eden_mask", "orig", False, 1, False),
    ("dlib_examples", "orig", False, 1, False),
    ("ytf_keypoints", "orig", False, 1, False),
    ("wider_val_train", "orig", True, 1, False),
)
SIZES = ("all", "tiny", "small", "medium", "large")
SUBSETS = ("easy", "medium", "hard")
COMMAND = "python benchmarks/accuracy.py --data DIR"
HERE = Path(__file__).parent


def file_name(name: str, protocol: str, multiple: int) -> str:
    return f"{name}_{protocol}{'' if multiple == 1 else f'_multiple{multiple}'}.json"


def measure(data: Path, weights: dict[str, Path | None], output: Path, device: str, only: list[str]) -> None:
    for name, protocol, official, multiple, students in RUNS:
        file = file_name(name, protocol, multiple)
        models = [TEACHER, *(STUDENTS if students else ())]
        wanted = [model for model in models if not (output / model / file).exists()]
        if not wanted or (only and Path(file).stem not in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            # The teacher's predictions are what the students are compared with.
            predictions = Path(folder) / TEACHER
            for model in [TEACHER, *(m for m in wanted if m != TEACHER)]:
                print(f"{model}: {name}, {protocol}, inputs padded to a multiple of {multiple}", flush=True)
                report = evaluate(
                    FaceDetector(weights[model], model, device),
                    data / "faces" / name,
                    protocol,
                    ground_truth=data / "widerface_gt" if official else None,
                    multiple=multiple,
                    **({"save_predictions": predictions} if model == TEACHER else {"baseline": predictions}),
                )
                report.print()
                if model in wanted:
                    save(report, output / model / file)


def save(report: Report, path: Path) -> None:
    machine = info()
    content = {
        **report.to_dict(),
        "command": COMMAND,
        "revision": revision(),
        "processor": machine["processor"],
        "threads": machine["threads"],
        "gpus": machine["gpus"] if report.device != "cpu" else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
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


def percent(entry: dict | None, sign: str = "") -> str:
    if entry is None or entry["ap"] is None:
        return "-"
    ap, low, high = (f"{100 * entry[key]:{sign}.1f}" for key in ("ap", "low", "high"))
    return f"{ap} ({low} to {high})"


def difference(entry: dict) -> str:
    return percent(entry.get("difference"), "+")


def write_readme(output: Path) -> None:
    contents = []
    for name, protocol, _, multiple, _ in RUNS:
        paths = (output / model / file_name(name, protocol, multiple) for model in (TEACHER, *STUDENTS))
        contents += [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not contents:
        return
    official, against, plain, landmarks = [], [], [], []
    for content in contents:
        protocol = content["protocol"]["name"]
        if content["input_multiple"] > 1:
            protocol += f", padded to a multiple of {content['input_multiple']}"
        name = [f"`{content['data_set']}`, {protocol}", f"`{content['model']}`"]
        results = content["average_precision"]
        sizes = results[AVERAGE_PRECISION_RULES]
        if WIDER_RULES in results:
            official.append(name + [percent(results[WIDER_RULES][s]) for s in SUBSETS])
            if content["model"] != TEACHER:
                against.append(
                    name + [difference(results[WIDER_RULES][s]) for s in SUBSETS] + [difference(sizes["all"])]
                )
        plain.append(name + [str(sizes["all"]["faces"])] + [percent(sizes[s]) for s in SIZES])
        if "landmark_error" in content:
            error = content["landmark_error"]
            values = [f"{100 * error[key]:.2f}" for key in ("mean", "median")]
            landmarks.append([*name, *values, f"{error['found']} of {error['faces']}"])
    made = sorted(
        {
            f"- `{c['model']}`, weights `{Path(c['weights']).name}` (SHA-256 `{c['weights_sha256']}`), "
            f"{c['date'][:10]}, {c['processor']}, device {c['device']}, torch {c['versions']['torch']}"
            for c in contents
        }
    )
    first = contents[0]
    lines = [
        "# Average precision and landmark error",
        "",
        f"Of the students that come with the package and of their teacher, score > {first['score_threshold']:g}, "
        f"NMS {first['nms_threshold']:g}. In brackets: 95 % bootstrap interval over images, "
        f"{first['bootstrap_replicates']} replicates. This page and the JSON files beside it come from",
        "",
        f"    {COMMAND}",
        "",
        *made,
        "",
        "Protocols: "
        + "; ".join(sorted({f"`{c['protocol']['name']}`, {c['protocol']['description']}" for c in contents}))
        + ". Images are not padded unless a row says so.",
        "",
        "## By WIDER FACE's rules, restricted to the images of the set",
        "",
        *table(["set, protocol", "model", *SUBSETS], official),
        "`wider_val_bench` took no part in any training. `wider_val_train` holds re-encoded images of 512 to 960 "
        "pixels, scored in original pixels: its numbers cannot be set beside published ones.",
        "",
        "## Students less the teacher, on the same images",
        "",
        "Paired bootstrap over images; the last column is plain AP at IoU 0.5.",
        "",
        *table(["set, protocol", "model", *SUBSETS, "all faces"], against),
        "## AP at IoU 0.5, by size of face",
        "",
        "Size is the square root of the box's area in stored pixels: tiny below 16, small below 32, medium below 96.",
        "",
        *table(["set, protocol", "model", "faces", *SIZES], plain),
        "`eden_mask` leaves many small and averted faces unlabelled; the boxes of `dlib_examples` are tight squares, "
        "those of `ytf_keypoints` are derived from landmarks, so their AP says little about boxes.",
        "",
        "## Landmark error",
        "",
        "Mean distance of the five landmarks from their places, in percent of the distance between the eyes.",
        "",
        *table(["set, protocol", "model", "mean", "median", "found"], landmarks),
        "The teacher was trained on 640 x 640 images, and its bottom-up max-pooling pads by TensorFlow's SAME rule: "
        "windows start at pixel 2 i of a map of even size and at 2 i - 1 of one of odd size. Where both sides of an "
        "image are multiples of 32, all pooled maps are even, as in training; elsewhere landmarks are displaced, while "
        "boxes hardly suffer. `FaceDetector` pads to a multiple of 32 by default.",
    ]
    with atomic_write(output / "README.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FEATHERFACE_DATA"), help="folder of shared data")
    parser.add_argument("--teacher", type=Path, help="default: DATA/weights/featherface_v1_published.pth")
    parser.add_argument("--v2", type=Path, help="V2's weights; default: those of the package")
    parser.add_argument("--ultra", type=Path, help="V2 Ultra's weights; default: those of the package")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "accuracy")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[], help="measure these alone, such as wider_val_bench_orig")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data DIR or set FEATHERFACE_DATA")
    teacher = arguments.teacher or arguments.data / "weights" / "featherface_v1_published.pth"
    weights = dict(zip((TEACHER, *STUDENTS), (teacher, arguments.v2, arguments.ultra)))
    try:
        measure(arguments.data, weights, arguments.output, arguments.device, arguments.only)
    finally:
        write_readme(arguments.output)


if __name__ == "__main__":
    main()
