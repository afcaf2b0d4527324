"""Plain AP, landmark error and bootstrap intervals."""

import math

import numpy as np
import pytest

from featherface.errors import DataError
from featherface.evaluation.average_precision import evaluate_average_precision
from featherface.evaluation.bootstrap import bootstrap, bootstrap_difference
from featherface.evaluation.landmarks import evaluate_landmarks, landmark_error
from featherface.evaluation.precision_recall import Matches, Scores, average_precision
from featherface.evaluation.readers import Annotation


def annotation(name, boxes, ignore=None, landmarks=None):
    boxes = np.array(boxes, float).reshape(-1, 4)
    ignore = np.zeros(len(boxes), bool) if ignore is None else np.array(ignore, bool)
    landmarks = np.full((len(boxes), 5, 2), np.nan) if landmarks is None else np.asarray(landmarks, float)
    return Annotation(name, boxes, landmarks, ignore)


def rows(*values):
    return np.array(values, float).reshape(-1, 5)


def test_area_under_the_envelope():
    assert average_precision(np.array([1.0, 0.5, 2 / 3]), np.array([0.25, 0.25, 0.5])) == 0.25 + 0.25 * 2 / 3
    assert average_precision(np.array([0.2, 0.5]), np.array([0.5, 1.0])) == 0.5
    assert average_precision(np.empty(0), np.empty(0)) == 0
    stacked = average_precision(np.array([[1.0, 0.5], [0.0, 0.5]]), np.array([[0.5, 1.0], [0.0, 1.0]]))
    assert stacked.tolist() == [0.75, 0.5]


