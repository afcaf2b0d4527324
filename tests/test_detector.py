"""FaceDetector: every kind of input, sizes, padding, tiles, batches, errors, and real photographs with the teacher."""

import copy
import io
import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from marks import LANDMARKS, MarkDetector, boxes_of, paint
from PIL import Image

from featherface import Detections, FaceDetector, create_model
from featherface.detector import MAX_PIXELS, _spans
from featherface.errors import CheckpointError, FeatherFaceError, ImageError
from featherface.images import load

MARKS = [(20, 36, 16), (100, 60, 32), (216, 120, 64)]


@pytest.fixture
def detector():
    return FaceDetector(model=MarkDetector())


@pytest.fixture(scope="module")
def picture():
    return paint(200, 300, MARKS)


def check(detections, marks, tolerance=1e-3):
    assert isinstance(detections, Detections)
    expected = boxes_of(marks)
    assert len(detections) == len(marks), detections.boxes
    order = np.lexsort(detections.boxes.T)
    np.testing.assert_allclose(detections.boxes[order], expected[np.lexsort(expected.T)], atol=tolerance)
    assert (np.diff(detections.scores) <= 0).all()
    assert detections.boxes.dtype == detections.scores.dtype == detections.landmarks.dtype == np.float32
    assert detections.landmarks.shape == (len(marks), 5, 2)
    centres = (detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2
    sides = detections.boxes[:, 2] - detections.boxes[:, 0]
    expected = centres[:, None] + sides[:, None, None] * np.array(LANDMARKS)
    np.testing.assert_allclose(detections.landmarks, expected, atol=tolerance)


def test_one_image_of_every_kind(detector, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    read_only = picture.copy()
    read_only.flags.writeable = False
    for image in (
        path,
        str(path),
        Image.fromarray(picture),
        picture,
        read_only,
        picture[:, ::-1][:, ::-1],
        np.asfortranarray(picture),
        picture.astype(np.uint16) * 257,
        (picture.astype(np.uint16) * 257).astype(">u2"),
        picture.astype(np.int64),
        picture.astype(np.float64),
        tensor,
        tensor.contiguous(),
        tensor.float(),
        tensor.double(),
        tensor.float().requires_grad_(),
    ):
        check(detector.detect(image), MARKS)
    assert detector(picture).image_size == (200, 300)


def test_a_detector_can_be_copied_and_sent_to_another_process(picture):
    detector = FaceDetector(score_threshold=1e-4)
    expected = detector.detect(picture)
    assert len(expected)
    for other in (copy.copy(detector), copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert (other.engine is None) == (detector.engine is None) and other.engine_reason == detector.engine_reason
        found = other.detect(picture)
        assert (found.boxes == expected.boxes).all() and (found.scores == expected.scores).all()


def test_a_closed_image_is_no_image(detector, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as closed:
        pass
    with pytest.raises(ImageError, match=r"the image is damaged or truncated|image 0 is damaged or truncated"):
        detector.detect(closed)
    with pytest.raises(FeatherFaceError, match="repeats is 0"):
        detector.profile(picture, repeats=0)


def test_bytes_are_no_image(detector):
    with pytest.raises(ImageError, match="BytesIO"):
        detector.detect(b"abc")


def test_many_images_of_every_kind(detector, picture):
    other = paint(90, 140, [(36, 44, 32)])
    results = detector.detect([picture, Image.fromarray(other), torch.from_numpy(picture).permute(2, 0, 1)])
    check(results[0], MARKS)
    check(results[1], [(36, 44, 32)])
    check(results[2], MARKS)
    assert len(detector.detect(iter([picture, other]))) == 2
    assert detector.detect([]) == []
    stack = np.stack((picture, picture))
    for batch in (stack, torch.from_numpy(stack).permute(0, 3, 1, 2)):
        results = detector.detect(batch)
        assert isinstance(results, list)
        for result in results:
            check(result, MARKS)
    assert len(detector.detect(stack[:1])) == 1
    assert detector.detect(stack[:0]) == []


def test_batches_by_padded_size_and_bounded(detector, monkeypatch):
    images = [paint(h, w, [(36, 36, 32)]) for h, w in ((96, 128), (93, 125), (70, 101), (96, 128), (99, 128))]
    for result in detector.detect(images):
        check(result, [(36, 36, 32)])
    assert sorted(detector.model.inputs) == [(1, 3, 128, 128), (4, 3, 96, 128)]
    detector.model.inputs.clear()
    monkeypatch.setattr("featherface.detector.BATCH_PIXELS", {"cpu": 2 * 96 * 128})
    assert len(detector.detect(images[:1] * 5)) == 5
    assert [shape[0] for shape in detector.model.inputs] == [2, 2, 1]
    detector.model.inputs.clear()
    monkeypatch.setattr("featherface.detector.WINDOW_IMAGES", 3)
    stream = detector.stream(iter(images[:1] * 7))
    next(stream)
    assert sum(shape[0] for shape in detector.model.inputs) == 3
    assert len(list(stream)) == 6


def test_result_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    detector = FaceDetector(model=create_model("featherface_v2"), score_threshold=0.0)
    generator = np.random.default_rng(0)
    images = [
        generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 60), (50, 64), (33, 35), (70, 31))
    ]
    together = detector.detect(images)
    for image, result in zip(images, together):
        alone = detector.detect(image)
        assert len(result) == len(alone) > 0
        np.testing.assert_allclose(result.scores, alone.scores, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_size_scales_the_long_side(scale):
    marks = [(x / scale, y / scale, round(s / scale)) for x, y, s in [(100, 60, 32), (216, 120, 64)]]
    detector = FaceDetector(model=MarkDetector(), size=300)
    check(detector.detect(paint(round(200 / scale), round(300 / scale), marks)), marks, tolerance=0.01)
    assert detector.model.inputs == [(1, 3, 224, 320)]


def test_boxes_are_clipped_and_those_outside_dropped(detector):
    detections = detector.detect(paint(64, 64, [(0, 32, 64)], background=120))
    assert (detections.boxes >= 0).all() and (detections.boxes <= 64).all()
    shifted = FaceDetector(model=MarkDetector(), pad=1.0, score_threshold=0.0)
    boxes = shifted.detect(paint(64, 64, [(32, 32, 32)])).boxes
    assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all() and (boxes >= 0).all() and (boxes <= 64).all()


def test_padding_finds_a_face_larger_than_the_image():
    # All of a 128-pixel image is a face: its surroundings, which every detector needs, exist only with padding.
    image = paint(128, 128, [(64, 64, 128)])
    padded = FaceDetector(model=MarkDetector(), pad=0.4375)
    check(padded.detect(image), [(64, 64, 128)])
    assert padded.model.inputs == [(1, 3, 256, 256)]


def test_tiles_find_tiny_and_large_faces():
    # A 16-pixel face vanishes when 2,000 pixels are brought to 512; one of 1,024 fits no tile at full size.
    marks = [(1004, 36, 16), (60, 1236, 16), (704, 576, 1024), (1608, 712, 128), (1832, 1128, 64), (1524, 60, 32)]
    image = paint(1280, 2048, marks)
    check(FaceDetector(model=MarkDetector(), size=512).detect(image), [(704, 576, 1024)])
    detector = FaceDetector(model=MarkDetector(), tile=512)
    check(detector.detect(image), marks)
    assert {shape[2:] for shape in detector.model.inputs} == {(512, 512), (320, 512)}


def test_an_image_that_fits_one_tile_is_not_cut(detector, picture):
    tiled = FaceDetector(model=MarkDetector(), tile=512)
    check(tiled.detect(picture), MARKS)
    assert tiled.model.inputs == [(1, 3, 224, 320)]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 112, 113, 640, 1000])
def test_tiles_cover_with_overlap(length):
    spans = _spans(length, 64, 16)
    assert spans[0][0] == 0 and spans[-1][1] == length
    if length > 64:
        assert all(end - start == 64 for start, end in spans)
    assert all(a[1] - b[0] >= 16 for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("height, width", [(1, 1), (10, 20_000), (20_000, 10), (1, 300), (7, 5)])
@pytest.mark.parametrize("options", [{}, {"size": 64}, {"tile": 256}, {"pad": 0.25, "size": 128}, {"multiple": 1}])
def test_extreme_shapes_are_served(height, width, options):
    torch.manual_seed(0)
    detector = FaceDetector(model=create_model("featherface_v2"), score_threshold=0.99, **options)
    detections = detector.detect(np.zeros((height, width, 3), np.uint8))
    assert len(detections) == 0 and detections.image_size == (height, width)
    assert detections.boxes.shape == (0, 4) and detections.landmarks.shape == (0, 5, 2)


def test_exif_orientation_is_respected(detector, picture, tmp_path):
    for orientation, turn in ((1, 0), (3, 2), (6, 1), (8, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(np.rot90(picture, turn).copy()).save(path, exif=exif)
        np.testing.assert_array_equal(load(path), picture)
        check(detector.detect(path), MARKS)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"])
def test_formats(tmp_path, picture, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(picture).save(path)
    pixels = load(path)
    assert pixels.shape == picture.shape and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - picture).mean() < 8


def test_modes_become_rgb(tmp_path, picture):
    colour = Image.fromarray(picture)
    grey = np.asarray(colour.convert("L"))
    saved = {
        "grey.png": (Image.fromarray(grey), np.repeat(grey[..., None], 3, 2)),
        "one_bit.png": (Image.fromarray(grey).convert("1"), None),
        "palette.png": (colour.convert("P"), None),
        "grey_alpha.png": (Image.fromarray(grey).convert("LA"), np.repeat(grey[..., None], 3, 2)),
        "opaque.png": (colour.convert("RGBA"), picture),
        "cmyk.tif": (colour.convert("CMYK"), picture),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)),
        "sixteen.tif": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)),
        "float.tif": (Image.fromarray(grey.astype(np.float32)), np.repeat(grey[..., None], 3, 2)),
        "int.tif": (Image.fromarray(grey.astype(np.int32) * 300), None),
    }
    for name, (image, expected) in saved.items():
        image.save(tmp_path / name)
        pixels = load(tmp_path / name)
        assert pixels.shape == (200, 300, 3) and pixels.dtype == np.uint8, name
        if expected is not None:
            assert np.abs(pixels.astype(int) - expected).max() <= 1, name
        else:
            assert np.abs(pixels.mean() - picture.mean()) < 40, name


