"""WIDER FACE's average precision by the rules of its Matlab evaluation code, in NumPy.

Yang et al., "WIDER FACE: A Face Detection Benchmark", CVPR 2016; the rules are those of its published ``eval_tools``:

1. Scores are mapped to 0..1 by the lowest and highest score of all images together.
2. In an image, detections go in descending order of score. Each looks at the one face of largest IoU, counted with
   inclusive pixels (width = x2 - x1 + 1), and matches it when that IoU is 0.5 or more.
3. If that face is not in the setting's list, the detection is dropped. If it is and is still free, it is found. If it
   was found before, or nothing matched, the detection counts as a false positive.
4. The curve has 1000 points, thresholds 1 - t / 1000; counts are summed over the images.
5. Precision = found / counted detections, recall = found / all faces of the setting's lists; AP is the area under the
   envelope of the curve.
6. An image without ground-truth boxes, or without detections, is left out; its faces still count in the recall.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import DataError
from .precision_recall import Matches, Scores
from .readers import WiderGroundTruth, image_key

THRESHOLDS = 1.0 - np.arange(1, 1001) / 1000
IOU_THRESHOLD = 0.5


def evaluate_wider(predictions: Mapping[str, np.ndarray], ground_truth: WiderGroundTruth) -> Scores:
    """Scores predictions on the images of ``ground_truth``; predictions of other images are left aside.

    Args:
        predictions: image name, with or without suffix -> (n, 5), ``x1 y1 x2 y2 score`` in pixels, in any order.
        ground_truth: of all of WIDER FACE val, or a subset; a subset is scored by the same rules, with the scores'
            lowest and highest taken on its images.

    Returns:
        Scores with the groups "easy", "medium" and "hard".

    Raises:
        DataError: an array has another shape, or holds a value that is not finite.
    """
    by_key = {image_key(name): rows for name, rows in predictions.items()}
    missing = tuple(name for name in ground_truth.names if name not in by_key)
    images = [_sorted_rows(name, by_key.get(name)) for name in ground_truth.names]
    scores = np.concatenate([rows[:, 4] for rows in images] or [np.empty(0)])
    low, high = (scores.min(), scores.max()) if scores.size else (0.0, 0.0)
    span = high - low if high > low else 1.0

    columns: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {s: [] for s in ground_truth.keep}
    for index, (rows, boxes) in enumerate(zip(images, ground_truth.boxes)):
        if not len(rows) or not len(boxes):
            continue
        level = np.searchsorted(-THRESHOLDS, -(rows[:, 4] - low) / span, side="left")
        best, overlap = best_overlap(rows[:, :4], boxes)
        matched = overlap >= IOU_THRESHOLD
        first = np.zeros(len(rows), bool)
        # Matched detections in descending order: the first that names a face finds it.
        detections = np.flatnonzero(matched)
        first[detections[np.unique(best[detections], return_index=True)[1]]] = True
        image = np.full(len(rows), index)
        for setting, columns_of_setting in columns.items():
            kept = ground_truth.keep[setting][index][best]
            columns_of_setting.append((image, level, ~matched | kept, first & kept))

    matches = {}
    for setting, parts in columns.items():
        image, level, counted, hit = (
            np.concatenate([part[i] for part in parts] or [np.empty(0, dtype)])
            for i, dtype in enumerate((np.int64, np.int64, bool, bool))
        )
        faces = np.array([int(keep.sum()) for keep in ground_truth.keep[setting]], np.int64)
        matches[setting] = Matches(THRESHOLDS * span + low, image, level, counted, hit, faces)
    return Scores(ground_truth.names, matches, missing)


def best_overlap(detections: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The face of largest IoU for each detection, with inclusive pixels; the first one among equals.

    Args:
        detections: (n, 4) float64, ``x1 y1 x2 y2``.
        faces: (m, 4) float64, m >= 1.

    Returns:
        Index of the face (n,) int64, and the IoU (n,) float64.
    """
    best = np.empty(len(detections), np.int64)
    overlap = np.empty(len(detections))
    face_area = (faces[:, 2] - faces[:, 0] + 1) * (faces[:, 3] - faces[:, 1] + 1)
    step = max(1, (1 << 20) // len(faces))
    for start in range(0, len(detections), step):
        part = detections[start : start + step, None]
        width = np.minimum(part[..., 2], faces[:, 2]) - np.maximum(part[..., 0], faces[:, 0]) + 1
        height = np.minimum(part[..., 3], faces[:, 3]) - np.maximum(part[..., 1], faces[:, 1]) + 1
        area = (part[..., 2] - part[..., 0] + 1) * (part[..., 3] - part[..., 1] + 1)
        intersection = width * height
        iou = np.divide(
            intersection,
            face_area + area - intersection,
            out=np.zeros_like(intersection),
            where=(width > 0) & (height > 0),
        )
        best[start : start + step] = iou.argmax(axis=1)
        overlap[start : start + step] = iou.max(axis=1)
    return best, overlap


def _sorted_rows(name: str, rows: np.ndarray | None) -> np.ndarray:
    rows = check_rows(name, rows)
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def check_rows(name: str, rows: np.ndarray | None) -> np.ndarray:
    """Predictions of one image as (n, 5) float64; None means no detections.

    Raises:
        DataError: another shape, or a value that is not finite.
    """
    if rows is None:
        return np.empty((0, 5))
    rows = np.asarray(rows, np.float64)
    if rows.size == 0:
        return np.empty((0, 5))
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise DataError(f"predictions of {name} have the shape {rows.shape}; expected (n, 5): x1 y1 x2 y2 score")
    if not np.isfinite(rows).all():
        raise DataError(f"predictions of {name} hold a value that is not finite; remove that detection")
    return rows
