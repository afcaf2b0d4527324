"""Bootstrap confidence intervals over images (Efron's percentile method), of a result and of a paired difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .precision_recall import Scores

_CHUNK = 100


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval; NaN where there is nothing to compute it from."""

    value: float
    low: float
    high: float


def bootstrap(scores: Scores, replicates: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """Confidence interval of each AP, from ``replicates`` sets of images drawn with replacement.

    Scores keep the normalisation of the whole set. A replicate without a face of a group is left out for that group.

    Args:
        level: share of the replicates between the interval's ends.
        seed: of the draw; the same seed draws the same images.

    Returns:
        Group -> interval around the AP of the whole set.
    """
    samples = _samples((scores,), replicates, seed)[0]
    return {group: _interval(scores.ap[group], samples[group], level) for group in samples}


def bootstrap_difference(
    scores: Scores, baseline: Scores, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Confidence interval of ``AP(scores) - AP(baseline)``: both are computed on the same drawn images.

    Raises:
        DataError: the two were not scored on the same images and groups.
    """
    if scores.names != baseline.names or scores.faces != baseline.faces:
        raise DataError("two results can be compared only when both were scored on the same images and faces")
    ours, theirs = _samples((scores, baseline), replicates, seed)
    return {
        group: _interval(scores.ap[group] - baseline.ap[group], ours[group] - theirs[group], level) for group in ours
    }


def _samples(results: tuple[Scores, ...], replicates: int, seed: int) -> list[dict[str, np.ndarray]]:
    """AP of every replicate, (replicates,) for each group of each result; all results see the same draws."""
    images = len(results[0].names)
    if not images:
        return [{group: np.empty(0) for group in result.matches} for result in results]
    random = np.random.default_rng(seed)
    parts: list[dict[str, list[np.ndarray]]] = [{group: [] for group in result.matches} for result in results]
    for start in range(0, replicates, _CHUNK):
        count = min(_CHUNK, replicates - start)
        weights = random.multinomial(images, np.full(images, 1 / images), size=count)
        for result, part in zip(results, parts):
            for group, matches in result.matches.items():
                part[group].append(matches.weighted_average_precision(weights))
    return [{group: np.concatenate([np.empty(0), *values]) for group, values in part.items()} for part in parts]


def _interval(value: float, samples: np.ndarray, level: float) -> Interval:
    samples = samples[~np.isnan(samples)]
    if not samples.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