def test_floating_point_files_hold_bytes_or_shares(tmp_path):
    ramp = np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)
    for values in (ramp, ramp / 255):
        Image.fromarray(values).save(tmp_path / "f.tif")
        np.testing.assert_array_equal(load(tmp_path / "f.tif")[..., 0], np.rint(ramp))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "f.tif")
    assert load(tmp_path / "f.tif").max() == 0


def test_transparent_pixels_take_the_mean_colour():
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, 3:] = (10, 20, 30, 255)
    for image in (Image.fromarray(rgba), rgba):
        from featherface.images import from_array, from_pil

        pixels = from_pil(image) if isinstance(image, Image.Image) else from_array(image)
        assert (pixels[:, :3] == (123, 117, 104)).all() and (pixels[:, 3:] == (10, 20, 30)).all()


def jpeg_bytes():
    buffer = io.BytesIO()
    Image.fromarray(paint(64, 64, [])).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.jpg", b"", "is an empty file"),
        ("text.jpg", b"hello, I am no image", "is not an image"),
        ("truncated.jpg", jpeg_bytes()[:300], "is damaged or truncated"),
        ("header.png", b"\x89PNG\r\n\x1a\n", "is (not an image|damaged)"),
        ("pickle.png", pickle.dumps({"a": 1}), "is not an image"),
    ],
)
def test_bad_files(detector, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"{name} {message}"):
        detector.detect(path)


