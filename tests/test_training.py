"""The training loop on a handful of tiny synthetic photographs."""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from faces import make_faces
from marks import MarkDetector, boxes_of, paint
from PIL import Image

import featherface
import ffkernels.engine
from featherface.cli import main
from featherface.data import Source, load_data
from featherface.errors import CheckpointError, DataError, FeatherFaceError
from featherface.evaluation import SIZES
from featherface.files import sha256
from featherface.models import save_weights
from featherface.training import (
    Config,
    ConfigError,
    Trainer,
    TrainingError,
    comparison,
    from_dict,
    override,
    preset,
    train,
)
from featherface.training import run_folder as run_folder_module
from featherface.training import trainer as trainer_module
from featherface.training.averaging import average_weights
from featherface.training.config import Validation
from featherface.training.curves import draw_curves
from featherface.training.data import read_data
from featherface.training.model_card import model_card
from featherface.training.network import Network, Teacher, check_anchors, predict, set_prior
from featherface.training.optimizer import WeightAverage
from featherface.training.run_folder import RunFolder, Table
from featherface.training.trainer import World
from featherface.training.validation import detect_validation

ROOT = Path(__file__).parent.parent
EPOCHS, STEPS = 2, 6
"""Of the runs below: 6 photographs, one for validation perhaps, in batches of 2, twice each."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Rounding depends on the number of threads; subprocesses get one too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *_: True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root: annotated and unlabelled photographs, a teacher's weights."""
    folder = tmp_path_factory.mktemp("data")
    make_faces(folder / "annotated", 6)
    make_faces(folder / "plain", 3, seed=9)
    torch.manual_seed(3)
    save_weights(featherface.create_model("featherface_v1"), folder / "teacher.safetensors")
    return folder


def make_config(root, **changes) -> Config:
    values = {
        "data": {
            "root": str(root),
            "sources": [
                {"folder": "annotated", "validation": 0.3, "weight": 2.0},
                {"folder": "plain", "labels": "none"},
            ],
            "split_seed": 4,
        },
        "augmentation": {"sizes": [64]},
        "batches": {"size": 2, "workers": 0},
        "distillation": {"teacher": "featherface_v1", "weights": "teacher.safetensors"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"epochs": EPOCHS, "warmup_epochs": 0.5},
        "validation": {"every": 1},
        "runtime": {"device": "cpu", "log_every": 2, "checkpoint_minutes": 0.0, "seed": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return from_dict(values)


def weights(folder, name="final.safetensors"):
    return safetensors.torch.load_file(folder / name)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder, name):
    """The table without what depends on the clock."""
    with open(folder / name, newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "loader_share")}
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    result = train(make_config(root), folder, quiet=True)
    assert result.finished and result.epoch == EPOCHS
    return folder, result


def assert_same_run(folder, reference):
    assert same_weights(weights(folder), weights(reference))
    assert same_weights(weights(folder, "best.safetensors"), weights(reference, "best.safetensors"))
    for name in ("metrics.csv", "validation.csv"):
        assert rows(folder, name) == rows(reference, name)


def test_a_run_leaves_what_it_should(root, reference):
    folder, result = reference
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.toml", "run.json", "metrics.csv", "validation.csv", "last.pt", "previous.pt", "run.lock"}
    assert names >= {"best.safetensors", "final.safetensors", "model_card.md"}
    assert not [name for name in names if name.startswith(".") or "bad" in name]
    metrics = rows(folder, "metrics.csv")
    assert [int(row["step"]) for row in metrics] == list(range(2, result.step + 1, 2))
    assert all(math.isfinite(float(value)) for row in metrics for value in row.values())
    total = sum(
        float(metrics[0][name]) for name in metrics[0] if name in ("class", "box", "landmark") or "teacher" in name
    )
    assert float(metrics[0]["loss"]) == pytest.approx(total, rel=1e-4)
    assert [row["epoch"] for row in rows(folder, "validation.csv")] == ["1", "2"]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["torch"] == torch.__version__ and "git" in facts
    model = featherface.create_model("featherface_v2", weights=folder / "final.safetensors")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(name.startswith("adapters") for name in weights(folder))