def test_hits_misses_and_duplicates():
    truth = [annotation("a.jpg", [[0, 0, 10, 10], [50, 50, 60, 60]])]
    found = rows([0, 0, 10, 10, 0.9], [0, 0, 10, 10, 0.8], [50, 50, 60, 60, 0.7])
    assert evaluate_average_precision({"a": found}, truth).ap["all"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert evaluate_average_precision({"a.png": found[:1]}, truth).ap["all"] == 0.5
    assert evaluate_average_precision({}, truth).ap["all"] == 0
    assert evaluate_average_precision({}, truth).missing == ("a",)


def test_false_positives_count_in_images_without_faces():
    truth = [annotation("a.jpg", [[0, 0, 10, 10]]), annotation("b.jpg", [])]
    found = {"a": rows([0, 0, 10, 10, 0.5]), "b": rows([0, 0, 10, 10, 0.9])}
    assert evaluate_average_precision(found, truth).ap["all"] == 0.5


def test_overlap_is_continuous_and_the_threshold_inclusive():
    truth = [annotation("a.jpg", [[0, 0, 10, 10]])]
    assert evaluate_average_precision({"a": rows([0, 0, 10, 5, 0.5])}, truth).ap["all"] == 1
    assert evaluate_average_precision({"a": rows([0, 0, 10, 4.99, 0.5])}, truth).ap["all"] == 0
    assert evaluate_average_precision({"a": rows([0, 0, 10, 8, 0.5])}, truth, iou_threshold=0.81).ap["all"] == 0
    with pytest.raises(ValueError, match="iou_threshold"):
        evaluate_average_precision({}, truth, iou_threshold=0)


def test_a_taken_face_leaves_the_next_best():
    # Both detections overlap the first face most; the second one takes the neighbour.
    truth = [annotation("a.jpg", [[0, 0, 10, 10], [0, 3, 10, 13]])]
    found = rows([0, 0, 10, 10, 0.9], [0, 1, 10, 11, 0.8])
    assert evaluate_average_precision({"a": found}, truth).ap["all"] == 1


def test_ignored_boxes():
    truth = [annotation("a.jpg", [[0, 0, 10, 10], [50, 50, 90, 90], [5, 5, 5, 5]], ignore=[False, True, True])]
    # Several small detections inside the ignored box are dropped; one elsewhere is not.
    inside = rows([50, 50, 60, 60, 0.9], [60, 60, 90, 90, 0.8], [0, 0, 10, 10, 0.7])
    assert evaluate_average_precision({"a": inside}, truth).ap["all"] == 1
    assert evaluate_average_precision({"a": inside}, truth).faces["all"] == 1
    elsewhere = rows([30, 50, 60, 60, 0.9], [0, 0, 10, 10, 0.7])
    assert evaluate_average_precision({"a": elsewhere}, truth).ap["all"] == 0.5
    # A face that can be found goes before an ignored one on the same place.
    truth = [annotation("a.jpg", [[0, 0, 10, 10], [0, 0, 10, 10]], ignore=[True, False])]
    assert evaluate_average_precision({"a": rows([0, 0, 10, 10, 0.9])}, truth).ap["all"] == 1


def test_sizes():
    truth = [annotation("a.jpg", [[0, 0, 15, 15], [100, 0, 116, 16], [200, 0, 250, 50], [300, 0, 400, 100]])]
    result = evaluate_average_precision({}, truth)
    assert result.faces == {"all": 4, "tiny": 1, "small": 1, "medium": 1, "large": 1}
    # A detection counts by the size of the face it found, a false positive by its own.
    found = {"a": rows([500, 500, 520, 520, 0.95], [100, 0, 114, 16, 0.9], [0, 0, 15, 15, 0.8])}
    result = evaluate_average_precision(found, truth)
    assert result.ap == pytest.approx({"all": 1 / 4 * 2 / 3 * 2, "tiny": 1, "small": 0.5, "medium": 0, "large": 0})
    empty = evaluate_average_precision(found, [annotation("a.jpg", [[0, 0, 15, 15]])])
    assert math.isnan(empty.ap["large"]) and empty.faces["large"] == 0


def test_equal_scores_enter_together():
    truth = [annotation("a.jpg", [[0, 0, 10, 10]])]
    both = rows([0, 0, 10, 10, 0.5], [50, 50, 60, 60, 0.5])
    assert evaluate_average_precision({"a": both}, truth).ap["all"] == 0.5
    assert evaluate_average_precision({"a": both[::-1]}, truth).ap["all"] == 0.5


def test_refuses_an_image_twice():
    with pytest.raises(DataError, match="twice"):
        evaluate_average_precision({}, [annotation("a.jpg", []), annotation("a.png", [])])


def literal_average_precision(predictions, annotations, threshold=0.5):
    """Detection by detection, for distinct scores."""
    everything = sorted(
        ((row[4], i, row[:4]) for i, a in enumerate(annotations) for row in predictions.get(a.name, [])),
        key=lambda item: -item[0],
    )
    taken = [[False] * len(a.boxes) for a in annotations]

    def overlap(a, b, of_first=False):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        area = (a[2] - a[0]) * (a[3] - a[1])
        return w * h / (area if of_first else area + (b[2] - b[0]) * (b[3] - b[1]) - w * h)

    faces = sum(int((~a.ignore).sum()) for a in annotations)
    hits, counted, points = 0, 0, []
    for _, i, box in everything:
        best, best_overlap = None, 0.0
        for f, face in enumerate(annotations[i].boxes):
            value = overlap(box, face)
            if not annotations[i].ignore[f] and not taken[i][f] and value >= threshold and value > best_overlap:
                best, best_overlap = f, value
        if best is not None:
            taken[i][best] = True
            hits += 1
        elif any(overlap(box, f, True) >= threshold for f in annotations[i].boxes[annotations[i].ignore]):
            continue
        counted += 1
        points.append((hits / faces, hits / counted))
    total, previous = 0.0, 0.0
    for k, (recall, _) in enumerate(points):
        total += (recall - previous) * max(p for _, p in points[k:])
        previous = recall
    return total


def random_set(seed, images=12):
    random = np.random.default_rng(seed)
    annotations, predictions = [], {}
    for i in range(images):
        corner = random.uniform(0, 80, (int(random.integers(0, 9)), 2))
        boxes = np.concatenate([corner, corner + random.uniform(2, 40, corner.shape)], axis=1)
        annotations.append(annotation(f"{i}.jpg", boxes, random.random(len(boxes)) < 0.25))
        near = np.repeat(boxes, 2, axis=0)
        near = near + random.normal(0, 2, near.shape)
        corner = random.uniform(0, 80, (4, 2))
        other = np.concatenate([corner, corner + random.uniform(2, 40, corner.shape)], axis=1)
        found = np.concatenate([near, other])
        predictions[f"{i}.jpg"] = np.concatenate([found, random.random((len(found), 1))], axis=1)
    return predictions, annotations


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_a_literal_version(seed):
    predictions, annotations = random_set(seed)
    result = evaluate_average_precision(predictions, annotations).ap["all"]
    assert result == pytest.approx(literal_average_precision(predictions, annotations), abs=1e-9)


# Bootstrap


def repeated(predictions, annotations, counts):
    """The set with image i present counts[i] times."""
    more, records = {}, []
    for a, count in zip(annotations, counts):
        for k in range(int(count)):
            name = f"{k}_{a.name}"
            records.append(Annotation(name, a.boxes, a.landmarks, a.ignore))
            more[name] = predictions[a.name]
    return more, records


@pytest.mark.parametrize("dense", [True, False])
def test_weights_are_repetitions(dense, monkeypatch):
    if not dense:
        monkeypatch.setattr("featherface.evaluation.precision_recall._DENSE_CELLS", 0)
    predictions, annotations = random_set(3)
    result = evaluate_average_precision(predictions, annotations)
    weights = np.random.default_rng(0).integers(0, 3, (5, len(annotations)))
    for group in ("all", "small"):
        weighted = result.matches[group].weighted_average_precision(weights)
        for value, counts in zip(weighted, weights):
            expected = evaluate_average_precision(*repeated(predictions, annotations, counts)).ap[group]
            assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)
        once = result.matches[group].weighted_average_precision(np.ones((1, len(annotations))))
        assert once[0] == pytest.approx(result.ap[group], abs=1e-12)