def test_missing_files_and_folders(detector, tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        detector.detect(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        detector.detect(tmp_path)


def test_decompression_bombs_are_refused(detector, tmp_path, monkeypatch):
    Image.fromarray(paint(64, 64, [])).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"bomb\.png has more than"):
        detector.detect(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((5, 0, 3), np.uint8), "no pixels"),
        (np.zeros((5, 5, 2), np.uint8), "expected \\(height, width, 3\\)"),
        (np.zeros((3, 5, 5), np.uint8), "move the channels last"),
        (np.zeros((5,), np.uint8), "expected \\(height, width, 3\\)"),
        (np.zeros((5, 5, 3), np.complex64), "complex64"),
        (np.zeros((5, 5, 3), bool), "bool"),
        (np.full((5, 5, 3), -1), "from -1 to -1"),
        (np.full((5, 5, 3), 300.0), "from 300 to 300"),
        (np.full((5, 5, 3), 0.5), "multiply them by 255"),
        (np.full((5, 5, 3), np.nan), "NaN"),
        (torch.full((3, 5, 5), math.nan), "NaN"),
        (torch.full((3, 5, 5), math.inf), "from inf"),
        (torch.full((3, 5, 5), -40.0), "from -40"),
        (torch.zeros(3, 0, 5), "no pixels"),
        (torch.zeros(1, 5, 5), "expected \\(3, height, width\\)"),
        (torch.zeros(5, 5, 3), "move the channels first"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), "int64"),
        (7, "int is not an image"),
        ([None], "image 0: NoneType is not"),
        ([np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5, 2), np.uint8)], "image 1: .*expected"),
        (np.zeros((2, 5, 5, 2), np.uint8), "image 0: .*expected"),
        (torch.zeros(2, 1, 5, 5), "image 0: .*expected"),
    ],
)
def test_what_is_no_image_is_refused(detector, image, message):
    with pytest.raises(ImageError, match=message):
        detector.detect(image)


