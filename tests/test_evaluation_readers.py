import numpy as np
import pytest

from featherface.errors import DataError, FeatherFaceError
from featherface.evaluation import readers
from featherface.evaluation.readers import (
    image_key,
    read_annotations,
    read_ground_truth,
    read_predictions,
    write_predictions,
)

POINTS = "20.5 30 0.0 40 30.5 0.0 -1 -1 -1 22 50 1.0 -1.0 -1.0 0.0"
NO_POINTS = " ".join(["-1.0 -1.0 -1.0"] * 5)


@pytest.fixture
def write(tmp_path):
    def write(text, name="label.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_retinaface(write):
    path = write(f"# a/1.jpg\n10 20 30 40 {POINTS} 0.82\n50 60 7 8 {NO_POINTS} 0.1\n\n# a/2.jpg\n# a/3.png\n1 2 3 4\n")
    first, second, third = read_annotations(path)
    assert (first.name, first.key, first.size, first.attributes) == ("a/1.jpg", "a/1", None, None)
    assert first.boxes.tolist() == [[10, 20, 40, 60], [50, 60, 57, 68]]
    assert first.landmarks.shape == (2, 5, 2)
    assert first.landmarks[0, 0].tolist() == [20.5, 30]
    assert np.isnan(first.landmarks[..., 0]).tolist() == [[False, False, True, False, True], [True] * 5]
    assert first.has_landmarks.tolist() == [False, False]
    assert first.ignore.tolist() == [False, False]
    assert (second.boxes.shape, second.landmarks.shape, second.ignore.shape) == ((0, 4), (0, 5, 2), (0,))
    assert third.boxes.tolist() == [[1, 2, 4, 6]] and third.key == "a/3"


def test_all_landmarks_present(write):
    (record,) = read_annotations(write("# a/1.jpg\n0 0 9 9 1 2 0 3 4 0 5 6 1 7 8 0 9 9 0 0.5\n"))
    assert record.has_landmarks.tolist() == [True]
    assert record.landmarks[0].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 9]]


def test_scrfd(write):
    path = write(f"# a b/1.jpg 640 480\n10 20 30 40 {POINTS}\n1 2 3 4 1\n# a/2.jpg 5 6\n5 5 5 9\n")
    first, second = read_annotations(path)
    assert (first.name, first.size) == ("a b/1.jpg", (640, 480))
    assert first.boxes.tolist() == [[10, 20, 30, 40], [1, 2, 3, 4]]
    assert first.ignore.tolist() == [False, True]
    assert first.landmarks[0, 1].tolist() == [40, 30.5]
    assert second.ignore.tolist() == [True]


def test_wider(write):
    path = write(
        "e/1.jpg\n2\n10 20 30 40 2 0 1 0 2 1 \n1 2 3 4 0 0 0 1 0 0\n"
        "e/2.jpg\n0\n0 0 0 0 0 0 0 0 0 0\ne/3.jpg\n1\n5 6 -2 8 0 0 0 0 0 0\ne/4.jpg\n0\n"
    )
    records = read_annotations(path)
    assert [record.name for record in records] == ["e/1.jpg", "e/2.jpg", "e/3.jpg", "e/4.jpg"]
    assert records[0].boxes.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6]]
    assert records[0].attributes.tolist() == [[2, 0, 1, 0, 2, 1], [0, 0, 0, 1, 0, 0]]
    assert records[0].ignore.tolist() == [False, True]
    assert np.isnan(records[0].landmarks).all()
    assert records[1].boxes.shape == (0, 4) and records[3].boxes.shape == (0, 4)
    assert records[2].ignore.tolist() == [True]


