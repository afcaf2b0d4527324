"""Scoring of face detectors: readers, WIDER FACE's rules, plain average precision, landmark error, intervals."""

from .average_precision import SIZES, evaluate_average_precision
from .bootstrap import Interval, bootstrap, bootstrap_difference
from .dataset import FaceDataset, open_dataset
from .landmarks import LandmarkScores, evaluate_landmarks, landmark_error
from .precision_recall import Matches, Scores
from .protocols import PROTOCOLS, Protocol
from .readers import (
    Annotation,
    WiderGroundTruth,
    read_annotations,
    read_ground_truth,
    read_predictions,
    write_predictions,
)
from .report import Report
from .run import evaluate, evaluate_predictions
from .wider import evaluate_wider

__all__ = [
    "Annotation",
    "FaceDataset",
    "Interval",
    "LandmarkScores",
    "Matches",
    "PROTOCOLS",
    "Protocol",
    "Report",
    "SIZES",
    "Scores",
    "WiderGroundTruth",
    "bootstrap",
    "bootstrap_difference",
    "evaluate",
    "evaluate_average_precision",
    "evaluate_landmarks",
    "evaluate_predictions",
    "evaluate_wider",
    "landmark_error",
    "open_dataset",
    "read_annotations",
    "read_ground_truth",
    "read_predictions",
    "write_predictions",
]