def test_weights_without_faces_give_nan():
    result = evaluate_average_precision(
        {"a": rows([0, 0, 9, 9, 0.5])}, [annotation("a.jpg", [[0, 0, 9, 9]]), annotation("b.jpg", [])]
    )
    weighted = result.matches["all"].weighted_average_precision(np.array([[0, 2], [1, 1]]))
    assert math.isnan(weighted[0]) and weighted[1] == 1


def test_interval_is_seeded_and_holds_the_value():
    result = evaluate_average_precision(*random_set(5, images=40))
    first, again, other = bootstrap(result), bootstrap(result), bootstrap(result, seed=1)
    assert first["all"] == again["all"] != other["all"]
    interval = first["all"]
    assert interval.low < interval.value == result.ap["all"] < interval.high
    narrow = bootstrap(result, level=0.5)["all"]
    assert interval.low < narrow.low < narrow.high < interval.high


def test_interval_width_matches_theory():
    # One face per image, found without false positives with probability 1/2: AP is the mean of n coin flips.
    n = 400
    found = np.arange(n) % 2 == 0
    image = np.flatnonzero(found)
    matches = Matches(
        np.zeros(1),
        image,
        np.zeros(len(image), np.int64),
        np.ones(len(image), bool),
        np.ones(len(image), bool),
        np.ones(n, np.int64),
    )
    interval = bootstrap(Scores(tuple(map(str, range(n))), {"all": matches}), replicates=4000)["all"]
    deviation = 1.96 * math.sqrt(0.25 / n)
    assert interval.low == pytest.approx(0.5 - deviation, abs=0.005)
    assert interval.high == pytest.approx(0.5 + deviation, abs=0.005)


def test_paired_difference():
    predictions, annotations = random_set(7, images=40)
    ours = evaluate_average_precision(predictions, annotations)
    weaker = {name: found[len(found) // 2 :] for name, found in predictions.items()}
    theirs = evaluate_average_precision(weaker, annotations)
    same = bootstrap_difference(ours, ours)["all"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    difference = bootstrap_difference(ours, theirs)["all"]
    assert difference.value == ours.ap["all"] - theirs.ap["all"] > 0
    assert 0 < difference.low < difference.value < difference.high
    back = bootstrap_difference(theirs, ours)["all"]
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low))
    with pytest.raises(DataError, match="same images"):
        bootstrap_difference(ours, evaluate_average_precision(predictions, annotations[:-1]))


def test_no_faces_no_interval():
    result = evaluate_average_precision({}, [annotation("a.jpg", [])])
    interval = bootstrap(result)["all"]
    assert math.isnan(interval.value) and math.isnan(interval.low)
    assert math.isnan(bootstrap(evaluate_average_precision({}, []))["all"].high)


# Landmarks

POINTS = np.array([[0, 0], [10, 0], [5, 5], [2, 8], [8, 8]], float)


def test_landmark_error():
    moved = POINTS + np.array([3, 4])
    partly = POINTS.copy()
    partly[2:4] = np.nan
    no_eye, one_point = POINTS.copy(), POINTS.copy()
    no_eye[0] = np.nan
    one_point[1] = one_point[0]
    predicted = np.stack([POINTS, moved, moved, moved, moved])
    errors = landmark_error(predicted, np.stack([POINTS, POINTS, partly, no_eye, one_point]))
    assert errors[:3].tolist() == [0, 0.5, 0.5] and np.isnan(errors[3:]).all()
    one = POINTS.copy()
    one[4] += [0, 5]
    assert landmark_error(one[None], POINTS[None]).tolist() == [0.1]
    assert landmark_error(np.empty((0, 5, 2)), np.empty((0, 5, 2))).shape == (0,)
    with pytest.raises(ValueError, match="n, 5, 2"):
        landmark_error(POINTS, POINTS)
    with pytest.raises(ValueError, match="n, 5, 2"):
        landmark_error(POINTS[None], POINTS[None].repeat(2, 0))


def test_landmarks_of_a_set():
    boxes = [[0, 0, 10, 10], [50, 50, 60, 60], [90, 90, 99, 99]]
    truth = [
        annotation("a.jpg", boxes, landmarks=[POINTS, POINTS + 50, np.full((5, 2), np.nan)]),
        annotation("b.jpg", boxes[:1], landmarks=[POINTS]),
        annotation("c.jpg", []),
    ]
    # Lower score first; a duplicate of the first face with wrong landmarks does not count.
    found = {
        "a": rows([0, 0, 10, 10, 0.2], [50, 50, 60, 60, 0.5], [0, 0, 10, 10, 0.9], [90, 90, 99, 99, 1]),
        "c": rows(),
    }
    points = {"a": np.stack([POINTS + 100, POINTS + 50, POINTS + np.array([3, 4]), POINTS]), "c": np.empty((0, 5, 2))}
    result = evaluate_landmarks(found, points, truth)
    assert (result.error, result.median, result.found, result.faces) == (0.25, 0.25, 2, 3)
    nothing = evaluate_landmarks({}, {}, truth)
    assert math.isnan(nothing.error) and (nothing.found, nothing.faces) == (0, 3)