def test_line_ends_and_byte_order_mark(write):
    (record,) = read_annotations(write(b"\xef\xbb\xbf# a/1.jpg\r\n1 2 3 4\r\n"))
    assert record.name == "a/1.jpg" and record.boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (b"\xff\xd8\xff\xe0\x00", "not a text file"),
        ("# a/1.jpg\n1 2 3\n", "line 2: expected x y w h"),
        ("# a/1.jpg\n1 2 three 4\n", "line 2: expected x y w h"),
        ("# a/1.jpg\n1 2 nan 4\n", "line 2: a value is not finite"),
        ("# a/1.jpg\n1 2 inf 4\n", "line 2: a value is not finite"),
        ("# a/1.jpg\n#\n", "line 2: expected '# group/file.jpg'"),
        ("# a/1.jpg\n# a/2.jpg 3 4\n", "line 2: expected '# group/file.jpg'"),
        ("# a/1.jpg 3 4\n1 2 3 4\n# a/2.jpg\n", "line 3: expected '# group/file.jpg width height'"),
        ("# a/1.jpg 3 4\n1 2 3\n", "line 2: expected x1 y1 x2 y2"),
        ("# a/1.jpg\n1 2 3 4\n# a/1.jpg\n", "lists the image a/1.jpg twice"),
        ("a/1.jpg\n", "line 1: the file ends after the name"),
        ("a/1.jpg\nmany\n", "line 2: expected the number of boxes of a/1.jpg"),
        ("a/1.jpg\n-1\n", "line 2: expected the number of boxes"),
        ("a/1.jpg\n2\n1 2 3 4 0 0 0 0 0 0\n", "line 2: 2 boxes announced for a/1.jpg, but the file ends after 1"),
        ("a/1.jpg\n1\n1 2 3 4 0 0 0\n", "line 3: expected x y w h"),
        ("a/1.jpg\n1\n1 2 3 4 0 0 0.5 0 0 0\n", "line 3: expected whole numbers"),
        ("a/1.jpg\n2\n1 2 3 4\n1 2 3 4 0 0 0 0 0 0\n", "differing numbers of values"),
        ("a/1.jpg\n1\n1 2 3 4\n1 2 3 4\na/2.jpg\n0\n", "line 4: expected the name of an image"),
        ("a/1.jpg\n2\n1 2 3 4\na/2.jpg\n1\n1 2 3 4\n", "line 4: expected x y w h"),
        ("a/1.jpg\n0\n1 2 3 4\n", "line 3: a box follows although 0 are announced"),
    ],
)
def test_malformed_annotations(write, text, message):
    path = write(text)
    with pytest.raises(DataError) as error:
        read_annotations(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_annotations(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_annotations(tmp_path / "no.txt")
    with pytest.raises(DataError, match="cannot read"):
        read_annotations(tmp_path)


def test_image_key():
    assert (
        image_key("a/b.c.JPG") == image_key("a\\b.c.png") == image_key("./a/b.c.jpeg") == image_key("a/b.c") == "a/b.c"
    )


def test_predictions_folder_and_file(write, tmp_path):
    write("1.jpg\n2\n10 20 30 40 0.5\n1 2 3 4.5 9e-1\n", "out/e/1.txt")
    write("2\n0\n", "out/e/2.txt")
    write("x.jpg\n1\n1 1 1 1 -2\n", "out/flat.txt")
    result = read_predictions(tmp_path / "out")
    assert sorted(result) == ["e/1", "e/2", "flat"]
    assert result["e/1"].tolist() == [[10, 20, 40, 60, 0.5], [1, 2, 4, 6.5, 0.9]]
    assert result["e/2"].shape == (0, 5)
    single = write("e/1.jpg\n1\n1 2 3 4 0.25\ne/2.jpg\n0\n", "all.txt")
    result = read_predictions(single)
    assert result["e/1"].tolist() == [[1, 2, 4, 6, 0.25]] and result["e/2"].shape == (0, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("1.jpg\n", "line 1: the file ends after the name"),
        ("1.jpg\n1\n1 2 3 4\n", "line 3: expected x y w h score, found 4 values"),
        ("1.jpg\n1\n1 2 3 4 nan\n", "line 3: a value is not finite"),
        ("1.jpg\n2\n1 2 3 4 0.5\n", "line 2: 2 boxes announced"),
        ("1.jpg\n0\n2.jpg\n0\n", "holds 2 images"),
    ],
)
def test_malformed_predictions(write, tmp_path, text, message):
    path = write(text, "out/e/1.txt")
    with pytest.raises(DataError) as error:
        read_predictions(tmp_path / "out")
    assert message in str(error.value) and str(path) in str(error.value)


def test_empty_prediction_folder(tmp_path):
    with pytest.raises(DataError, match="holds no predictions"):
        read_predictions(tmp_path)


def test_repeated_image_in_a_prediction_file(write):
    with pytest.raises(DataError, match="twice"):
        read_predictions(write("e/1.jpg\n0\ne/1\n0\n"))


def test_predictions_survive_the_round_trip(tmp_path):
    random = np.random.default_rng(0)
    rows = random.uniform(0, 1000, (50, 5)).astype(np.float32).astype(np.float64)
    rows[:, 2:4] += rows[:, :2]
    write_predictions(tmp_path / "out", {"e/1.jpg": rows, "flat.png": np.empty((0, 5))})
    assert (tmp_path / "out" / "e" / "1.txt").read_text().splitlines()[:2] == ["1", "50"]
    result = read_predictions(tmp_path / "out")
    assert sorted(result) == ["e/1", "flat"]
    np.testing.assert_allclose(result["e/1"], rows, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(result["e/1"][:, 4].astype(np.float32), rows[:, 4].astype(np.float32))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix != ".txt" and p.is_file()]


def test_predictions_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot write"):
        write_predictions(tmp_path / "out", {"e/1.jpg": np.empty((0, 5))})


def mat_files(folder, keep_index=2):
    scipy_io = pytest.importorskip("scipy.io")

    def cell(*items):
        array = np.empty((len(items), 1), object)
        for i, item in enumerate(items):
            array[i, 0] = item
        return array

    boxes = cell(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32), np.zeros((1, 4), np.int32))
    faces = {
        "event_list": cell("0--Parade", "1--Other"),
        "file_list": cell(cell("a", "b"), cell("c")),
        "face_bbx_list": cell(boxes, cell(np.array([[9, 9, 1, 1]], np.uint8))),
    }
    scipy_io.savemat(folder / "wider_face_val.mat", faces)
    for setting in readers.SETTINGS:
        keep = cell(cell(np.array([[keep_index]], np.uint8), np.empty((0, 0))), cell(np.array([[1]], np.uint8)))
        scipy_io.savemat(folder / f"wider_{setting}_val.mat", {"gt_list": keep})


