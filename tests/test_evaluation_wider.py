"""The WIDER FACE evaluator against hand-made cases, a literal port of the rules, and a published result."""

import math

import numpy as np
import pytest

from featherface.errors import DataError
from featherface.evaluation.readers import SETTINGS, WiderGroundTruth, read_ground_truth, read_predictions
from featherface.evaluation.wider import evaluate_wider


def ground_truth(*images):
    """Ground truth from (boxes as x y w h, indices kept); the same list for all three settings."""
    names = tuple(f"event/image_{i}" for i in range(len(images)))
    boxes = [np.array(b, float).reshape(-1, 4) for b, _ in images]
    keep = tuple(np.isin(np.arange(len(b)), kept) for b, (_, kept) in zip(boxes, images))
    boxes = tuple(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1) for b in boxes)
    return WiderGroundTruth(names, boxes, dict.fromkeys(SETTINGS, keep))


def predictions(*images):
    """Predictions from rows x y w h score."""
    result = {}
    for i, rows in enumerate(images):
        rows = np.array(rows, float).reshape(-1, 5)
        rows[:, 2:4] += rows[:, :2]
        result[f"event/image_{i}.jpg"] = rows
    return result


def ap(predicted, truth):
    return evaluate_wider(predicted, truth).ap["hard"]


FACE, OTHER, FAR = [10, 10, 20, 20], [100, 100, 20, 20], [300, 300, 20, 20]


def test_perfect_detections():
    truth = ground_truth(([FACE, OTHER], [0, 1]))
    assert ap(predictions([[*FACE, 0.9], [*OTHER, 0.1]]), truth) == 1.0


def test_a_missed_face_limits_recall():
    truth = ground_truth(([FACE, OTHER], [0, 1]))
    assert ap(predictions([[*FACE, 0.9]]), truth) == 0.5


def test_false_positive_above_a_face():
    # Precision is 0 and then 1/2 at recall 1.
    truth = ground_truth(([FACE], [0]))
    assert ap(predictions([[*FAR, 0.9], [*FACE, 0.1]]), truth) == 0.5


def test_false_positive_below_the_faces_is_free():
    truth = ground_truth(([FACE], [0]))
    assert ap(predictions([[*FACE, 0.9], [*FAR, 0.1]]), truth) == 1.0


def test_second_detection_of_a_face_is_a_false_positive():
    truth = ground_truth(([FACE, OTHER], [0, 1]))
    # hit, duplicate, hit: recall 1/2 at precision 1, recall 1 at precision 2/3.
    result = ap(predictions([[*FACE, 0.9], [*FACE, 0.5], [*OTHER, 0.1]]), truth)
    assert result == pytest.approx(0.5 + 0.5 * 2 / 3, abs=1e-15)


def test_detection_of_an_ignored_face_is_dropped():
    truth = ground_truth(([FACE, OTHER], [1]))
    assert ap(predictions([[*FACE, 0.9], [*FACE, 0.8], [*OTHER, 0.1]]), truth) == 1.0


def test_the_single_best_face_decides():
    # The best face is ignored: the detection is dropped, though it also overlaps a kept face by more than half.
    kept, ignored = [10, 10, 20, 20], [12, 10, 20, 20]
    truth = ground_truth(([kept, ignored], [0]))
    assert ap(predictions([[*ignored, 0.9]]), truth) == 0.0
    assert evaluate_wider(predictions([[*ignored, 0.9]]), truth).matches["hard"].counted.sum() == 0


def test_equal_overlaps_take_the_first_face():
    truth = ground_truth(([FACE, FACE], [1]))
    assert ap(predictions([[*FACE, 0.9]]), truth) == 0.0
    truth = ground_truth(([FACE, FACE], [0]))
    assert ap(predictions([[*FACE, 0.9]]), truth) == 1.0


def test_overlap_counts_inclusive_pixels():
    # Areas 10 x 10 and 10 x 5 in inclusive pixels: IoU exactly 1/2; with w = x2 - x1 it would be 4/9.
    truth = ground_truth(([[0, 0, 9, 9]], [0]))
    assert ap(predictions([[0, 0, 9, 4, 0.9]]), truth) == 1.0
    assert ap(predictions([[0, 0, 9, 3.99, 0.9]]), truth) == 0.0


def test_scores_are_normalised_over_all_images():
    # 0.5 of 0..1 is level 499; normalised by its own image alone it would be level 0.
    truth = ground_truth(([FACE], [0]), ([FACE], [0]))
    matches = evaluate_wider(predictions([[*FACE, 1.0], [*FAR, 0.0]], [[*FACE, 0.5]]), truth).matches["hard"]
    assert matches.level.tolist() == [0, 999, 499]
    assert matches.scores[499] == 0.5


