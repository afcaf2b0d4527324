"""The command line: detect, demo, info; bad input, exit codes, outputs that are whole or absent."""

import contextlib
import csv
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import MarkDetector, boxes_of, paint
from PIL import Image
from rich.table import Table

import featherface
from featherface.cli import main, options
from featherface.cli.inputs import expand
from featherface.detector import FaceDetector
from featherface.errors import FeatherFaceError, ImageError
from featherface.models import create_model, save_weights

ROOT = Path(featherface.__file__).parent.parent
MARKS = [(20, 36, 16), (100, 60, 32), (216, 120, 64)]


@pytest.fixture
def marks(monkeypatch):
    """``detect`` with a detector of red squares in the place of trained weights."""
    monkeypatch.setattr(
        "featherface.cli.detect.FaceDetector",
        lambda weights, model, *rest, **options: FaceDetector(None, MarkDetector(), *rest, **options),
    )


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(paint(200, 300, MARKS)).save(folder / "b.png")
    Image.fromarray(paint(90, 140, [(36, 44, 32)])).save(folder / "a.png")
    Image.fromarray(paint(64, 64, [])).save(folder / "deeper" / "c.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "v2.safetensors"
    torch.manual_seed(0)
    save_weights(create_model("featherface_v2"), path)
    return str(path)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The single sentence with which a command line is refused."""
    code, out, err = run(capsys, *arguments)
    assert code == 2, (code, out, err)
    assert err.startswith("featherface: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_counts_are_printed(capsys, marks, photos):
    code, out, err = run(capsys, "detect", photos / "b.png", photos / "a.png")
    assert (code, err) == (0, "")
    assert out == f"{photos / 'b.png'}: 3 faces\n{photos / 'a.png'}: 1 face\n"
    assert run(capsys, "detect", photos, "--quiet") == (0, "", "")


def test_folders_patterns_and_names(photos):
    def names(*arguments, **options):
        return [str(item.name) for item in expand([str(argument) for argument in arguments], **options)[0]]

    assert names(photos) == ["a.png", "b.png"]
    assert names(photos, recursive=True) == ["a.png", "b.png", os.path.join("deeper", "c.png")]
    assert names(f"{photos}/*.png") == ["a.png", "b.png"]
    assert names(f"{photos}/**/c.png") == ["c.png"]
    assert names(photos / "a.png", photos / "a.png", photos) == ["a.png", "a_2.png", "a_3.png", "b.png"]
    assert names("movie.mp4", "0") == ["movie.mp4", "camera_0"]
    assert [item.video for item in expand(["movie.mp4", "0", "x.png"])[0]] == [True, True, False]
    with pytest.raises(ImageError, match="no file matches"):
        expand([f"{photos}/*.jpg"])


def test_annotated_pictures_json_csv_and_crops(capsys, marks, photos, tmp_path):
    out, crops = tmp_path / "out", tmp_path / "crops"
    json_file, csv_file = tmp_path / "new" / "faces.json", tmp_path / "faces.csv"
    code, *_ = run(capsys, "detect", photos, "-r", "-o", out, "--json", json_file, "--csv", csv_file, "--crops", crops)
    assert code == 0
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == ["a.png", "b.png", "deeper/c.png"]
    with Image.open(out / "b.png") as drawn, Image.open(photos / "b.png") as original:
        assert drawn.size == original.size
        assert np.asarray(drawn.convert("RGB")).tolist() != np.asarray(original.convert("RGB")).tolist()
    document = json.loads(json_file.read_text())
    assert document["detector"]["model"] == "MarkDetector" and document["detector"]["score_threshold"] == 0.5
    results = {Path(result["file"]).name: result for result in document["results"]}
    assert [len(results[name]["faces"]) for name in ("a.png", "b.png", "c.png")] == [1, 3, 0]
    assert (results["b.png"]["width"], results["b.png"]["height"]) == (300, 200)
    boxes = sorted(face["box"] for face in results["b.png"]["faces"])
    np.testing.assert_allclose(boxes, sorted(boxes_of(MARKS).tolist()), atol=0.01)
    with open(csv_file, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["frame"] for row in rows} == {""}
    assert [row["face"] for row in rows if row["file"].endswith("b.png")] == ["0", "1", "2"]
    assert float(rows[0]["nose_x"]) == pytest.approx(36, abs=0.01)
    assert sorted(p.name for p in crops.iterdir()) == ["a_0.png", "b_0.png", "b_1.png", "b_2.png"]


def test_crops_are_aligned(capsys, monkeypatch, teacher_weights, data_dir, tmp_path):
    photo = data_dir / "faces" / "demo" / "images" / "ageitgey+face_recognition" / "two_people.jpg"
    code, out, _ = run(capsys, "detect", photo, "-w", teacher_weights, "--crops", tmp_path)
    assert code == 0 and out == f"{photo}: 2 faces\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two_people_0.png", "two_people_1.png"]
    detector = FaceDetector(teacher_weights, size=112, pad=0.5)
    for path in tmp_path.iterdir():
        with Image.open(path) as crop:
            assert crop.size == (112, 112)
        face = detector.detect(path)[0]
        from featherface.align import ARCFACE_TEMPLATE

        assert np.abs(face.landmarks[0] - ARCFACE_TEMPLATE).max() < 8


def test_a_face_that_cannot_be_aligned_is_reported(capsys, monkeypatch, photos, tmp_path):
    class Pointless(MarkDetector):
        def forward(self, x, logits=None):
            bbox, cls, landmarks = super().forward(x, logits)
            return bbox, cls, torch.zeros_like(landmarks)

    monkeypatch.setattr("featherface.cli.detect.FaceDetector", lambda *_, **__: FaceDetector(model=Pointless()))
    report = tmp_path / "r.json"
    code, out, err = run(capsys, "detect", photos / "a.png", "--crops", tmp_path / "crops", "--json", report)
    assert code == 1 and "1 face" in out and "a.png: a face cannot be aligned: the points coincide" in err
    assert len(json.loads(report.read_text())["results"][0]["faces"]) == 1


def test_one_output_file(capsys, marks, photos, tmp_path):
    assert run(capsys, "detect", photos / "b.png", "-o", tmp_path / "drawn.jpg")[0] == 0
    with Image.open(tmp_path / "drawn.jpg") as drawn:
        assert drawn.format == "JPEG" and drawn.size == (300, 200)
    assert "is one file, but there are 2 inputs" in refused(capsys, "detect", photos, "-o", tmp_path / "x.png")
    for name in ("x.mp4", "x.pdf", "x.mov"):
        assert "videos to .mp4" in refused(capsys, "detect", photos / "b.png", "-o", tmp_path / name)


def test_json_and_csv_on_stdout(capsys, marks, photos):
    code, out, err = run(capsys, "detect", photos / "b.png", "--json", "-")
    assert code == 0 and err == "" and len(json.loads(out)["results"][0]["faces"]) == 3
    code, out, err = run(capsys, "detect", photos / "b.png", "--csv", "-")
    assert code == 0 and len(out.splitlines()) == 4


def test_inputs_are_never_overwritten(capsys, marks, photos):
    before = (photos / "b.png").read_bytes()
    assert "would replace the input" in refused(capsys, "detect", photos, "-o", photos)
    assert "would replace the input" in refused(capsys, "detect", photos / "b.png", "-o", photos / "b.png")
    for option in ("--json", "--csv"):
        assert "would replace" in refused(capsys, "detect", option, photos / "b.png", photos / "a.png")
        assert "would replace" in refused(capsys, "detect", photos / "b.png", option, photos / "b.png")
        assert "would replace" in refused(capsys, "detect", photos / "b.png", option, photos / "new.jpg")
    (photos / "b").write_bytes(before)
    assert "would replace" in refused(capsys, "detect", photos / "b", "--json", photos / "deeper" / ".." / "b")
    assert (photos / "b.png").read_bytes() == (photos / "b").read_bytes() == before


def test_a_crop_never_replaces_an_input(capsys, marks, photos):
    before = (photos / "b.png").read_bytes()
    (photos / "b_1.png").write_bytes(before)
    code, _, err = run(capsys, "detect", photos, "--crops", photos)
    assert code == 1 and err.count("a crop would replace") == 1 and "b_1.png; name another folder" in err
    assert (photos / "b_1.png").read_bytes() == before and (photos / "b_1_2.png").exists()


def test_a_folder_of_results_inside_the_searched_one_is_no_input(capsys, marks, photos):
    arguments = ("detect", photos, "-r", "-o", photos / "drawn", "--crops", photos / "crops")
    first = run(capsys, *arguments)
    (photos / "drawn" / "of_a_video.mp4").write_bytes(b"x")
    assert first[0] == 0 and run(capsys, *arguments) == first
    assert run(capsys, "detect", photos / "drawn", "-o", photos / "drawn" / "again")[1].count("face") == 2
    assert run(capsys, "detect", photos / "drawn" / "deeper", "-o", photos / "drawn")[0] == 0


def test_what_a_folder_holds_besides_images_is_said(capsys, marks, photos):
    for name in ("x.mp4", "y.MOV", "z.heic"):
        (photos / name).write_bytes(b"x")
    code, _, err = run(capsys, "detect", photos)
    assert code == 0 and err == (
        f"featherface: {photos}: videos left out, name them themselves: 2 (.mov, .mp4)\n"
        f"featherface: {photos}: images left out, of formats that Pillow does not read: 1 (.heic)\n"
    )
    assert run(capsys, "detect", photos, "--quiet")[2] == ""
    for name in ("a.png", "b.png"):
        (photos / name).unlink()
    assert "holds no images" in (err := refused(capsys, "detect", photos)) and "videos left out" in err


def test_a_broken_file_among_many(capsys, marks, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"not a picture")
    (photos / "empty.png").write_bytes(b"")
    report = tmp_path / "r.json"
    code, out, err = run(capsys, "detect", photos, photos / "missing.png", "--json", report, "-o", tmp_path / "out")
    assert code == 1
    assert out.count("face") == 2
    lines = err.splitlines()
    assert len(lines) == 4 and "broken.png is not an image" in lines[0] and "empty.png is an empty file" in lines[1]
    assert "missing.png does not exist" in lines[2] and lines[3] == "featherface: 3 of 5 inputs failed"
    results = json.loads(report.read_text())["results"]
    assert [("error" in result) for result in results] == [False, False, True, True, True]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_a_picture_that_cannot_be_written_stops_no_other(capsys, marks, photos, tmp_path):
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    long = photos / f"{'n' * 250}.png"
    (photos / "b.png").rename(long)
    report = tmp_path / "r.json"
    code, out, err = run(capsys, "detect", photos, "-o", tmp_path / "out", "--json", report, "--crops", tmp_path / "c")
    assert code == 1 and out.count("face") == 1
    assert "a.png cannot be written: is a directory" in err and "1 of 2 inputs failed" in err
    assert (tmp_path / "out" / long.name).is_file()
    assert [("error" in result) for result in json.loads(report.read_text())["results"]] == [True, False]


def bad_files(folder):
    from test_detector import jpeg_bytes

    contents = {
        "empty.jpg": b"",
        "text.jpg": b"hello",
        "truncated.jpg": jpeg_bytes()[:300],
        "pickle.png": pickle.dumps([1]),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return list(contents)


def test_a_single_bad_file_is_one_sentence(capsys, marks, tmp_path):
    for name in [*bad_files(tmp_path), "missing.jpg"]:
        report = tmp_path / "r.json"
        assert name in refused(capsys, "detect", tmp_path / name, "--json", report)
        assert not report.exists()
    assert not list(tmp_path.glob(".*"))


def test_only_bad_files_is_one_sentence(capsys, marks, tmp_path):
    names = bad_files(tmp_path)
    error = refused(capsys, "detect", *(tmp_path / name for name in names))
    assert "none of the 4 inputs could be used" in error and "empty.jpg" in error


def test_folder_without_images(capsys, marks, photos, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "nothing holds no images" in refused(capsys, "detect", tmp_path / "nothing")
    assert "--recursive" in refused(capsys, "detect", tmp_path / "nothing")


@pytest.mark.parametrize("option", ["--output", "--json", "--csv", "--crops"])
def test_unwritable_outputs_are_refused_before_work_begins(capsys, photos, tmp_path, option, monkeypatch):
    monkeypatch.setattr("featherface.cli.detect.FaceDetector", lambda *a, **k: pytest.fail("work began"))
    (tmp_path / "file").write_text("in the way")
    assert f"{option} " in refused(capsys, "detect", photos / "b.png", option, tmp_path / "file" / "below" / "x")


def test_unwritable_files(capsys, photos, tmp_path):
    assert "is a folder" in refused(capsys, "detect", photos / "b.png", "--json", tmp_path)
    assert "name the same file" in refused(capsys, "detect", photos / "b.png", "--json", "x", "--csv", "x")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in refused(capsys, "detect", photos / "b.png", "-o", tmp_path / "locked")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10)])
def test_extreme_images_are_served(capsys, weights, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    code, out, err = run(capsys, "detect", tmp_path / "x.png", "-w", weights, "--score", 0.99, "-o", tmp_path / "o")
    assert (code, err) == (0, "") and "0 faces" in out
    with Image.open(tmp_path / "o" / "x.png") as drawn:
        assert drawn.size == size


def test_options_reach_the_detector(capsys, monkeypatch, photos):
    seen = {}

    class Spy(FaceDetector):
        def __init__(self, *positional, **named):
            seen.update(zip(("weights", "model", "device", "score", "nms", "size", "fused", "threads"), positional))
            seen.update(named)
            super().__init__(None, MarkDetector(), *positional[2:], **named)

    monkeypatch.setattr("featherface.cli.detect.FaceDetector", Spy)
    options = "-w W -m M -d cpu --score 0.3 --nms 0.2 --size 256 --no-fused --threads 1 --pad 0.1 --tile 512"
    assert run(capsys, "detect", photos / "b.png", *options.split())[0] == 0
    assert seen == {
        "weights": "W", "model": "M", "device": "cpu", "score": 0.3, "nms": 0.2, "size": 256, "fused": False,
        "threads": 1, "pad": 0.1, "tile": 512, "dtype": "float32",
    }  # fmt: skip


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_weights(capsys, photos, tmp_path, weights):
    torch.save({"a": Evil(str(tmp_path / "was_run"))}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(Path(weights).read_bytes()[:2000])
    save_weights(create_model("featherface_v1"), tmp_path / "v1.pth")
    picture = photos / "b.png"
    assert "evil.pth" in refused(capsys, "detect", picture, "-w", tmp_path / "evil.pth")
    assert not (tmp_path / "was_run").exists()
    assert "cut.safetensors" in refused(capsys, "detect", picture, "-w", tmp_path / "cut.safetensors")
    assert "missing.pth" in refused(capsys, "detect", picture, "-w", tmp_path / "missing.pth")
    error = refused(capsys, "detect", picture, "-w", tmp_path / "v1.pth", "-m", "featherface_v2")
    assert "checkpoint of featherface_v1, not of featherface_v2" in error
    assert "name one of the two" in refused(capsys, "detect", picture, "-w", "featherface_v1", "-m", "featherface_v2")
    assert "there is no model 'x'" in refused(capsys, "detect", picture, "-w", weights, "-m", "x")
    assert "cannot be used here" in refused(capsys, "detect", picture, "-w", weights, "-d", "cuda:99")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["detect"], "INPUT"),
        (["detect", "x.png", "--nms", "3"], "--nms"),
        (["detect", "x.png", "--wings"], "--wings"),
        (["fly"], "fly"),
        (["info", "resnet"], "there is no model 'resnet'"),
        (["info", "featherface_v2", "--size", "0x5"], "--size 0x5 is not a size"),
        (["info", "--size", "640"], "name the model"),
        (["demo", "-o", "picture"], "--output picture: pictures cannot be written so"),
        (["export", "-f", "tflite"], "tflite"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_wrong_environment_is_one_sentence(capsys, monkeypatch, photos, weights):
    monkeypatch.setenv("FF_USE_FUSED", "maybe")
    assert "FF_USE_FUSED='maybe'" in refused(capsys, "detect", photos / "b.png", "-w", weights)


def test_an_unavailable_backend_is_one_sentence(capsys, monkeypatch, photos, weights):
    monkeypatch.setattr(
        "ffkernels.registry.backend_unavailable", lambda b, d=None: "no device" if b == "cuda" else None
    )
    monkeypatch.setenv("FF_BACKEND", "cuda")
    assert "backend 'cuda' is not available: no device" in refused(capsys, "detect", photos, "-w", weights)


def test_debug_shows_the_traceback(capsys, marks, tmp_path):
    with pytest.raises(ImageError):
        main(["detect", str(tmp_path / "missing.jpg"), "--debug"])
    with pytest.raises(ImageError):
        main(["--debug", "detect", str(tmp_path / "missing.jpg")])


def test_faults_of_the_program_are_not_user_errors(capsys, monkeypatch, photos):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("featherface.cli.detect.FaceDetector", broken)
    code, _, err = run(capsys, "detect", photos / "b.png")
    assert code == 1 and "internal error, ZeroDivisionError: oops" in err and "--debug" in err


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (OSError(28, "No space left on device", "x.png"), "x.png: No space left on device"),
    ],
)
def test_resources_that_run_out_are_one_sentence(capsys, monkeypatch, photos, error, message):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("featherface.cli.detect.FaceDetector", broken)
    assert message in refused(capsys, "detect", photos / "b.png")


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "featherface", *map(str, arguments)],
        env=environment,
        text=True,
        # A job that a shell has put into the background ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_module_runs_as_the_console_script(weights, photos):
    process = command("detect", photos / "missing.png", "-w", weights, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err == f"featherface: error: {photos / 'missing.png'} does not exist\n"


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_names_that_are_not_text(weights, photos, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes((photos / "b.png").read_bytes())
    arguments = ["detect", tmp_path / name, "-w", weights, "-o", tmp_path / "out", "--csv", tmp_path / "o.csv"]
    process = command(*arguments, "--json", tmp_path / "o.json", stdout=subprocess.PIPE, errors="replace")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "caf" in out
    assert json.loads((tmp_path / "o.json").read_text())["results"][0]["file"] == str(tmp_path / name)
    assert (tmp_path / "out" / name).is_file()
    process = command("detect", tmp_path / name, "-w", weights, "--json", "-", stdout=subprocess.PIPE)
    assert json.loads(process.communicate(timeout=120)[0])["results"][0]["file"] == str(tmp_path / name)


def test_a_closed_pipe_is_quiet(weights, photos):
    read, write = os.pipe()
    os.close(read)
    process = command("detect", photos, "-w", weights, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_leaves_nothing_half_written(weights, photos, tmp_path, number, word):
    report = tmp_path / "r.json"
    # Reading a named pipe that nobody writes to keeps the command waiting after its work has begun.
    os.mkfifo(tmp_path / "waits.png")
    process = command(
        "detect", photos / "b.png", tmp_path / "waits.png", "-w", weights, "--json", report, stderr=subprocess.PIPE
    )
    writer, deadline = None, time.monotonic() + 60
    while writer is None and time.monotonic() < deadline:
        time.sleep(0.05)
        with contextlib.suppress(OSError):  # until the command opens it
            writer = os.open(tmp_path / "waits.png", os.O_WRONLY | os.O_NONBLOCK)
    assert list(tmp_path.glob(".r.*"))
    time.sleep(0.3)
    process.send_signal(number)
    assert f"featherface: {word}\n" == process.communicate(timeout=60)[1]
    os.close(writer)
    assert process.returncode == 128 + number
    assert not report.exists() and not list(tmp_path.glob(".r.*"))


def test_demo(capsys, teacher_weights, tmp_path):
    pytest.importorskip("skimage")
    picture = tmp_path / "demo.png"
    code, out, err = run(capsys, "demo", "-w", teacher_weights, "-o", picture)
    assert (code, err) == (0, "")
    assert "1 found by featherface_v1_ssh" in out and "preprocess" in out and "network" in out and "ops" in out
    with Image.open(picture) as drawn:
        assert drawn.size == (512, 512)


def test_demo_without_weights_or_photograph(capsys, monkeypatch, tmp_path, weights):
    monkeypatch.setattr("featherface.detector.WEIGHTS", tmp_path)
    assert "--weights FILE" in refused(capsys, "demo", "-o", tmp_path / "demo.png")
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    error = refused(capsys, "demo", "-w", weights, "-o", tmp_path / "demo.png")
    assert 'pip install "featherface[demo]"' in error
    assert not (tmp_path / "demo.png").exists()


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and "torch: " in out and "backends:" in out and "featherface_v2:" in out
    assert json.loads(run(capsys, "info", "--json")[1])["versions"]["torch"] == torch.__version__
    code, out, _ = run(capsys, "info", "featherface_v2")
    assert code == 0 and "256,148" in out and "backbone" in out
    document = json.loads(run(capsys, "info", "featherface_v2", "--json", "--size", "320x480")[1])
    assert (document["parameters"], document["height"], document["width"]) == (256148, 320, 480)


def test_version_and_help(capsys):
    assert run(capsys, "--version")[1].startswith("featherface ")
    assert "Exit code" in run(capsys, "detect", "--help")[1]


def test_frames_are_of_videos(capsys, marks, photos):
    assert "--frames is of videos" in refused(capsys, "detect", photos, "--frames", 3)


def test_videos_need_opencv(capsys, monkeypatch, tmp_path, marks):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "v.mp4").write_bytes(b"x")
    assert 'pip install "featherface[video]"' in refused(capsys, "detect", tmp_path / "v.mp4")
    assert 'pip install "featherface[video]"' in refused(capsys, "detect", "7")


def test_videos(capsys, marks, monkeypatch, tmp_path):
    pytest.importorskip("cv2", reason="the extra video (OpenCV) is not installed")
    from featherface.video import VideoReader, VideoWriter

    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 10) as writer:
        for i in range(20):
            writer.write(paint(192, 256, [(100, 60, 32)] * (i < 10)))
    with VideoReader(path) as reader:
        assert (reader.frames_per_second, reader.frame_count) == (10, 20)
    code, out, _ = run(
        capsys, "detect", path, "-o", tmp_path / "out", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv"
    )
    assert code == 0 and out == f"{path}: 20 frames, 10 faces\n"
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [result["frame"] for result in results] == list(range(20)) and results[5]["seconds"] == 0.5
    assert [len(result["faces"]) for result in results] == [1] * 10 + [0] * 10
    with VideoReader(tmp_path / "out" / "clip.mp4") as reader:
        assert len(list(reader)) == 20
    assert run(capsys, "detect", path, "--frames", 3)[1] == f"{path}: 3 frames, 3 faces\n"
    read = VideoReader.__iter__
    monkeypatch.setattr(VideoReader, "__iter__", lambda self: itertools.islice(read(self), 15))
    code, out, err = run(capsys, "detect", path)
    assert code == 1 and out == f"{path}: 15 frames, 10 faces\n" and "only 15 of 20 frames could be read" in err
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    code, out, err = run(capsys, "detect", path, tmp_path / "broken.mp4", tmp_path / "empty.mp4", "-o", tmp_path / "o")
    assert code == 1 and "broken.mp4 cannot be opened as a video" in err and "empty.mp4 is an empty file" in err
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["clip.mp4"]
    assert "camera 77 cannot be opened" in refused(capsys, "detect", "77")


def test_errors_are_of_one_family():
    assert issubclass(ImageError, FeatherFaceError)


def test_tables_in_a_pipe_are_as_wide_as_they_need(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    table, name = Table("weights", "AP"), "runs/" + "long_" * 40 + "/final.safetensors"
    table.add_row(name, "55.79")
    options.console().print(table)
    assert name in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    options.console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60


def test_weights_are_not_written_over(tmp_path, monkeypatch, capsys):
    """The default name of an exported file may be that of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("featherface_v2").state_dict(), "featherface_v2.pt")
    Image.fromarray(paint(64, 64, [])).save("a.png")
    before = Path("featherface_v2.pt").read_bytes()
    weights = ["-w", "featherface_v2.pt", "-m", "featherface_v2"]
    for command in (
        ["export", *weights, "-f", "torchscript"],
        ["export", *weights, "-f", "torchscript", "-o", str(tmp_path / "featherface_v2.pt")],
        ["evaluate", *weights, "--data", ".", "--output", "featherface_v2.pt"],
        ["evaluate", *weights, "--data", ".", "--output", "b.png", "--plot", "b.png"],
        ["detect", *weights, "a.png", "--json", "featherface_v2.pt"],
    ):
        assert main(command) == 2
        assert "is a file that this command reads or writes otherwise" in capsys.readouterr().err
    assert Path("featherface_v2.pt").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout")