def test_the_card_states_what_the_run_says(reference):
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "accuracy" / "featherface_v1_ssh"
    report = json.loads((results / "wider_val_bench_orig.json").read_text())
    timing = {"case": "640x640, batch 1", "contender": "engine", "median_ms": 12.345}
    protocol = {"threads": 2, "model": "featherface_v2"}
    machine = {"machine": {"processor": "Some CPU"}, "protocol": protocol, "date": "2026-01-02T03:04:05"}
    card = model_card(reference[0], {"Bench": report}, speed=[{**machine, "timings": [timing]}])
    for text in (
        "256,148 parameters, 0.869 GFLOP",
        "| backbone | 213,072 |",
        "`annotated`: annotated, 30 % of it",
        "featherface_v1",
        "### Bench",
        "| Some CPU | 2 | 640x640, batch 1 | engine | 12.35 | 2026-01-02 |",
        "MIT",
    ):
        assert text in card
    easy = report["average_precision"]["WIDER FACE"]["easy"]
    assert f"| WIDER FACE | easy | {easy['faces']} | {100 * easy['ap']:.1f} |" in card
    average = reference[0].parent / "average.safetensors"
    average_weights([reference[0] / "final.safetensors"] * 2, average, [1, 3])
    assert "averaged with other weights of the model: 0.25 of `final.safetensors`" in model_card(
        reference[0], weights=average
    )
    own = (reference[0] / "model_card.md").read_text()
    assert "Not measured on any other data" in own and "## Speed\n\nNot measured." in own
    unfound = report | {"landmark_error": {"mean": None, "median": None, "found": 0, "faces": 7}}
    assert "none of the 7 faces with landmarks was found" in model_card(reference[0], {"Bench": unfound})
    with pytest.raises(FeatherFaceError, match="no checkpoint"):
        model_card(reference[0].parent / "absent")