def test_scores_of_any_range():
    truth = ground_truth(([FACE, OTHER], [0, 1]))
    rows = [[*FACE, 250.0], [*FAR, -3.0], [*OTHER, 100.0]]
    assert ap(predictions(rows), truth) == 1.0


def test_detections_closer_than_a_threshold_step_enter_together():
    # Both scores lie between the same two of the 1000 thresholds, so the curve has the one point 1/2.
    truth = ground_truth(([FACE], [0]), ([FACE], []))
    rows = ([[*FAR, 0.50031], [*FACE, 0.50030], [*FAR, 1.0]], [[*FACE, 0.0]])
    result = evaluate_wider(predictions(*rows), truth)
    assert result.ap["hard"] == pytest.approx(1 / 3, abs=1e-15)


def test_all_scores_equal():
    truth = ground_truth(([FACE], [0]))
    assert ap(predictions([[*FACE, 0.7]]), truth) == 1.0
    assert ap(predictions([[*FACE, 0.7], [*FAR, 0.7]]), truth) == 0.5


def test_order_of_the_file_does_not_matter():
    truth = ground_truth(([FACE, OTHER], [0, 1]))
    rows = [[*FAR, 0.95], [*OTHER, 0.1], [*FACE, 0.9]]
    assert ap(predictions(rows), truth) == ap(predictions(rows[::-1]), truth)


def test_false_positives_in_images_without_boxes_do_not_count():
    truth = ground_truth(([FACE], [0]), ([], []))
    assert ap(predictions([[*FACE, 0.5]], [[*FAR, 0.9]]), truth) == 1.0


def test_the_box_of_zeros_of_an_image_without_faces_is_a_box():
    # The official files hold such a box, so here false positives do count.
    truth = ground_truth(([FACE], [0]), ([[0, 0, 0, 0]], []))
    assert ap(predictions([[*FACE, 0.5]], [[*FAR, 0.9]]), truth) == 0.5


def test_faces_of_images_without_detections_count():
    truth = ground_truth(([FACE], [0]), ([FACE], [0]))
    assert ap(predictions([[*FACE, 0.5]], []), truth) == 0.5


def test_missing_images_are_named():
    truth = ground_truth(([FACE], [0]), ([FACE], [0]))
    result = evaluate_wider(predictions([[*FACE, 0.5]]), truth)
    assert result.ap["hard"] == 0.5
    assert result.missing == ("event/image_1",)
    assert evaluate_wider(predictions([[*FACE, 0.5]], []), truth).missing == ()


def test_no_predictions_at_all():
    result = evaluate_wider({}, ground_truth(([FACE], [0])))
    assert result.ap["hard"] == 0.0
    precision, recall = result.matches["hard"].curve()
    assert not precision.any() and not recall.any()


def test_no_face_to_find_gives_nan():
    result = evaluate_wider(predictions([[*FACE, 0.5]]), ground_truth(([FACE], [])))
    assert math.isnan(result.ap["hard"])
    assert result.faces == {"easy": 0, "medium": 0, "hard": 0}


@pytest.mark.parametrize("rows", [np.zeros((2, 4)), np.zeros(5), np.array([[0, 0, 1, 1, np.nan]])])
def test_unusable_predictions_are_refused(rows):
    with pytest.raises(DataError, match="event/image_0"):
        evaluate_wider({"event/image_0": rows}, ground_truth(([FACE], [0])))


def test_subset():
    truth = ground_truth(([FACE], [0]), ([FACE, OTHER], [0, 1]), ([], []))
    part = truth.subset(["event/image_2.jpg", "event/image_1.jpg"])
    assert part.names == ("event/image_2", "event/image_1")
    assert [len(b) for b in part.boxes] == [0, 2]
    predicted = predictions([[*FAR, 0.99]], [[*FACE, 0.5], [*OTHER, 0.4]], [])
    assert ap(predicted, part) == 1.0
    with pytest.raises(DataError, match="no/such"):
        truth.subset(["no/such.jpg"])
    with pytest.raises(DataError, match="twice"):
        truth.subset(["event/image_1.jpg", "event/image_1"])


# The rules once more, one detection and one threshold at a time.


def literal_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return 0.0
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return w * h / (area_a + area_b - w * h)


def literal_image(rows, boxes, keep):
    found_of_face = [0] * len(boxes)
    proposals = [1] * len(rows)
    recalls = [0] * len(rows)
    for h, row in enumerate(rows):
        overlaps = [literal_iou(box, row[:4]) for box in boxes]
        best = max(range(len(boxes)), key=lambda i: (overlaps[i], -i))
        if overlaps[best] >= 0.5:
            if not keep[best]:
                found_of_face[best] = -1
                proposals[h] = -1
            elif found_of_face[best] == 0:
                found_of_face[best] = 1
        recalls[h] = sum(1 for value in found_of_face if value == 1)
    return proposals, recalls


