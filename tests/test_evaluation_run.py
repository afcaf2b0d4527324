"""Protocols, data sets, runs with a stand-in detector, reports and the subcommand."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from featherface.cli import main
from featherface.detector import FaceDetector
from featherface.errors import DataError, FeatherFaceError
from featherface.evaluation.dataset import open_dataset
from featherface.evaluation.protocols import PROTOCOLS, get_protocol
from featherface.evaluation.readers import SETTINGS, WiderGroundTruth, read_predictions, write_predictions
from featherface.evaluation.report import AVERAGE_PRECISION_RULES, WIDER_RULES
from featherface.evaluation.run import detect_dataset, evaluate, evaluate_predictions
from featherface.files import sha256
from featherface.models import create_model, save_weights

POINTS = np.array([[30, 40], [70, 40], [50, 60], [35, 80], [65, 80]], float)


def label(points):
    return " ".join(f"{x} {y} 0.0" for x, y in points)


@pytest.fixture
def data_set(tmp_path):
    """Three images of 100 x 200, 100 x 1280 and 100 x 100 (height x width) with one face, two faces and none."""
    folder = tmp_path / "set"
    for name, width in (("a/1.png", 200), ("a/2.png", 1280), ("b/3.png", 100)):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 100), (10, 20, 30)).save(path)
    (folder / "label.txt").write_text(
        f"# a/1.png\n20 20 60 70 {label(POINTS)} 1\n# a/2.png\n20 20 60 70 {label(POINTS)} 1\n"
        f"1000 20 60 70 {label(POINTS + np.array([980, 0]))} 1\n# b/3.png\n"
    )
    return folder


def scaled_truth(image):
    """A detector that knows the faces of ``data_set``, at whatever size it is shown an image."""
    height, width = image.shape[:2]
    assert image.dtype == np.uint8 and image.shape[2] == 3
    scale = height / 100
    count = {2: 1, 13: 2, 1: 0}[round(width / height)]
    boxes = np.array([[20, 20, 80, 90], [1000, 20, 1060, 90]], float)[:count] * scale
    points = np.stack([POINTS, POINTS + np.array([980, 0])])[:count] * scale
    return boxes, np.array([0.9, 0.8])[:count], points


def ground_truth(data_set, enlarge=1.0):
    records = open_dataset(data_set).annotations
    keep = tuple(np.ones(len(record.boxes), bool) for record in records)
    names = tuple(record.key for record in records)
    return WiderGroundTruth(names, tuple(r.boxes * enlarge for r in records), dict.fromkeys(SETTINGS, keep))


# Protocols


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("orig", (1024, 768), (1024, 768)),
        ("vga640", (1024, 768), (640, 480)),
        ("vga640", (683, 1024), (427, 640)),
        ("vga640", (512, 300), (512, 300)),
        ("vga640", (640, 1), (640, 1)),
        ("vga640", (10000, 2), (640, 1)),
        ("qvga320", (1024, 768), (320, 240)),
        ("s1600", (1024, 1024), (1600, 1600)),
        ("s1600", (1024, 768), (2133, 1600)),
        ("s1600", (1024, 683), (2150, 1434)),
        ("s1600", (683, 1024), (1434, 2150)),
        ("s1600", (4000, 3000), (2133, 1600)),
    ],
)
def test_protocol_sizes(name, size, expected):
    width, height = size
    resized = PROTOCOLS[name].resize(np.zeros((height, width, 3), np.uint8))
    assert resized.shape == (expected[1], expected[0], 3) and resized.dtype == np.uint8


def test_resizing_is_bilinear_between_pixel_centres():
    image = np.random.default_rng(0).integers(0, 256, (960, 1280, 3), dtype=np.uint8)
    # Half the size: each new pixel is the mean of four.
    mean = image.reshape(480, 2, 640, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(PROTOCOLS["vga640"].resize(image) - mean).max() <= 0.5
    # Another ratio, by the formula x = (x' + 1/2) w / w' - 1/2.
    image = image[:100, :1000]
    resized = PROTOCOLS["vga640"].resize(image)
    at = (np.arange(640) + 0.5) * 1000 / 640 - 0.5
    down = (np.arange(64) + 0.5) * 100 / 64 - 0.5

    def interpolate(values, position, axis):
        low = np.clip(np.floor(position).astype(int), 0, values.shape[axis] - 1)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        weight = np.clip(position - low, 0, 1).reshape([-1 if i == axis else 1 for i in range(3)])
        return np.take(values, low, axis) * (1 - weight) + np.take(values, high, axis) * weight

    expected = interpolate(interpolate(image.astype(float), at, 1), down, 0)
    assert np.abs(resized - expected).max() < 0.51


def test_orig_returns_the_image_itself():
    image = np.zeros((5, 7, 3), np.uint8)
    assert get_protocol("orig").resize(image) is image
    with pytest.raises(DataError, match="orig, vga640, qvga320, s1600"):
        get_protocol("VGA")


# Data sets


def test_open_dataset(data_set):
    dataset = open_dataset(data_set)
    assert (dataset.name, len(dataset)) == ("set", 3)
    assert dataset.image("a/1.png").shape == (100, 200, 3)
    assert dataset.image("a/1.png")[0, 0].tolist() == [10, 20, 30]
    assert [a.name for a in dataset.limited(2).annotations] == ["a/1.png", "a/2.png"]
    assert dataset.limited(5) is dataset and dataset.limited(None) is dataset
    with pytest.raises(DataError, match="at least 1"):
        dataset.limited(0)


def test_other_annotation_names(data_set):
    text = "a/1.png\n1\n1 2 3 4 0 0 0 0 0 0\n"
    (data_set / "label.txt").rename(data_set / "labelv2.txt")
    assert len(open_dataset(data_set)) == 3
    (data_set / "labelv2.txt").unlink()
    (data_set / "wider_face_val_bbx_gt.txt").write_text(text)
    assert len(open_dataset(data_set)) == 1


def test_stored_pixels_are_annotated_not_turned_ones(data_set):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100)).save(data_set / "images" / "a" / "1.png", exif=exif)
    assert open_dataset(data_set).image("a/1.png").shape == (100, 200, 3)


def test_images_of_every_mode_are_read_as_the_detector_reads_them(data_set):
    Image.new("L", (200, 100), 7).save(data_set / "images" / "a" / "1.png")
    Image.fromarray(np.full((100, 200), 257 * 9, np.uint16)).save(data_set / "images" / "a" / "2.png")
    Image.new("RGBA", (100, 100), (1, 2, 3, 0)).save(data_set / "images" / "b" / "3.png")
    dataset = open_dataset(data_set)
    assert dataset.image("a/1.png")[0, 0].tolist() == [7, 7, 7]
    assert dataset.image("a/2.png")[0, 0].tolist() == [9, 9, 9]
    assert dataset.image("b/3.png")[0, 0].tolist() == [123, 117, 104]


def test_data_set_errors(data_set, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DataError, match="has no folder images/"):
        open_dataset(tmp_path)
    (data_set / "sizes.csv").write_text("path,orig_w,orig_h,w,h\na/1.png,10,zero,1,1\n")
    with pytest.raises(DataError, match=r"sizes\.csv, line 2"):
        open_dataset(data_set)
    (data_set / "sizes.csv").unlink()
    (data_set / "images" / "a" / "2.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cannot decode the image .*2\.png"):
        detect_dataset(scaled_truth, open_dataset(data_set))
    (data_set / "images" / "a" / "2.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images .* missing, the first is .*2\.png"):
        open_dataset(data_set)
    (data_set / "label.txt").unlink()
    with pytest.raises(DataError, match="has no annotations"):
        open_dataset(data_set)


# Runs


@pytest.mark.parametrize("protocol", ["orig", "vga640", "qvga320", "s1600"])
def test_a_detector_that_knows_everything(data_set, protocol):
    seen = []
    report = evaluate(scaled_truth, data_set, protocol, progress=lambda done, total: seen.append((done, total)))
    assert [result.rules for result in report.results] == [AVERAGE_PRECISION_RULES]
    assert report.ap["all"] == 1.0
    assert report.results[0].scores.faces == {"all": 3, "tiny": 0, "small": 0, "medium": 3, "large": 0}
    # Rounding the new size to whole pixels moves the stand-in's answers a little.
    assert report.landmarks.error < 0.002
    assert (report.landmarks.found, report.landmarks.faces) == (3, 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_detections_come_back_in_stored_pixels(data_set):
    predictions, points = detect_dataset(scaled_truth, open_dataset(data_set), "vga640")
    assert predictions["a/2.png"][1].tolist() == [1000, 20, 1060, 90, 0.8]
    np.testing.assert_allclose(points["a/2.png"][0], POINTS)
    assert predictions["b/3.png"].shape == (0, 5) and points["b/3.png"].shape == (0, 5, 2)


def test_official_rules_restricted_to_the_set(data_set):
    report = evaluate(scaled_truth, data_set, ground_truth=ground_truth(data_set))
    assert [result.rules for result in report.results] == [WIDER_RULES, AVERAGE_PRECISION_RULES]
    assert report.results[0].scores.ap == {"easy": 1.0, "medium": 1.0, "hard": 1.0}
    assert report.ap == report.results[0].scores.ap
    assert report.results[1].scores.ap["all"] == 1.0
    part = evaluate(scaled_truth, data_set, ground_truth=ground_truth(data_set), limit=1)
    assert part.results[0].scores.names == ("a/1",) and part.results[0].scores.faces["hard"] == 1


def test_reduced_images_are_scored_in_original_pixels(data_set):
    truth = ground_truth(data_set, enlarge=4)
    assert evaluate(scaled_truth, data_set, ground_truth=truth).ap["hard"] == 0
    sizes = "a/1.png,800,400,200,100\na/2.png,5120,400,1280,100\nb/3.png,400,400,100,100\n"
    (data_set / "sizes.csv").write_text("path,orig_w,orig_h,w,h\n" + sizes)
    report = evaluate(scaled_truth, data_set, ground_truth=truth)
    assert report.ap["hard"] == 1 and report.results[1].scores.ap["all"] == 1


def test_a_detector_without_landmarks(data_set):
    report = evaluate(lambda image: (*scaled_truth(image)[:2], None), data_set)
    assert report.landmarks is None and report.ap["all"] == 1


def test_a_detector_that_breaks(data_set):
    with pytest.raises(DataError, match=r"not finite for .*1\.png"):
        evaluate(lambda image: (np.full((1, 4), np.nan), np.ones(1), None), data_set)


def test_saved_predictions_score_the_same(data_set, tmp_path):
    first = evaluate(scaled_truth, data_set, save_predictions=tmp_path / "out")
    assert sorted(read_predictions(tmp_path / "out")) == ["a/1", "a/2", "b/3"]
    again = evaluate_predictions(tmp_path / "out", data=data_set)
    assert again.ap["all"] == first.ap["all"]
    assert (again.predictions, again.unused_predictions, again.protocol) == ("out", 0, None)
    from_file = evaluate_predictions(tmp_path / "out", data_set / "label.txt")
    assert from_file.ap["all"] == 1 and from_file.data_set == "label.txt"
    official = evaluate_predictions(tmp_path / "out", ground_truth(data_set))
    assert official.ap["easy"] == 1
    part = evaluate_predictions(tmp_path / "out", data=data_set, limit=1)
    assert part.unused_predictions == 2


def test_baseline(data_set, tmp_path):
    predictions, _ = detect_dataset(scaled_truth, open_dataset(data_set))
    predictions["a/2.png"] = predictions["a/2.png"][:1]
    write_predictions(tmp_path / "weaker", predictions)
    report = evaluate(scaled_truth, data_set, baseline=tmp_path / "weaker", replicates=50)
    assert report.baseline == "weaker"
    difference = report.results[0].difference["all"]
    assert difference.value == pytest.approx(1 / 3) and difference.low == 0
    assert report.baseline_missing == 0
    write_predictions(tmp_path / "part", {"a/1.png": predictions["a/1.png"]})
    for report in (
        evaluate(scaled_truth, data_set, baseline=tmp_path / "part", replicates=50),
        evaluate_predictions(tmp_path / "weaker", data=data_set, baseline=tmp_path / "part", replicates=50),
    ):
        assert report.baseline_missing == report.to_dict()["images_without_baseline"] == 2
    write_predictions(tmp_path / "foreign", {"x/1.png": predictions["a/1.png"]})
    with pytest.raises(DataError, match="none of the 3 images to score is among the baseline"):
        evaluate(lambda image: pytest.fail("the detector ran"), data_set, baseline=tmp_path / "foreign")
    with pytest.raises(DataError, match="among the baseline"):
        evaluate_predictions(tmp_path / "weaker", data_set / "label.txt", baseline=tmp_path / "foreign")


def test_predictions_that_cannot_be_scored(data_set, tmp_path):
    with pytest.raises(DataError, match="give a ground truth or a data set"):
        evaluate_predictions({})
    with pytest.raises(DataError, match="needs a data set"):
        evaluate_predictions({}, data_set / "label.txt", limit=3)
    with pytest.raises(DataError, match="none of the 3 images"):
        evaluate_predictions({"other/1.jpg": np.zeros((0, 5))}, data_set / "label.txt")
    with pytest.raises(DataError, match="cannot read"):
        evaluate_predictions(tmp_path / "none", data_set / "label.txt")


class Recorder(torch.nn.Module):
    """A network without faces that notes the sizes it is shown."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        from featherface.models.anchors import anchors

        height, width = x.shape[2:]
        self.sizes.append((width, height))
        count = len(anchors(height, width))
        # Two anchors far apart score 0.5 and 0.1, all others nothing.
        cls = torch.zeros(1, count, 2)
        cls[0, 0, 1], cls[0, count - 1, 1] = 0.5, 0.1
        return torch.zeros(1, count, 4), cls, torch.zeros(1, count, 10)