def test_zero_size_pil_image_is_refused(detector):
    with pytest.raises(ImageError, match="no pixels"):
        detector.detect(Image.new("RGB", (0, 5)))


def test_stream_goes_on_after_a_bad_image(detector, picture, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no")
    outcomes = list(detector.stream([picture, tmp_path / "bad.jpg", picture]))
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, ImageError) and outcomes[1].detections is None
    check(outcomes[2].detections, MARKS)
    assert outcomes[0].image.shape == picture.shape


def test_too_large_an_input_says_what_to_do(detector):
    side = int(MAX_PIXELS**0.5) + 100
    image = np.broadcast_to(np.zeros(3, np.uint8), (side, side, 3))
    with pytest.raises(ImageError, match="tile=1024"):
        detector._views(*image.shape[:2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"nms_threshold": -0.1}, "nms_threshold"),
        ({"nms_threshold": math.nan}, "nms_threshold"),
        ({"size": 0}, "size"),
        ({"threads": 0}, "threads"),
        ({"pad": -1}, "pad"),
        ({"tile": 8}, "tile"),
        ({"tile": 100.5}, "tile is 100.5; it must be a whole number"),
        ({"size": "640"}, "size is '640'; it must be a whole number"),
        ({"keep_top_k": 0}, "keep_top_k"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"weights": "w.pth"}, "exclude each other"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(FeatherFaceError, match=message):
        FaceDetector(model=MarkDetector(), **options)


