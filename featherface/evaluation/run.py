"""Runs a detector over a data set, or takes predictions that another program wrote, and scores them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .average_precision import evaluate_average_precision
from .bootstrap import bootstrap, bootstrap_difference
from .dataset import FaceDataset, open_dataset
from .landmarks import evaluate_landmarks
from .precision_recall import Scores
from .protocols import NMS_THRESHOLD, SCORE_THRESHOLD, Protocol, get_protocol
from .readers import (
    Annotation,
    WiderGroundTruth,
    image_key,
    read_annotations,
    read_ground_truth,
    read_predictions,
    write_predictions,
)
from .report import AVERAGE_PRECISION_RULES, WIDER_RULES, Report, Result
from .wider import check_rows, evaluate_wider

# (H, W, 3) uint8 RGB -> boxes (n, 4) x1 y1 x2 y2 in pixels, scores (n,), landmarks (n, 5, 2) or None.
Detect = Callable[[np.ndarray], tuple[Any, Any, Any]]
Progress = Callable[[int, int], None]


def detect_dataset(
    detect: Detect, dataset: FaceDataset, protocol: str | Protocol = "orig", progress: Progress | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Detections of every image, in pixels of the stored image.

    Args:
        detect: ``detect(image) -> (boxes, scores, landmarks)``; the image is (H, W, 3) uint8 RGB as the protocol
            resizes it; boxes (n, 4) ``x1 y1 x2 y2`` and landmarks (n, 5, 2) are in its pixels; landmarks may be None.
        progress: called with the number of images done and of all images after each image.

    Returns:
        image name -> (n, 5) float64 ``x1 y1 x2 y2 score``, and image name -> (n, 5, 2) float64 landmarks, which lacks
        the images for which the detector gave none.

    Raises:
        DataError: an image cannot be decoded, or a detection is not finite.
    """
    protocol = get_protocol(protocol)
    predictions, landmarks = {}, {}
    for done, annotation in enumerate(dataset.annotations, 1):
        image = dataset.image(annotation.name)
        shown = protocol.resize(image)
        boxes, scores, points = detect(shown)
        back = np.array([image.shape[1] / shown.shape[1], image.shape[0] / shown.shape[0]])
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4) * np.tile(back, 2)
        rows = np.concatenate([boxes, np.asarray(scores, np.float64).reshape(-1, 1)], axis=1)
        if not np.isfinite(rows).all():
            raise DataError(f"the detector returned a value that is not finite for {dataset.path(annotation.name)}")
        predictions[annotation.name] = rows
        if points is not None:
            landmarks[annotation.name] = np.asarray(points, np.float64).reshape(-1, 5, 2) * back
        if progress:
            progress(done, len(dataset))
    return predictions, landmarks