def test_the_protocol_sets_what_a_face_detector_does(data_set):
    network = Recorder()
    detector = FaceDetector(model=network, score_threshold=0.9, size=320, pad=0.5, keep_top_k=1)
    report = evaluate(detector, data_set, "vga640", replicates=10)
    assert network.sizes == [(200, 100), (640, 50), (100, 100)]
    assert (report.model, report.weights, report.weights_sha256, report.device) == ("Recorder", None, None, "cpu")
    assert report.kernels == "plain PyTorch"
    assert len(report.results[0].scores.matches["all"].image) == 6
    assert (detector.score_threshold, detector.size, detector.keep_top_k, detector.pad) == (0.9, 320, 1, 0.5)
    network.sizes.clear()
    report = evaluate(detector, data_set, score_threshold=0.2, multiple=32, replicates=10)
    assert network.sizes == [(224, 128), (1280, 128), (128, 128)]
    assert len(report.results[0].scores.matches["all"].image) == 3
    assert (report.multiple, report.score_threshold) == (32, 0.2)


@pytest.fixture
def bench(data_dir):
    pytest.importorskip("scipy")
    folder = data_dir / "faces" / "wider_val_bench"
    if not folder.is_dir() or not (data_dir / "widerface_gt").is_dir():
        pytest.skip(f"{folder} or the official ground truth is missing")
    return folder