def test_results_go_behind_what_standard_output_was_directed_to(tmp_path):
    Image.fromarray(paint(64, 64, [])).save(tmp_path / "a.png")
    log = tmp_path / "log.txt"
    log.write_text("precious\n")
    with open(log, "ab") as stream:
        command = [sys.executable, "-m", "featherface", "detect", "a.png", "-q", "--csv", "/dev/stdout"]
        result = subprocess.run(
            command, stdout=stream, stderr=subprocess.PIPE, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    assert result.returncode == 0, result.stderr
    assert log.read_bytes().startswith(b"precious\nfile,frame,face,score,")


@pytest.mark.parametrize("name", ["FF_USE_FUSED", "FF_BACKEND"])
def test_a_wrong_variable_is_one_sentence(name, tmp_path):
    Image.fromarray(paint(64, 64, [])).save(tmp_path / "a.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), name: "true"}

    def run(*arguments):
        command = [sys.executable, "-m", "featherface", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    assert run("--version").returncode == 0
    result = run("detect", "a.png")
    assert result.returncode == 2
    assert result.stderr.startswith(f"featherface: error: {name}='true' is not a valid value; use one of:")


def test_no_arguments_print_the_help_alone(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "detect" in captured.out + captured.err and "error" not in captured.err


def test_a_link_to_nothing_is_an_input_that_cannot_be_read(tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.fromarray(paint(64, 64, [])).save(folder / "a.png")
    (folder / "b.png").symlink_to(tmp_path / "gone.png")
    for given in (str(folder), str(folder / "*.png")):
        assert main(["detect", given, "-q"]) == 1
        assert f"{folder / 'b.png'} does not exist" in capsys.readouterr().err
