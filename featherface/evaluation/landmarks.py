"""Error of landmarks, as a share of the distance between the eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .average_precision import match
from .readers import Annotation, image_key


@dataclass(frozen=True)
class LandmarkScores:
    """Landmark error over a data set.

    Attributes:
        error: mean over the found faces of their error, a share of the distance between the eyes; NaN without any.
        median: median over the same faces.
        found: annotated faces to which a detection was matched.
        faces: faces annotated with both eyes.
    """

    error: float
    median: float
    found: int
    faces: int


def landmark_error(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean distance of landmarks from their true places, divided by the true distance between the eyes.

    ``e = mean_k ||p_k - t_k|| / ||t_left_eye - t_right_eye||``, the mean over the annotated landmarks
    (the normalised mean error of the alignment literature, inter-ocular, with eye centres).

    Args:
        predicted: (n, 5, 2), left eye, right eye, nose, left and right corner of the mouth; pixels.
        target: (n, 5, 2), the same; NaN where a landmark is not annotated.

    Returns:
        (n,) float64; NaN where an eye is not annotated or both eyes are at one point.

    Raises:
        ValueError: the shapes differ or are not (n, 5, 2).
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if predicted.shape != target.shape or target.ndim != 3 or target.shape[1:] != (5, 2):
        raise ValueError(f"landmarks must be two arrays (n, 5, 2), not {predicted.shape} and {target.shape}")
    eyes = np.linalg.norm(target[:, 0] - target[:, 1], axis=1)
    given = ~np.isnan(target).any(axis=2)
    distance = np.where(given, np.linalg.norm(predicted - target, axis=2), 0).sum(axis=1)
    valid = given[:, :2].all(axis=1) & (eyes > 0)
    return np.divide(distance, given.sum(axis=1) * eyes, out=np.full(len(target), np.nan), where=valid)


def evaluate_landmarks(
    boxes: Mapping[str, np.ndarray],
    landmarks: Mapping[str, np.ndarray],
    annotations: Sequence[Annotation],
    iou_threshold: float = 0.5,
) -> LandmarkScores:
    """Landmark error on the faces that were found.

    Detections, best first, take the free annotated face of largest IoU that reaches ``iou_threshold``.

    Args:
        boxes: image name -> (n, 5), ``x1 y1 x2 y2 score``.
        landmarks: image name -> (n, 5, 2), in the order of the boxes.
        annotations: the images to score; faces without both eyes are left out.
    """
    boxes = {image_key(name): rows for name, rows in boxes.items()}
    landmarks = {image_key(name): points for name, points in landmarks.items()}
    errors, faces = [np.empty(0)], 0
    for annotation in annotations:
        target = annotation.landmarks
        usable = ~annotation.ignore & ~np.isnan(target[:, :2]).any(axis=(1, 2))
        faces += int(usable.sum())
        rows = np.asarray(boxes.get(annotation.key, np.empty((0, 5))), np.float64).reshape(-1, 5)
        points = np.asarray(landmarks.get(annotation.key, np.empty((0, 5, 2))), np.float64).reshape(-1, 5, 2)
        order = np.argsort(-rows[:, 4], kind="stable")
        taken = match(rows[order, :4], annotation.boxes, iou_threshold)
        pairs = (taken >= 0) & usable[taken] if len(usable) else np.zeros(len(taken), bool)
        errors.append(landmark_error(points[order][pairs], target[taken[pairs]]))
    values = np.concatenate(errors)
    values = values[~np.isnan(values)]
    mean, median = (float(values.mean()), float(np.median(values))) if values.size else (float("nan"), float("nan"))
    return LandmarkScores(mean, median, int(values.size), faces)
