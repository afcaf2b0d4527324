"""Plain average precision at one IoU, by size of face, for sets that have no evaluation rules of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DataError
from .precision_recall import Matches, Scores
from .readers import Annotation, image_key
from .wider import check_rows

# Square root of a box's area in pixels: from the first bound on, below the second.
SIZES: dict[str, tuple[float, float]] = {
    "tiny": (0.0, 16.0),
    "small": (16.0, 32.0),
    "medium": (32.0, 96.0),
    "large": (96.0, math.inf),
}


def evaluate_average_precision(
    predictions: Mapping[str, np.ndarray],
    annotations: Sequence[Annotation],
    iou_threshold: float = 0.5,
    sizes: Mapping[str, tuple[float, float]] = SIZES,
) -> Scores:
    """Average precision over all faces and over those of each size.

    In an image, detections go in descending order of score. Each takes the free face of largest IoU, if that IoU is at
    least ``iou_threshold``. A detection without a face is dropped when at least that share of its own area lies inside
    an ignored box (COCO's rule for crowds); otherwise it is a false positive. Within a size, detections that took a
    face of another size are dropped, and false positives count by their own size. The curve has one point for each
    different score; AP is the area under its envelope. Coordinates are continuous (width = x2 - x1).

    Args:
        predictions: image name, with or without suffix -> (n, 5), ``x1 y1 x2 y2 score`` in pixels, in any order.
        annotations: the images to score.
        iou_threshold: above 0, up to 1.
        sizes: name -> bounds of the square root of a box's area, in pixels.

    Returns:
        Scores with the group "all" and one for each size.

    Raises:
        DataError: an array has another shape, or holds a value that is not finite.
        ValueError: the threshold is out of range.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be above 0 and at most 1, not {iou_threshold}")
    by_key = {image_key(name): rows for name, rows in predictions.items()}
    names = tuple(annotation.key for annotation in annotations)
    if len(set(names)) != len(names):
        raise DataError("the annotations list an image twice")

    image, score, size, hit, dropped = [], [], [], [], []
    face_image, face_size = [], []
    for index, annotation in enumerate(annotations):
        faces, ignored = annotation.boxes[~annotation.ignore], annotation.boxes[annotation.ignore]
        face_image.append(np.full(len(faces), index))
        face_size.append(_size(faces))
        rows = check_rows(annotation.name, by_key.get(annotation.key))
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        taken = match(rows[:, :4], faces, iou_threshold)
        found = taken >= 0
        own = _size(rows[:, :4])
        own[found] = face_size[-1][taken[found]]
        image.append(np.full(len(rows), index))
        score.append(rows[:, 4])
        size.append(own)
        hit.append(found)
        dropped.append(~found & _in_ignored(rows[:, :4], ignored, iou_threshold))

    image, score, size, hit, dropped = (
        np.concatenate([np.empty(0, dtype), *parts])
        for parts, dtype in ((image, np.int64), (score, float), (size, float), (hit, bool), (dropped, bool))
    )
    face_image = np.concatenate([np.empty(0, np.int64), *face_image])
    face_size = np.concatenate([np.empty(0), *face_size])
    levels, level = np.unique(-score, return_inverse=True)
    matches = {}
    for group, (low, high) in {"all": (0.0, math.inf), **sizes}.items():
        inside = (size >= low) & (size < high)
        of_size = (face_size >= low) & (face_size < high)
        faces = np.bincount(face_image[of_size], minlength=len(names))
        matches[group] = Matches(-levels, image, level.ravel(), inside & ~dropped, inside & hit, faces)
    return Scores(names, matches, tuple(name for name in names if name not in by_key))


def match(detections: np.ndarray, faces: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Gives each detection, in the order given, the free face of largest IoU if that is at least ``iou_threshold``.

    Args:
        detections: (n, 4), ``x1 y1 x2 y2``, best first.
        faces: (m, 4).

    Returns:
        (n,) int64: index of the face, -1 for none.
    """
    taken = np.full(len(detections), -1, np.int64)
    if not len(detections) or not len(faces):
        return taken
    iou = _iou(detections, faces)
    iou[iou < iou_threshold] = 0
    free = np.ones(len(faces), bool)
    for i in np.flatnonzero(iou.max(axis=1) > 0):
        overlap = np.where(free, iou[i], 0)
        face = int(overlap.argmax())
        if overlap[face] > 0:
            taken[i] = face
            free[face] = False
    return taken


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def _size(boxes: np.ndarray) -> np.ndarray:
    return np.sqrt(_area(boxes))


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.maximum(high - low, 0).prod(axis=2)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    intersection = _intersection(a, b)
    union = _area(a)[:, None] + _area(b)[None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)


def _in_ignored(detections: np.ndarray, ignored: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) bool: the share of the detection's area inside one of the ignored boxes reaches the threshold."""
    if not len(detections) or not len(ignored):
        return np.zeros(len(detections), bool)
    intersection = _intersection(detections, ignored)
    area = np.broadcast_to(_area(detections)[:, None], intersection.shape)
    share = np.divide(intersection, area, out=np.zeros_like(intersection), where=intersection > 0)
    return (share >= threshold).any(axis=1)
