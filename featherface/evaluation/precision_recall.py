"""Precision, recall and average precision from matched detections, for one weighting of the images or for many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Cells of a dense (images, levels) table; beyond it, weightings are taken one by one.
_DENSE_CELLS = 1 << 23


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections matched with faces.

    A level is a point of the precision-recall curve: all detections of that level and of lower levels are accepted.

    Attributes:
        scores: (levels,) float64, the lowest score accepted at each level, descending.
        image: (m,) int64, the image of each detection.
        level: (m,) int64, the level from which on each detection is accepted.
        counted: (m,) bool, False for a detection that is dropped because it found an ignored face.
        hit: (m,) bool, True for the detection that finds a face.
        faces: (images,) int64, the faces to be found in each image.
    """

    scores: np.ndarray
    image: np.ndarray
    level: np.ndarray
    counted: np.ndarray
    hit: np.ndarray
    faces: np.ndarray

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall, each (levels,) float64; precision is 0 before the first detection."""
        levels = len(self.scores)
        hits = np.cumsum(np.bincount(self.level[self.hit], minlength=levels)).astype(np.float64)
        counted = np.cumsum(np.bincount(self.level[self.counted], minlength=levels)).astype(np.float64)
        return _divide(hits, counted), _divide(hits, np.float64(self.faces.sum()))

    @cached_property
    def average_precision(self) -> float:
        """AP of the curve; NaN when there is no face to be found."""
        if not self.faces.sum():
            return float("nan")
        precision, recall = self.curve()
        return float(average_precision(precision, recall))

    def weighted_average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP with each image counted ``weights`` times.

        Args:
            weights: (r, images), whole numbers not below 0.

        Returns:
            (r,) float64; NaN where the weights leave no face.
        """
        weights = np.asarray(weights, np.float64)
        # Only levels that find a face bend the envelope; the false positives between two of them join the later one.
        levels = np.unique(self.level[self.hit])
        level = np.searchsorted(levels, self.level)
        inside = level < len(levels)
        image, level = self.image[inside], level[inside]
        counted, hit = self.counted[inside], self.hit[inside]
        images, count = len(self.faces), len(levels)
        if images * count <= _DENSE_CELLS:
            cell = image * count + level
            size = images * count
            hits, proposals = (
                weights @ np.bincount(cell[flag], minlength=size).astype(np.float64).reshape(images, count)
                for flag in (hit, counted)
            )
        else:
            hits, proposals = (
                np.stack([np.bincount(level[flag], weights=w[image[flag]], minlength=count) for w in weights])
                for flag in (hit, counted)
            )
        hits, proposals = np.cumsum(hits, axis=1), np.cumsum(proposals, axis=1)
        faces = weights @ self.faces
        result = average_precision(_divide(hits, proposals), _divide(hits, faces[:, None]))
        return np.where(faces > 0, result, np.nan)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a set of predictions reached.

    Attributes:
        names: the images scored, ``group/file`` without suffix.
        matches: name of a group of faces ("easy", or "small") -> matched detections.
        missing: the images for which there was no prediction entry at all; they were scored as having no detections.
    """

    names: tuple[str, ...]
    matches: Mapping[str, Matches]
    missing: tuple[str, ...] = ()

    @property
    def ap(self) -> dict[str, float]:
        """Average precision, 0 to 1, of each group; NaN for a group without faces."""
        return {group: matches.average_precision for group, matches in self.matches.items()}

    @property
    def faces(self) -> dict[str, int]:
        """Number of faces to be found in each group."""
        return {group: int(matches.faces.sum()) for group, matches in self.matches.items()}


def average_precision(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Area under the envelope of a precision-recall curve (Pascal VOC 2010 and later, and WIDER FACE's ``VOCap``).

    ``sum_k (r_k - r_{k-1}) * max_{j >= k} p_j`` with ``r_{-1} = 0``.

    Args:
        precision, recall: (..., levels); recall not falling along the last axis.

    Returns:
        (...,) float64.
    """
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    return (np.diff(recall, axis=-1, prepend=0.0) * envelope).sum(axis=-1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient with 0 / 0 = 0."""
    return np.divide(
        numerator,
        denominator,
        out=np.zeros(np.broadcast_shapes(np.shape(numerator), np.shape(denominator))),
        where=denominator > 0,
    )