def literal_ap(predicted, truth, setting):
    predicted = {name.removesuffix(".jpg"): rows.tolist() for name, rows in predicted.items()}
    all_scores = [row[4] for name in truth.names for row in predicted.get(name, [])]
    low, high = min(all_scores), max(all_scores)
    proposals_of, recalls_of = [0] * 1000, [0] * 1000
    count_face = 0
    for name, boxes, keep in zip(truth.names, truth.boxes, truth.keep[setting]):
        boxes, keep = boxes.tolist(), keep.tolist()
        count_face += sum(keep)
        rows = sorted(predicted.get(name, []), key=lambda row: -row[4])
        if not rows or not boxes:
            continue
        scores = [(row[4] - low) / (high - low) for row in rows]
        proposals, recalls = literal_image(rows, boxes, keep)
        for t in range(1000):
            threshold = 1 - (t + 1) / 1000
            last = None
            for i, score in enumerate(scores):
                if score >= threshold:
                    last = i
            if last is not None:
                proposals_of[t] += sum(1 for p in proposals[: last + 1] if p == 1)
                recalls_of[t] += recalls[last]
    recall = [0.0] + [r / count_face for r in recalls_of] + [1.0]
    precision = [0.0] + [r / p if p else 0.0 for r, p in zip(recalls_of, proposals_of)] + [0.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum(
        (recall[i + 1] - recall[i]) * precision[i + 1] for i in range(len(recall) - 1) if recall[i + 1] != recall[i]
    )


def random_case(seed):
    random = np.random.default_rng(seed)
    names, all_boxes, predicted = [], [], {}
    keep = {setting: [] for setting in SETTINGS}
    for i in range(int(random.integers(3, 9))):
        count = int(random.choice([0, 1, 2, 5, 15]))
        corner = random.integers(0, 80, (count, 2))
        extent = random.integers(0, 30, (count, 2))
        boxes = np.concatenate([corner, corner + extent], axis=1).astype(float)
        if not count and random.random() < 0.5:
            boxes = np.zeros((1, 4))
        names.append(f"event/{i}")
        all_boxes.append(boxes)
        for share, setting in zip((0.3, 0.6, 0.9), SETTINGS):
            keep[setting].append((random.random(len(boxes)) < share) & boxes.any(axis=1))
        near = boxes[random.integers(0, len(boxes), 3 * len(boxes))] if len(boxes) else np.empty((0, 4))
        near = near + random.normal(0, 2.5, near.shape).round(1)
        other = random.integers(0, 80, (int(random.integers(0, 6)), 4)).astype(float)
        rows = np.concatenate([near, other])
        # One decimal makes equal scores frequent.
        scores = random.random(len(rows)).round(int(random.choice([1, 6])))
        if random.random() < 0.85:
            predicted[f"event/{i}.jpg"] = np.concatenate([rows, scores[:, None]], axis=1)
    return predicted, WiderGroundTruth(tuple(names), tuple(all_boxes), {k: tuple(v) for k, v in keep.items()})


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_the_literal_port(seed):
    predicted, truth = random_case(seed)
    result = evaluate_wider(predicted, truth)
    for setting in SETTINGS:
        if result.faces[setting] and predicted:
            assert result.ap[setting] == pytest.approx(literal_ap(predicted, truth, setting), abs=1e-6)


PUBLISHED = "retinaface_mnet025_insightface_charrin_python.txt"


@pytest.fixture(scope="module")
def official(data_dir):
    pytest.importorskip("scipy")
    folder = data_dir / "widerface_gt"
    if not (folder / "wider_face_val.mat").is_file():
        pytest.skip(f"{folder} does not hold the official ground truth")
    return read_ground_truth(folder)


def test_official_ground_truth(official):
    assert len(official.names) == 3226
    assert {s: sum(int(k.sum()) for k in official.keep[s]) for s in SETTINGS} == {
        "easy": 7211,
        "medium": 13319,
        "hard": 31958,
    }
    assert sum(not boxes.any() for boxes in official.boxes) == 4


def test_published_predictions(official, data_dir):
    predicted = read_predictions(data_dir / "widerface_gt" / "published_predictions" / PUBLISHED)
    result = evaluate_wider(predicted, official)
    assert result.missing == ()
    for setting, expected in zip(SETTINGS, (83.28, 77.02, 39.52)):
        assert 100 * result.ap[setting] == pytest.approx(expected, abs=0.05)


def test_part_of_the_published_predictions_agrees_with_the_literal_port(official, data_dir):
    predicted = read_predictions(data_dir / "widerface_gt" / "published_predictions" / PUBLISHED)
    part = official.subset(official.names[::200])
    predicted = {name: predicted[name] for name in part.names}
    result = evaluate_wider(predicted, part)
    for setting in SETTINGS:
        assert result.ap[setting] == pytest.approx(literal_ap(predicted, part, setting), abs=1e-6)