def test_weights_must_come_from_somewhere(monkeypatch, tmp_path):
    monkeypatch.setattr("featherface.detector.WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="pass a weights file"):
        FaceDetector()
    with pytest.raises(CheckpointError, match="no trained weights of featherface_v1 come with"):
        FaceDetector(model="featherface_v1")
    with pytest.raises(CheckpointError, match="no trained weights of featherface_v1 come with"):
        FaceDetector("featherface_v1")
    with pytest.raises(FeatherFaceError, match="there is no model 'resnet'"):
        FaceDetector(model="resnet")
    from featherface.models import save_weights

    save_weights(create_model("featherface_v2"), tmp_path / "featherface_v2.safetensors")
    assert FaceDetector().model_name == FaceDetector("featherface_v2").model_name == "featherface_v2"


def test_the_model_is_told_from_the_weights(tmp_path):
    from featherface.models import save_weights

    for name in ("featherface_v1", "featherface_v2", "featherface_v2_ultra"):
        path = tmp_path / f"{name}.pth"
        save_weights(create_model(name), path)
        detector = FaceDetector(path)
        assert detector.model_name == name and detector.weights == path and len(detector.weights_sha256) == 64
    with pytest.raises(CheckpointError, match="is a checkpoint of featherface_v1, not of featherface_v2"):
        FaceDetector(tmp_path / "featherface_v1.pth", model="featherface_v2")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_checkpoints(tmp_path):
    torch.save({"a": Evil(str(tmp_path / "was_run"))}, tmp_path / "evil.pth")
    torch.save(create_model("featherface_v2").state_dict(), tmp_path / "whole.pth")
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("evil.pth", "truncated.pth", "empty.pth", "other.pth", "missing.pth"):
        with pytest.raises(CheckpointError, match=name):
            FaceDetector(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


def test_damaged_weights_are_noticed():
    model = create_model("featherface_v2")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FeatherFaceError, match="scores that are not numbers"):
        FaceDetector(model=model).detect(np.zeros((32, 32, 3), np.uint8))


def test_threads_are_torch_s_own_again_afterwards():
    before = torch.get_num_threads()
    seen = []

    class Probe(MarkDetector):
        def forward(self, x, logits=None):
            seen.append(torch.get_num_threads())
            return super().forward(x, logits)

    FaceDetector(model=Probe(), threads=before + 1).detect(np.zeros((32, 32, 3), np.uint8))
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_anchors_are_cached_and_the_cache_is_bounded(detector, monkeypatch):
    monkeypatch.setattr("featherface.detector.ANCHOR_SETS", 2)
    detector.detect(np.zeros((32, 32, 3), np.uint8))
    first = detector._anchors[32, 32]
    detector.detect(np.zeros((30, 31, 3), np.uint8))
    assert detector._anchors[32, 32] is first
    for side in (64, 96, 128):
        detector.detect(np.zeros((side, side, 3), np.uint8))
    assert list(detector._anchors) == [(96, 96), (128, 128)]


def test_profile_and_report(picture, tmp_path):
    detector = FaceDetector(model=create_model("featherface_v2"))
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    times = detector.profile(path, repeats=2)
    assert list(times) == ["read", "preprocess", "network", "faces", "total"]
    assert all(value > 0 for value in times.values())
    assert times["total"] >= times["network"]
    rows = detector.report(picture)
    assert len(rows) > 10 and {row.backend for row in rows} == {"reference"}
    detector = FaceDetector(device="cpu")
    rows = detector.report(picture)
    if detector.engine is None:
        assert len(rows) > 10
    else:
        assert rows == [("featherface_v2", "engine", "cpu", f"float32, {detector.engine.isa}")]


def test_detections_helpers(detector, picture):
    detections = detector.detect(picture)
    assert len(detections[:2]) == 2 and len(detections[0]) == 1 and len(detections[-1]) == 1
    assert [len(face) for face in detections] == [1, 1, 1]
    assert len(detections[detections.scores > 2]) == 0
    assert repr(detections).startswith("Detections(3 faces in 300x200")
    with pytest.raises(IndexError):
        detections[3]
    plain = detections.to_dict()
    assert (plain["width"], plain["height"], len(plain["faces"])) == (300, 200, 3)
    assert set(plain["faces"][0]) == {"box", "score", "landmarks"}
    assert plain["faces"][0]["landmarks"]["nose"] == pytest.approx(detections.landmarks[0, 2].tolist(), abs=1e-3)
    assert len(Detections.empty((3, 4))) == 0


def intersection_over_union(a, b):
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b))
    return inter / (area_a[:, None] + area_b[None] - inter)