def evaluate(
    detector: Any,
    data: str | os.PathLike | FaceDataset,
    protocol: str | Protocol = "orig",
    *,
    ground_truth: str | os.PathLike | WiderGroundTruth | None = None,
    limit: int | None = None,
    save_predictions: str | os.PathLike | None = None,
    baseline: str | os.PathLike | None = None,
    replicates: int = 1000,
    score_threshold: float = SCORE_THRESHOLD,
    nms_threshold: float = NMS_THRESHOLD,
    multiple: int = 1,
    facts: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Detects on a data set and scores the result.

    Args:
        detector: a :class:`~featherface.FaceDetector`, of which only the network is used: size, padding, tiles and
            limits are the protocol's; or a function as :func:`detect_dataset` takes it.
        data: a folder as :func:`~featherface.evaluation.dataset.open_dataset` takes it.
        protocol: ``orig``, ``vga640``, ``qvga320`` or ``s1600``.
        ground_truth: folder with the official WIDER FACE ground truth: the data set is then a part of WIDER FACE val
            and scored by the official rules restricted to its images, besides plain AP by size of face.
        limit: score at most so many images, spread evenly over the set.
        save_predictions: folder to write the predictions to, in WIDER FACE's text format.
        baseline: predictions to compare with, on the same images: the report then has the paired difference.
        replicates: bootstrap replicates for the confidence intervals.
        score_threshold: what a ``FaceDetector`` is run with. A function has its own thresholds: state them here.
        nms_threshold: the same.
        multiple: the same; a ``FaceDetector`` pads the image at right and bottom to a multiple of it. 1, no padding, is
            what the published protocols do.
        facts: what the report says of the detector: ``model``, ``weights``, ``weights_sha256``, ``device``,
            ``kernels``. Those of a ``FaceDetector`` are taken from it.
        progress: see :func:`detect_dataset`.

    Raises:
        DataError: the data set, the ground truth or the baseline cannot be used.
    """
    target = _data_target(data, limit, ground_truth)
    dataset = target.dataset
    baseline_rows = _read_common(baseline, target.names, "baseline") if baseline is not None else None
    protocol = get_protocol(protocol)
    detect, facts = _as_function(detector, score_threshold, nms_threshold, multiple, facts)
    predictions, points = detect_dataset(detect, dataset, protocol, progress)
    if save_predictions is not None:
        write_predictions(save_predictions, predictions)
    annotated = any(annotation.has_landmarks.any() for annotation in dataset.annotations)
    return Report(
        data_set=target.name,
        results=target.results(predictions, baseline_rows, replicates),
        replicates=replicates,
        landmarks=evaluate_landmarks(predictions, points, dataset.annotations) if annotated and points else None,
        protocol=protocol,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        multiple=multiple,
        baseline=Path(baseline).name if baseline is not None else None,
        baseline_missing=_lacking(baseline_rows, target.names),
        **facts,
    )


def evaluate_predictions(
    predictions: str | os.PathLike | Mapping[str, np.ndarray],
    ground_truth: str | os.PathLike | WiderGroundTruth | Sequence[Annotation] | None = None,
    *,
    data: str | os.PathLike | FaceDataset | None = None,
    limit: int | None = None,
    baseline: str | os.PathLike | None = None,
    replicates: int = 1000,
) -> Report:
    """Scores predictions that were made elsewhere.

    Args:
        predictions: a folder or file in WIDER FACE's text format, or image name -> (n, 5) ``x1 y1 x2 y2 score``.
        ground_truth: folder with the official WIDER FACE ground truth (official rules), or an annotation file (plain
            AP).
        data: a data set: only its images are scored, and predictions are in pixels of its images. Either this or
            ``ground_truth`` must be given.
        limit, baseline, replicates: see :func:`evaluate`; ``limit`` needs ``data``.

    Returns:
        The report; it knows the detector only by the name of the predictions.

    Raises:
        DataError: something cannot be used, or no image is common to the predictions, or the baseline, and what is to
            be scored.
    """
    if ground_truth is None and data is None:
        raise DataError("predictions can be scored only against something: give a ground truth or a data set")
    if limit is not None and data is None:
        raise DataError("a limit on the number of images needs a data set")
    target = _data_target(data, limit, ground_truth) if data is not None else _file_target(ground_truth)
    rows = _read_common(predictions, target.names, "predictions")
    baseline_rows = _read_common(baseline, target.names, "baseline") if baseline is not None else None
    return Report(
        data_set=target.name,
        results=target.results(rows, baseline_rows, replicates),
        replicates=replicates,
        predictions=Path(predictions).name if isinstance(predictions, (str, os.PathLike)) else None,
        unused_predictions=len({image_key(name) for name in rows} - set(target.names)),
        baseline=Path(baseline).name if baseline is not None else None,
        baseline_missing=_lacking(baseline_rows, target.names),
    )


def _read_common(
    predictions: str | os.PathLike | Mapping[str, np.ndarray], names: Sequence[str], what: str
) -> Mapping[str, np.ndarray]:
    """Predictions, of which some are of the images to score."""
    rows = read_predictions(predictions) if isinstance(predictions, (str, os.PathLike)) else predictions
    if {image_key(name) for name in rows}.isdisjoint(names):
        raise DataError(
            f"none of the {len(names)} images to score is among the {what}; expected names like "
            f"{names[0] if names else 'event/image'}"
        )
    return rows


def _lacking(rows: Mapping[str, np.ndarray] | None, names: Sequence[str]) -> int:
    """How many of the images to score have no row."""
    return 0 if rows is None else len(set(names) - {image_key(name) for name in rows})


@dataclass(frozen=True, eq=False)
class _Target:
    """What predictions are scored against: the official ground truth, annotations, or both."""

    name: str
    annotations: tuple[Annotation, ...] | None = None
    truth: WiderGroundTruth | None = None
    dataset: FaceDataset | None = None

    @property
    def names(self) -> list[str]:
        """Keys of the images to score."""
        if self.truth is not None:
            return list(self.truth.names)
        return [image_key(annotation.name) for annotation in self.annotations]

    def results(
        self, predictions: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray] | None, replicates: int
    ) -> tuple[Result, ...]:
        results = []
        for rules, score in ((WIDER_RULES, self._wider), (AVERAGE_PRECISION_RULES, self._plain)):
            scores = score(predictions)
            if scores is not None:
                difference = bootstrap_difference(scores, score(baseline), replicates) if baseline is not None else None
                results.append(Result(rules, scores, bootstrap(scores, replicates), difference))
        return tuple(results)

    def _wider(self, predictions: Mapping[str, np.ndarray]) -> Scores | None:
        if self.truth is None:
            return None
        if self.dataset is not None and self.dataset.enlargement:
            # The official ground truth is in pixels of the original images.
            factors = {image_key(name): (*xy, *xy, 1.0) for name, xy in self.dataset.enlargement.items()}
            predictions = {
                name: check_rows(name, rows) * np.array(factors.get(image_key(name), 1.0))
                for name, rows in predictions.items()
            }
        return evaluate_wider(predictions, self.truth)

    def _plain(self, predictions: Mapping[str, np.ndarray]) -> Scores | None:
        return None if self.annotations is None else evaluate_average_precision(predictions, self.annotations)


def _data_target(
    data: str | os.PathLike | FaceDataset,
    limit: int | None,
    ground_truth: str | os.PathLike | WiderGroundTruth | None,
) -> _Target:
    dataset = (data if isinstance(data, FaceDataset) else open_dataset(data)).limited(limit)
    truth = None
    if ground_truth is not None:
        truth = ground_truth if isinstance(ground_truth, WiderGroundTruth) else read_ground_truth(ground_truth)
        truth = truth.subset(annotation.name for annotation in dataset.annotations)
    return _Target(dataset.name, dataset.annotations, truth, dataset)


def _file_target(ground_truth: str | os.PathLike | WiderGroundTruth | Sequence[Annotation]) -> _Target:
    if isinstance(ground_truth, WiderGroundTruth):
        return _Target("wider_val", truth=ground_truth)
    if not isinstance(ground_truth, (str, os.PathLike)):
        return _Target("annotations", tuple(ground_truth))
    if Path(ground_truth).is_dir():
        return _Target("wider_val", truth=read_ground_truth(ground_truth))
    return _Target(Path(ground_truth).name, tuple(read_annotations(ground_truth)))


def _as_function(
    detector: Any,
    score_threshold: float,
    nms_threshold: float,
    multiple: int,
    facts: Mapping[str, str | None] | None,
) -> tuple[Detect, dict[str, Any]]:
    """The detector as a function, and what the report says of it."""
    from ..detector import FaceDetector

    if not isinstance(detector, FaceDetector):
        return detector, dict(facts or {})
    # A copy shares the network; the protocol sets everything that changes what is found.
    detector = copy.copy(detector)
    detector.score_threshold, detector.nms_threshold, detector.multiple = score_threshold, nms_threshold, multiple
    detector.size, detector.pad, detector.tile = None, 0.0, None
    detector.top_k = detector.keep_top_k = 10**9

    def detect(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        faces = detector.detect(image)
        return faces.boxes, faces.scores, faces.landmarks

    own = {
        "model": detector.model_name,
        "weights": detector.weights.name if detector.weights else None,
        "weights_sha256": detector.weights_sha256,
        "device": str(detector.device),
        "kernels": detector.kernels,
    }
    return detect, {**own, **(facts or {})}