def test_the_teacher_on_a_few_images(bench, teacher_weights, data_dir):
    detector = FaceDetector(teacher_weights, device="cpu")
    report = evaluate(detector, bench, "vga640", ground_truth=data_dir / "widerface_gt", limit=16, replicates=10)
    assert report.model == "featherface_v1_ssh" and report.weights_sha256 == sha256(teacher_weights)
    assert report.ap["easy"] > 0.8, report.ap


@pytest.mark.slow
def test_the_teacher_on_the_bench_set(bench, teacher_weights, data_dir):
    detector = FaceDetector(teacher_weights, device="cpu")
    report = evaluate(detector, bench, ground_truth=data_dir / "widerface_gt")
    for setting, expected in (("easy", 91.8), ("medium", 88.6), ("hard", 69.7)):
        assert 100 * report.ap[setting] == pytest.approx(expected, abs=0.3)


# Reports


@pytest.fixture
def report(data_set):
    facts = {"model": "a_model", "weights": "w.pth", "weights_sha256": "0" * 64, "device": "cpu"}
    return evaluate(scaled_truth, data_set, "vga640", replicates=20, facts=facts)


def test_json(report, tmp_path):
    report.save(tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["data_set"] == "set" and content["images"] == 3 and content["images_without_predictions"] == 0
    assert content["protocol"]["name"] == "vga640"
    assert (content["score_threshold"], content["nms_threshold"]) == (0.02, 0.4)
    assert (content["model"], content["weights"], content["weights_sha256"]) == ("a_model", "w.pth", "0" * 64)
    assert content["average_precision"]["AP at IoU 0.5"]["all"] == {"faces": 3, "ap": 1.0, "low": 1.0, "high": 1.0}
    assert content["average_precision"]["AP at IoU 0.5"]["tiny"] == {"faces": 0, "ap": None, "low": None, "high": None}
    assert content["landmark_error"]["mean"] == 0 and content["landmark_error"]["found"] == 3
    assert content["date"].endswith("+00:00") and {"torch", "numpy", "featherface"} <= set(content["versions"])
    assert str(tmp_path) not in json.dumps(content)


def test_table(report):
    console = Console(width=120, record=True, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    assert "set: 3 images; a_model w.pth; protocol vga640" in text
    assert "100.00" in text and "landmark error: mean 0.00 %" in text and "on 3 of 3" in text


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 500
    for name in ("curve.no_such_format", "curve"):
        with pytest.raises(FeatherFaceError, match="suffix"):
            report.plot(tmp_path / name)
    assert [path.name for path in tmp_path.glob("*curve*")] == ["curve.png"]


def test_unwritable_outputs(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the report"):
        report.save(tmp_path / "file" / "report.json")
    with pytest.raises(DataError, match="cannot write the report"):
        report.save(tmp_path)
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="cannot write the plot"):
        report.plot(tmp_path / "file" / "plot.png")


def test_matplotlib_is_named_when_it_is_missing(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(FeatherFaceError, match=r"pip install 'featherface\[eval\]'"):
        report.plot(tmp_path / "plot.png")


# The subcommand


@pytest.fixture
def out(data_set, tmp_path):
    """Predictions of ``data_set`` in a folder."""
    write_predictions(tmp_path / "out", detect_dataset(scaled_truth, open_dataset(data_set))[0])
    return tmp_path / "out"


def command(*options):
    return main(["evaluate", *map(str, options)])


def test_command_scores_predictions(out, data_set, tmp_path, capsys):
    assert command("--predictions", out, "--data", data_set, "--output", tmp_path / "r.json", "--baseline", out) == 0
    assert "100.00" in capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    assert (content["predictions"], content["baseline"]) == ("out", "out")
    assert content["average_precision"]["AP at IoU 0.5"]["all"]["difference"] == {"ap": 0.0, "low": 0.0, "high": 0.0}
    assert command("--predictions", out, "--ground-truth", data_set / "label.txt", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_command_runs_a_detector(data_set, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    weights = tmp_path / "w.safetensors"
    save_weights(create_model("featherface_v2"), weights)
    options = ["--weights", weights, "--data", data_set, "--protocol", "vga640", "--limit", 2, "--device", "cpu"]
    outputs = ["--output", tmp_path / "r.json", "--plot", tmp_path / "p.png", "--save-predictions", tmp_path / "found"]
    assert command(*options, *outputs) == 0
    assert "featherface_v2 w.safetensors; protocol vga640" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "r.json").read_text())
    assert (content["model"], content["weights"]) == ("featherface_v2", "w.safetensors")
    assert content["weights_sha256"] == sha256(weights) and content["images"] == 2
    assert content["kernels"] == FaceDetector(weights, device="cpu").kernels
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert sorted(read_predictions(tmp_path / "found")) == ["a/1", "a/2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data DIR"),
        (["--predictions", "{out}"], "give a ground truth or a data set"),
        (["--predictions", "{out}", "--weights", "w.pth", "--data", "{set}"], "leave out --weights\n"),
        (["--predictions", "{out}", "--data", "{set}", "--score", "0.5", "--dtype", "x"], "leave out --score, --dtype"),
        (["--data", "{set}", "--output", "{set}"], "--output {set} is a folder"),
        (["--data", "{set}", "--output", "{set}/label.txt/x.json"], "cannot be written to"),
        (["--data", "{set}", "--plot", "{set}/label.txt/x.png"], "cannot be written to"),
        (["--data", "{set}", "--plot", "{out}/plot.xyz"], "its suffix must be one of"),
        (["--data", "{set}", "--weights", "featherface_v2", "--model", "featherface_v1"], "name one of the two"),
        (["--data", "{set}", "--save-predictions", "{set}/label.txt"], "cannot be written to"),
        (["--data", "{set}", "--weights", "{set}/none.pth"], "none.pth"),
        (["--data", "{set}", "--protocol", "vga"], "vga640"),
        (["--data", "{set}", "--score", "2"], "--score"),
        (["--predictions", "{set}/label.txt", "--data", "{set}"], "label.txt, line 2"),
        (["--predictions", "{out}", "--ground-truth", "{set}"], "wider_face_val.mat is missing"),
        (["--predictions", "{out}", "--data", "{out}"], "has no folder images/"),
    ],
)
def test_command_refuses_in_one_sentence(out, data_set, capsys, options, message):
    fill = {"out": out, "set": data_set}
    assert command(*(option.format(**fill) for option in options)) == 2
    captured = capsys.readouterr()
    assert message.format(**fill) in captured.err and "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