@pytest.fixture(scope="module")
def teacher(teacher_weights):
    return FaceDetector(teacher_weights)


FACES = {
    "ternaus+retinaface/no_face.jpg": (0, 0),
    "ageitgey+face_recognition/two_people.jpg": (2, 2),
    "deepinsight+insightface/t1.jpg": (6, 6),
    "timesler+facenet-pytorch/multiface.jpg": (6, 6),
    "serengil+retinaface/couple.jpg": (2, 2),
    "serengil+retinaface/img11.jpg": (1, 1),
    "vladmandic+human/solvay1927.jpg": (29, 29),
    "vladmandic+human/group-4.jpg": (5, 5),
    "justadudewhohacks+face-api.js/bbt1.jpg": (4, 4),
    "peiyunh+tiny/selfie.jpg": (200, 400),
}


def test_teacher_finds_the_faces_of_the_photographs(teacher, data_dir):
    images = [data_dir / "faces" / "demo" / "images" / name for name in FACES]
    for (name, (low, high)), detections in zip(FACES.items(), teacher.detect(images)):
        assert low <= len(detections) <= high, (name, detections)
        if len(detections):
            left_eye, right_eye, nose, left_mouth, right_mouth = detections[0].landmarks[0]
            assert left_eye[0] < nose[0] < right_eye[0] and left_eye[1] < nose[1] < left_mouth[1], name
            assert left_mouth[0] < right_mouth[0], name


def test_teacher_finds_a_close_up_with_padding_and_an_upright_face_with_exif(teacher, data_dir, tmp_path):
    path = data_dir / "faces" / "demo" / "images" / "serengil+retinaface" / "img11.jpg"
    pixels = load(path)
    face = teacher.detect(pixels)
    assert len(face) == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels, 1).copy()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_allclose(teacher.detect(tmp_path / "turned.png").boxes, face.boxes, atol=1e-2)
    x1, y1, x2, y2 = face.boxes[0].astype(int)
    close = Image.fromarray(pixels[y1:y2, x1:x2]).resize((900, 900 * (y2 - y1) // (x2 - x1)))
    found = FaceDetector(teacher.weights, size=320, pad=0.3).detect(close)
    assert len(found) == 1
    whole = np.array([[0, 0, close.width, close.height]], np.float32)
    assert intersection_over_union(found.boxes, whole).max() > 0.6


def test_teacher_finds_tiny_faces_with_tiles(teacher, data_dir):
    path = data_dir / "faces" / "demo" / "images" / "peiyunh+tiny" / "selfie.jpg"
    plain = len(teacher.detect(path))
    enlarged = FaceDetector(teacher.weights, size=1536, tile=640).detect(path)
    assert len(enlarged) > 1.3 * plain


def test_teacher_matches_the_annotated_boxes(teacher, data_dir):
    from featherface.evaluation.readers import read_annotations

    folder = data_dir / "faces" / "wider_val_bench"
    annotations = list(read_annotations(folder / "label.txt"))[::16]
    paths = [folder / "images" / annotation.name for annotation in annotations]
    large = found = 0
    for annotation, detections in zip(annotations, teacher.detect(paths)):
        boxes = annotation.boxes[~annotation.ignore]
        boxes = boxes[(boxes[:, 3] - boxes[:, 1]) >= 32]
        large += len(boxes)
        if len(boxes) and len(detections):
            found += (intersection_over_union(boxes, detections.boxes).max(axis=1) > 0.5).sum()
    assert large >= 20 and found / large > 0.8, (found, large)