def test_the_card_command(reference, tmp_path, capsys):
    folder, weights = reference[0], reference[0] / "final.safetensors"
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "accuracy" / "featherface_v2"
    report = json.loads((results / "wider_val_bench_vga640.json").read_text())
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(report | {"weights_sha256": sha256(weights)}))
    speed, card = results / "speed.json", tmp_path / "card.md"
    assert main(["card", str(folder), str(mine), str(speed), "--output", str(card)]) == 0
    assert card.read_text() == model_card(
        folder, {"wider_val_bench, vga640": json.loads(mine.read_text())}, speed=[json.loads(speed.read_text())]
    )
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out == (folder / "model_card.md").read_text()
    other = tmp_path / "other.json"
    other.write_text("[1]")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps(report | {"weights": None, "weights_sha256": None}))
    part = tmp_path / "part.json"
    part.write_text(json.dumps({"average_precision": {}}))
    for arguments, message in {
        (folder, mine, mine): "a second result of wider_val_bench, vga640",
        (folder, part): "no whole report",
        (folder, results / "wider_val_bench_vga640.json"): "measured with other weights",
        (folder, foreign): "does not say which",
        (folder, other): "holds no result",
        (folder, weights): "as JSON",
        (folder, results.parent / "featherface_v2_ultra" / "speed.json"): "times of featherface_v2_ultra",
        (tmp_path,): "no checkpoint",
    }.items():
        assert main(["card", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


class Crash(Exception):
    pass


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_crashes_resumes_with_the_same_bits(root, reference, tmp_path, monkeypatch, step):
    """As SIGKILL would: at some step, with nothing written on the way out."""
    original = Trainer._step

    def crash(self, batches):
        if self.step == step:
            raise Crash
        original(self, batches)

    monkeypatch.setattr(Trainer, "_step", crash)
    with pytest.raises(Crash):
        train(make_config(root), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    result = train(make_config(root, batches__workers=1), tmp_path / "run", resume=True, quiet=True)
    assert result.finished
    assert_same_run(tmp_path / "run", reference[0])


@pytest.mark.parametrize("call", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_crash_while_a_checkpoint_is_written_loses_nothing(root, reference, tmp_path, monkeypatch, call):
    calls = []
    replace = os.replace

    def crash(source, target):
        if str(target).endswith(("last.pt", "previous.pt")):
            calls.append(target)
            if len(calls) == call:
                raise Crash
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Crash):
        train(make_config(root), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    assert RunFolder.peek(tmp_path / "run") is not None
    assert train(make_config(root), tmp_path / "run", resume=True, quiet=True).finished
    assert_same_run(tmp_path / "run", reference[0])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(root, reference, tmp_path):
    train(make_config(root), tmp_path / "run", stop_after=0, quiet=True)
    train(make_config(root), tmp_path / "run", resume=True, stop_after=0, quiet=True)
    (tmp_path / "run" / "last.pt").write_bytes(b"cut short")
    assert train(make_config(root), tmp_path / "run", resume=True, quiet=True).finished
    assert_same_run(tmp_path / "run", reference[0])
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        train(make_config(root), tmp_path / "run", resume=True, quiet=True)


def command(root, folder, *more):
    config = folder.parent / f"{folder.name}.json"
    config.write_text(json.dumps(make_config(root).to_dict()))
    return [sys.executable, "-m", "featherface.training", str(folder), "--config", str(config), "--quiet", *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FF_USE_FUSED": "0"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_killed_process_resumes_with_the_same_bits(root, reference, tmp_path, number):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(root, folder), env=environment(), stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (folder / "last.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    finished = (folder / "final.safetensors").exists()
    assert finished or process.returncode == (128 + number if number == signal.SIGTERM else -number), errors
    assert train(make_config(root), folder, resume=True, quiet=True).finished
    assert_same_run(folder, reference[0])


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(root, tmp_path):
    """A limit on the size of files stands for a disk without space."""
    folder = tmp_path / "run"
    script = (
        "import resource, sys; from featherface.training.__main__ import main;"
        "from featherface.training import run_folder as r; save = r.RunFolder.save\n"
        "def limited(self, state):\n"
        "    if state['step'] == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.RLIM_INFINITY))\n"
        "    save(self, state)\n"
        "r.RunFolder.save = limited; sys.exit(main())"
    )
    arguments = command(root, folder)
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments[3:]], env=environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 2
    assert "cannot be written" in process.stderr and "resume" in process.stderr and "Traceback" not in process.stderr
    assert RunFolder.peek(folder)["step"] == 1
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert train(make_config(root), folder, resume=True, quiet=True).finished


def test_too_little_space_is_known_before_the_first_step(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(TrainingError, match=r"MiB left, the run needs"):
        train(make_config(root), tmp_path / "run", quiet=True)


def test_folders_that_cannot_be_used(root, reference, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written to"):
        train(make_config(root), tmp_path / "file", quiet=True)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(TrainingError, match="cannot be written to"):
            train(make_config(root), tmp_path / "closed", quiet=True)
    with pytest.raises(TrainingError, match="holds a run already"):
        train(make_config(root), reference[0], quiet=True)
    held = RunFolder(tmp_path / "held")
    with pytest.raises(TrainingError, match="another process is training"):
        train(make_config(root), tmp_path / "held", quiet=True)
    held.close()
    with pytest.raises(TrainingError, match=r"other values of optimizer\.lr"):
        train(make_config(root, optimizer__lr=5e-4), reference[0], resume=True, quiet=True)


def test_a_finished_run_stays_as_it_is(root, reference):
    before = weights(reference[0])
    result = train(make_config(root), reference[0], resume=True, quiet=True)
    assert result.finished and result.ap["all"] == reference[1].ap["all"]
    assert same_weights(before, weights(reference[0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__sources": []}, DataError, "no images to train on"),
        ({"data__sources": [{"folder": "absent"}]}, DataError, "is not a folder"),
        ({"distillation__teacher": ""}, TrainingError, "have no annotations and there is no teacher"),
        ({"distillation__weights": ""}, TrainingError, "has no weights"),
        ({"distillation__teacher": "resnet"}, TrainingError, "no teacher 'resnet'"),
        ({"distillation__teacher": "featherface_v2"}, CheckpointError, "is a checkpoint of featherface_v1"),
        ({"distillation__weights": "absent.pth"}, CheckpointError, "missing"),
        ({"model__name": "yolo"}, FeatherFaceError, "there is no model 'yolo'"),
        ({"model__weights": "teacher.safetensors"}, CheckpointError, "is a checkpoint of featherface_v1"),
        ({"model__options": {"width": 2}}, FeatherFaceError, "no option width"),
        ({"runtime__device": "tpu"}, FeatherFaceError, r"runtime\.device"),
        ({"data__memory_limit_gb": 1e-6}, DataError, "memory_limit_gb"),
    ],
)
def test_mistakes_are_found_before_the_first_step(root, tmp_path, changes, error, message, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(error, match=message):
        train(make_config(root, **changes), tmp_path / "run", quiet=True)
    RunFolder(tmp_path / "run").close()


def test_a_teacher_with_other_anchors_is_refused(root, tmp_path, monkeypatch):
    teacher = featherface.create_model("featherface_v1")
    for heads, channels in ((teacher.ClassHead, 6), (teacher.BboxHead, 12), (teacher.LandmarkHead, 30)):
        for level in range(3):
            heads[level] = torch.nn.Conv2d(74, channels, 1)
    with pytest.raises(CheckpointError, match="the teacher has other anchors"):
        check_anchors(teacher, "the teacher")


def test_a_loss_that_is_not_a_number_stops_the_run(root, tmp_path, monkeypatch):
    original = Trainer._losses

    def losses(self, batch):
        terms = original(self, batch)
        return {**terms, "box": terms["box"] * float("nan")} if self.step == 3 else terms

    monkeypatch.setattr(Trainer, "_losses", losses)
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan .*bad_batch\.pt"):
        train(make_config(root), tmp_path / "run", quiet=True)
    saved = torch.load(tmp_path / "run" / "bad_batch.pt", weights_only=True)
    assert saved["images"].shape == (2, 3, 64, 64) and len(saved["names"]) == 2 and saved["step"] == 3
    assert all(torch.isfinite(v).all() for v in RunFolder.peek(tmp_path / "run")["network"].values())


def test_a_loss_that_runs_away_stops_the_run(root, tmp_path, monkeypatch):
    original = Trainer._losses
    monkeypatch.setattr(trainer_module, "DIVERGENCE_STEPS", 3)
    monkeypatch.setattr(
        Trainer,
        "_losses",
        lambda self, b: {k: v * (1e4 if self.step == 5 else 1) for k, v in original(self, b).items()},
    )
    with pytest.raises(TrainingError, match=r"50 times its running mean.* --set runtime\.divergence=0"):
        train(make_config(root), tmp_path / "run", quiet=True)
    assert train(make_config(root, runtime__divergence=0.0), tmp_path / "run", resume=True, quiet=True).finished


@pytest.mark.slow
def test_learning_a_few_photographs_by_heart(root, tmp_path):
    """Loss and AP show that loss, assignment, coordinates and validation fit together."""
    config = make_config(
        root,
        data__sources=[{"folder": "annotated"}],
        distillation__teacher="",
        augmentation__scales=[1.0],
        augmentation__tries=1,
        batches__views=1,
        batches__size=6,
        schedule__epochs=60,
        validation__every=0,
        optimizer__lr=4e-3,
        optimizer__weight_decay=0.0,
        average__decay=0.0,
        runtime__checkpoint_minutes=60.0,
    )
    for name in ("distort", "grey", "blur", "jpeg"):
        setattr(config.augmentation, name, 0.0)
    train(config, tmp_path / "run", quiet=True)
    metrics = rows(tmp_path / "run", "metrics.csv")
    assert float(metrics[-1]["loss"]) < 0.35 * float(metrics[0]["loss"])
    assert float(metrics[-1]["landmark"]) < 0.5 * float(metrics[0]["landmark"])


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime__amp": "bf16", "task__assigner": "simota", "task__box": "eiou"},
        pytest.param({"runtime__amp": "fp16", "runtime__channels_last": False}, marks=pytest.mark.slow),
        {"optimizer__name": "sgd", "optimizer__clip": 0.0, "batches__accumulate": 2, "average__decay": 0.0},
        {"optimizer__name": "muon"},
        {"model__name": "featherface_v2_ultra", "model__options": {"innovations": ["reuse", "dynamic"]}},
        {"distillation__teacher": "", "data__sources": [{"folder": "annotated"}], "task__assigner": "multibox"},
        pytest.param({"data__cache": "disk"}, marks=pytest.mark.slow),
        {"model__fused": "1"},
        {"model__fused": "0", "distillation__dtype": "bfloat16"},
        {"model__fused": "require", "distillation__dtype": "bfloat16", "distillation__feature_weight": 0.0},
    ],
    ids=["bf16", "fp16", "sgd", "muon", "ultra", "alone", "disk", "fused", "bf16 teacher", "bf16 engine"],
)
def test_options_run_together(root, tmp_path, changes):
    config = make_config(root, **{"schedule__epochs": 1, **changes})
    config.validation.limit = 1
    result = train(config, tmp_path / "run", quiet=True)
    assert result.finished
    name = config.model.name
    model = featherface.create_model(name, weights=tmp_path / "run" / "final.safetensors")
    assert dict(model.options) == (config.model.options if config.model.options else dict(model.options))
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path / "run", "metrics.csv"))


def test_remembering_the_teachers_outputs_changes_nothing(root, tmp_path):
    changes = {"distillation__feature_weight": 0.0, "batches__views": 1, "validation__every": 0}
    train(make_config(root, **changes), tmp_path / "plain", quiet=True)
    config = make_config(root, **changes, distillation__cache_gb=0.5)
    train(config, tmp_path / "cached", quiet=True)
    # A convolution rounds differently in another batch, and the memory's batch was another one.
    for cached, plain in zip(rows(tmp_path / "cached", "metrics.csv"), rows(tmp_path / "plain", "metrics.csv")):
        assert float(cached["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)


@pytest.mark.parametrize("fused", ["0", "1"])
def test_a_teacher_in_bfloat16_says_nearly_the_same(root, tmp_path, fused):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 50
    answers = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(
            root, model__fused=fused, distillation__feature_weight=0.0, distillation__dtype=dtype, validation__every=0
        )
        trainer = Trainer(config, tmp_path / dtype, False, World(0, 1, torch.device("cpu")), quiet=True)
        answers[dtype] = trainer.teacher(None, images)
        trainer.close()
    # An engine computes in float32 where the processor has no instructions for bfloat16.
    rounds = trainer.teacher.engine is None or trainer.teacher.engine.computes == "bfloat16"
    for exact, rounded in zip(answers["float32"][:3], answers["bfloat16"][:3]):
        difference = (rounded.float() - exact).abs().mean() / exact.abs().mean()
        assert float(difference) < 0.05 and (float(difference) > 0) == rounds


def test_the_teacher_answers_from_memory(root):
    model = featherface.create_model("featherface_v1")
    teacher = Teacher(model, 0.5, 2)
    batch = type("Batch", (), {"indices": torch.arange(2).numpy(), "epoch": 0})
    images = torch.randn(2, 3, 64, 64)
    first = teacher(batch, images)
    batch.epoch = 2
    second = teacher(batch, torch.zeros_like(images))
    assert teacher.remembered == 2 and all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
    batch.epoch = 1
    assert not torch.equal(teacher(batch, torch.zeros_like(images)).cls, first.cls)
    full = Teacher(model, 1e-9, 2)
    full(batch, images)
    full(batch, images)
    assert full.remembered == 0
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_predictions_are_the_models_own():
    model = featherface.create_model("featherface_v2").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        result, expected = predict(model, images), model(images, logits=True)
    assert all(torch.equal(a, b) for a, b in zip(result[:3], expected))
    assert [f.shape for f in result.features] == [(1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]
    assert Network(model)(images)[3] == ()


def test_the_prior_is_what_every_anchor_starts_with():
    model = featherface.create_model("featherface_v2")
    set_prior(model, 0.01)
    for head in model.heads():
        head.cls.weight.data.zero_()
    with torch.no_grad():
        cls = model.eval()(torch.randn(1, 3, 64, 64))[1]
    torch.testing.assert_close(cls[..., 1], torch.full_like(cls[..., 1], 0.01))


def test_two_processes_make_the_step_of_one_with_both_batches(root, tmp_path):
    """Two gloo processes with a batch each against one that accumulates both; losses that are means over anchors."""
    changes = {
        "schedule__epochs": 1,
        "schedule__warmup_epochs": 0.0,
        "data__sources": [{"folder": "annotated", "validation": 0.3}],
        "optimizer__name": "sgd",
        "optimizer__momentum": 0.0,
        "distillation__task_weight": 0.0,
        "distillation__class_kind": "kl",
        "distillation__box_weight": 0.0,
        "distillation__landmark_weight": 0.0,
        "distillation__feature_weight": 0.0,
        "average__decay": 0.0,
    }
    train(make_config(root, **changes, batches__accumulate=2), tmp_path / "one", quiet=True)
    (tmp_path / "two.json").write_text(json.dumps(make_config(root, **changes).to_dict()))
    arguments = [str(tmp_path / "two"), "--config", str(tmp_path / "two.json"), "--quiet"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*launcher, "-m", "featherface.training", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = featherface.create_model("featherface_v2").state_dict()
    moved = 0.0
    for name, value in one.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(two[name], value, atol=2e-6, rtol=1e-4)
            moved += float((value - start[name]).abs().sum())
    assert moved > 0
    assert len(rows(tmp_path / "two", "validation.csv")) == 1


def test_every_count_is_shared_by_the_processes(root, tmp_path, monkeypatch):
    trainer = Trainer(make_config(root), tmp_path / "run", False, World(0, 1, torch.device("cpu")), quiet=True)
    batch = next(trainer.loader.epoch(0, 0))
    own = {name: float(value.detach()) for name, value in trainer._losses(batch).items()}
    counts = []
    monkeypatch.setattr(trainer_module.dist, "all_reduce", lambda count: counts.append(float(count.mul_(2)) / 2))
    trainer.world = World(0, 2, trainer.device)
    shared = {name: float(value.detach()) for name, value in trainer._losses(batch).items()}
    trainer.close()
    # Positives, positives with landmarks; the teacher's positives, its faces over all anchors.
    assert shared == pytest.approx(own) and len(counts) == 4


def test_a_resumed_run_keeps_what_the_environment_said_when_it_began(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FF_USE_FUSED", "1")
    config = make_config(root, schedule__epochs=1, validation__every=0)
    train(config, tmp_path / "run", stop_after=0, quiet=True)
    assert 'fused = "1"' in (tmp_path / "run" / "config.toml").read_text() and config.model.fused == ""
    monkeypatch.delenv("FF_USE_FUSED")
    torch.set_num_threads(2)
    with contextlib.closing(
        Trainer(config, tmp_path / "run", True, World(0, 1, torch.device("cpu")), quiet=False)
    ) as trainer:
        assert {m.ff_policy.mode for m in trainer.student.modules() if hasattr(m, "ff_policy")} == {"1"}
    torch.set_num_threads(1)
    assert "ran with 1 CPU threads and goes on with 2" in "".join(capsys.readouterr())
    with pytest.raises(TrainingError, match=r"other values of model\.fused"):
        train(
            make_config(root, schedule__epochs=1, validation__every=0, model__fused="0"), tmp_path / "run", resume=True
        )


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.close()
    for name in (".last.abc.pt", ".final.abc.safetensors", ".mine.pt", "last.pt"):
        (tmp_path / name).write_bytes(b"x")
    RunFolder(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {".mine.pt", "last.pt", "run.lock"}


def test_landmarks_that_nothing_teaches_are_said(root, tmp_path, capsys):
    changes = {"schedule__epochs": 1, "validation__every": 0, "distillation__landmark_weight": 0.0}
    for name, taught, words in (("no", 0.0, "not trained; do not use them"), ("own", 0.1, "come from the annotations")):
        config = make_config(root, **changes, task__landmark_weight=taught)
        train(config, tmp_path / name)
        assert ("landmarks are not trained" in "".join(capsys.readouterr())) == (not taught)
        assert f"Landmarks {words}" in (tmp_path / name / "model_card.md").read_text().replace("were ", "")


def test_tables_that_lost_their_end_keep_the_rest(tmp_path):
    table = Table(tmp_path / "t.csv", ["a", "b"])
    assert table.restore(0)
    for i in range(5):
        table.add({"a": i, "b": "x" * i})
    whole = table.path.read_bytes()
    os.truncate(table.path, len(whole) - 3)
    assert not table.restore(len(whole))
    assert [row["a"] for row in table.read()] == ["0", "1", "2", "3"]
    table.add({"a": 9, "b": ""})
    assert table.read()[-1] == {"a": "9", "b": ""}
    table.path.unlink()
    assert not table.restore(len(whole)) and table.path.read_text().split() == ["a,b"]


def test_weights_are_compared_on_the_validation_part(root, reference, tmp_path, monkeypatch, capsys):
    folder, _ = reference
    sizes = []

    def detect(model, data, indices, config, channels_last):
        """The first model finds every face, the other one none of the first image's."""
        sizes.append(config.long_side)
        found = {}
        for place, index in enumerate(indices.tolist()):
            boxes = data.annotation(index).boxes[: 0 if place == 0 and model.name == "featherface_v1" else None]
            found[data.records[index].name] = np.column_stack([boxes, np.linspace(0.5, 0.9, len(boxes))])
        return found

    monkeypatch.setattr(comparison, "detect_validation", detect)
    files = [str(folder / "final.safetensors"), str(root / "teacher.safetensors")]
    settings, report = ["--config", str(folder / "config.toml"), "--device", "cpu"], tmp_path / "validation.json"
    arguments = ["validate", *files, *settings, "--long-side", "0", "--long-side", "96", "--json", str(report)]
    assert main([*arguments, "--limit", "3"]) == 0 and sizes == [0, 0, 96, 96]
    out = capsys.readouterr().out
    assert out.startswith("3 images, ") and out.index("stored size") < out.index("long side 96 pixels")
    document = json.loads(report.read_text())
    rows = document["results"]
    assert document["images"] == 3
    assert [(row["weights"], row["model"], row["long_side"]) for row in rows] == [
        (file, model, side) for side in (0, 96) for file, model in zip(files, ("featherface_v2", "featherface_v1"))
    ]
    first, second = (row["AP at IoU 0.5"]["all"] for row in rows[:2])
    assert first["ap"] == 1 and "difference" not in first and 0 < second["ap"] < 1
    assert second["difference"]["ap"] == pytest.approx(second["ap"] - 1, abs=1e-6) and second["difference"]["high"] <= 0

    for wrong, sentence in (
        ([files[0], str(tmp_path / "missing.safetensors")], "missing.safetensors"),
        ([files[0], "--set", 'data.sources=[{folder="annotated"}]'], "keeps no images for validation"),
    ):
        assert main(["validate", *wrong, *settings]) == 2
        assert sentence in capsys.readouterr().err


def test_decoded_pixels_are_where_the_configuration_says(root, tmp_path):
    config = override(preset("default"), [f"data.root={root}", 'data.sources=[{folder="annotated", validation=0.3}]'])
    config.data.cache_dir = str(tmp_path / "cache")
    read_data(config)
    assert not (tmp_path / "cache").exists()
    config.data.cache = "disk"
    read_data(config)
    assert list((tmp_path / "cache").glob("*.u8"))
    config.data.cache_dir = ""
    read_data(config, tmp_path / "run")
    assert list((tmp_path / "run").glob("*.u8"))
    with pytest.raises(ConfigError, match=r"data.cache_dir"):
        read_data(config)


def test_sources_can_be_given_as_objects():
    config = Config()
    config.data.sources = [Source("a")]
    assert override(config, ["optimizer.lr=0.1"]).data.sources == [Source("a")]


def test_tensorboard_is_written_or_its_absence_named(root, tmp_path):
    config = make_config(root, schedule__epochs=1, runtime__tensorboard=True)
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(TrainingError, match="needs tensorboard"):
            train(config, tmp_path / "run", quiet=True)
    else:
        train(config, tmp_path / "run", quiet=True)
        assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_curves_are_drawn(reference, tmp_path):
    pytest.importorskip("matplotlib")
    tables = [Table(reference[0] / name, []).read() for name in ("metrics.csv", "validation.csv")]
    assert draw_curves(*tables, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
    assert draw_curves([], [], tmp_path / "nothing.png") and not (tmp_path / "nothing.png").exists()


@pytest.mark.slow
def test_the_ablation_resumes_and_makes_its_table(root, tmp_path, monkeypatch, capsys):
    import training_ablation

    sources = 'data.sources=[{folder="annotated", validation=0.3}, {folder="plain", labels="none"}]'
    settings = ["data.split_seed=4", "distillation.teacher=featherface_v1", "distillation.weights=teacher.safetensors"]
    arguments = ["ablation", "--data", str(root), "--runs", str(tmp_path / "runs"), "--epochs", "1", "--size", "64"]
    arguments += ["--batch", "2", "--replicates", "20", "--only", "default", "EIoU", "ultra"]
    arguments += ["--output", str(tmp_path / "table.md")]
    for setting in [sources, *settings, "model.backbone_weights="]:
        arguments += ["--set", setting]
    monkeypatch.setattr(sys, "argv", arguments)
    training_ablation.main()
    first = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in first for name in ("default", "EIoU", "ultra"))
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("a finished run was trained again"))
    training_ablation.main()
    assert (tmp_path / "table.md").read_text() == first


def test_a_run_begun_before_an_option_existed_can_be_resumed(root, tmp_path):
    config = make_config(root)
    step = train(config, tmp_path / "run", quiet=True, stop_after=0.0).step
    for name in ("last.pt", "previous.pt"):
        if (path := tmp_path / "run" / name).exists():
            state = torch.load(path, weights_only=True)
            del state["config"]["model"]["transfer_weights"]
            torch.save(state, path)
    assert train(config, tmp_path / "run", resume=True, quiet=True, stop_after=0.0).step > step


def test_a_student_starts_from_what_it_has_in_common_with_another_model(root, tmp_path):
    other = featherface.create_model("featherface_v2")
    save_weights(other, tmp_path / "v2.safetensors")
    start = {"model__name": "featherface_v2_ultra", "model__transfer_weights": str(tmp_path / "v2.safetensors")}
    config = make_config(root, **start, optimizer__lr=0.0)
    assert train(config, tmp_path / "run", quiet=True, stop_after=0.0).step == 1
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["network"]
    started, source = dict(featherface.create_model("featherface_v2_ultra").named_parameters()), other.state_dict()
    common = [name for name, value in started.items() if name in source and value.shape == source[name].shape]
    assert len(common) > 100 and all(torch.equal(state[f"student.{name}"], source[name]) for name in common)


def test_the_teachers_engine_predicts_what_the_teacher_does(root, tmp_path):
    if (reason := ffkernels.engine.unavailable()) is not None:
        pytest.skip(reason)
    config = make_config(root, model__fused="1", distillation__feature_weight=0.0)
    trainer = Trainer(config, tmp_path, False, World(0, 1, torch.device("cpu")), quiet=True)
    try:
        assert trainer.teacher.engine is not None
        images = 50 * torch.randn(2, 3, 64, 64)
        batch = type("Batch", (), {"indices": torch.arange(2).numpy(), "epoch": 0})
        result, expected = trainer.teacher(batch, images), predict(trainer.teacher.model, images)
    finally:
        trainer.close()
    for a, e in zip(result[:3], expected[:3]):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())


def test_features_are_distilled_without_an_engine(root, tmp_path):
    config = make_config(root, model__fused="1", distillation__feature_weight=0.5)
    trainer = Trainer(config, tmp_path, False, World(0, 1, torch.device("cpu")), quiet=True)
    trainer.close()
    assert trainer.teacher.engine is None


def test_the_moving_average_of_parameters_and_buffers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    average = WeightAverage(model, 0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 1, 3, 3))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mean = decay * expected[name] + (1 - decay) * value
            expected[name] = mean if value.is_floating_point() else value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_validation_sees_what_the_detector_sees(tmp_path):
    marks = [(36, 44, 32), (216, 104, 128)]
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(paint(192, 320, marks)).save(folder / "images" / "a.png")
    rows = [f"{x - side / 2} {y - side / 2} {side} {side}" for x, y, side in marks]
    (folder / "label.txt").write_text("\n".join(["# a.png", *rows, ""]))
    data = load_data([Source("set")], tmp_path)
    for side, expected in ((0, (1, 3, 192, 320)), (640, (1, 3, 384, 640))):
        model = MarkDetector()
        options = Validation(long_side=side, score_threshold=0.5)
        (found,) = detect_validation(model, data, np.array([0]), options).values()
        assert model.inputs == [expected]
        np.testing.assert_allclose(found[np.lexsort(found[:, :4].T), :4], boxes_of(marks), atol=1.0)


def test_the_best_weights_are_the_averages_of_the_best_validation(root, tmp_path, monkeypatch):
    scores, written = iter((0.3, 0.5, 0.4)), []
    monkeypatch.setattr(trainer_module, "score", lambda *_: {"all": next(scores), **dict.fromkeys(SIZES, 0.0)})
    write = Trainer._write_weights

    def record(self, name, model):
        written.append((self.epoch, name))
        assert model is self.average.model
        write(self, name, model)

    monkeypatch.setattr(Trainer, "_write_weights", record)
    result = train(make_config(root, schedule__epochs=3), tmp_path / "run", quiet=True)
    assert result.best_ap == 0.5 and result.ap["all"] == 0.4
    assert written == [(1, "best.safetensors"), (2, "best.safetensors"), (3, "final.safetensors")]
    assert not same_weights(weights(tmp_path / "run"), weights(tmp_path / "run", "best.safetensors"))


def test_a_run_that_was_stopped_at_its_last_step_validates_when_it_is_resumed(root, reference, tmp_path, monkeypatch):
    run, step = tmp_path / "run", Trainer._step

    def last(self, batches):
        step(self, batches)
        if self.step == self.total_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", last)
    assert not train(make_config(root), run, quiet=True).finished
    monkeypatch.undo()
    assert train(make_config(root), run, resume=True, quiet=True).finished
    assert_same_run(run, reference[0])


def test_a_resumed_run_needs_the_weights_that_it_began_with_no_more(root, tmp_path):
    start, run = tmp_path / "start.safetensors", tmp_path / "run"
    save_weights(featherface.create_model("featherface_v2"), start)
    config = make_config(root, model__weights=str(start))
    assert not train(config, run, stop_after=0, quiet=True).finished
    start.unlink()
    assert train(config, run, resume=True, quiet=True).finished