def test_ground_truth(tmp_path):
    mat_files(tmp_path)
    truth = read_ground_truth(tmp_path)
    assert truth.names == ("0--Parade/a", "0--Parade/b", "1--Other/c")
    assert truth.boxes[0].tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]]
    assert [keep.tolist() for keep in truth.keep["easy"]] == [[False, True], [False], [True]]


def test_ground_truth_errors(tmp_path):
    mat_files(tmp_path)
    (tmp_path / "wider_hard_val.mat").unlink()
    with pytest.raises(DataError, match=r"wider_hard_val\.mat is missing"):
        read_ground_truth(tmp_path)
    (tmp_path / "wider_hard_val.mat").write_bytes(b"not a mat file" * 20)
    with pytest.raises(DataError, match=r"wider_hard_val\.mat is not a readable"):
        read_ground_truth(tmp_path)
    (tmp_path / "wider_hard_val.mat").write_bytes((tmp_path / "wider_face_val.mat").read_bytes())
    with pytest.raises(DataError, match="does not have the structure"):
        read_ground_truth(tmp_path)
    for index in (0, 3):
        mat_files(tmp_path, keep_index=index)
        with pytest.raises(DataError, match="does not have the structure"):
            read_ground_truth(tmp_path)


def test_scipy_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(FeatherFaceError, match=r"pip install 'featherface\[eval\]'"):
        read_ground_truth(tmp_path)


@pytest.mark.parametrize(
    ("name", "images", "boxes", "landmarks"),
    [
        ("wider_val_bench", 200, 2958, 0),
        ("wider_val_train", 2220, 28638, 0),
        ("eden_mask", 509, 2853, 0),
        ("dlib_examples", 7, 33, 33),
        ("ytf_keypoints", 260, 260, 260),
    ],
)
def test_shared_sets(data_dir, name, images, boxes, landmarks):
    path = data_dir / "faces" / name / "label.txt"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    records = read_annotations(path)
    assert len(records) == images
    assert sum(len(record.boxes) for record in records) == boxes
    assert sum(int(record.has_landmarks.sum()) for record in records) == landmarks


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "..\\x.jpg", ""])
def test_predictions_stay_in_their_folder(tmp_path, name):
    folder = tmp_path / "predictions"
    with pytest.raises(DataError, match="leads out of the folder"):
        write_predictions(folder, {"event/good.jpg": np.empty((0, 5)), name: np.empty((0, 5))})
    assert not list(tmp_path.rglob("*.txt"))
