"""Several weights files side by side on the validation part of a training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from featherface.detector import resolve_weights
from featherface.errors import DataError, FeatherFaceError
from featherface.evaluation import Scores, bootstrap, bootstrap_difference, evaluate_average_precision
from featherface.evaluation.report import AVERAGE_PRECISION_RULES, Result
from featherface.models import create_model

from .config import Config
from .data import read_data
from .validation import detect_validation, validation_indices


class Validated(NamedTuple):
    """What one weights file reached on images of one size.

    Attributes:
        weights: the file as it was named.
        model: the name of its model.
        long_side: images were resized until their longer side had this many pixels; 0: the stored size.
        result: AP at IoU 0.5 of all faces and by size; its difference is from the first file, which has none.
    """

    weights: str
    model: str
    long_side: int
    result: Result


def validate_weights(
    files: Sequence[str | os.PathLike],
    config: Config,
    long_sides: Sequence[int] = (),
    limit: int = 0,
    device: str | torch.device = "cpu",
    replicates: int = 1000,
    folder: str | os.PathLike | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Validated]:
    """AP of each weights file on the validation part, with 95 % intervals and paired differences from the first.

    Args:
        files: of any models; a model's name stands for the package's weights.
        config: of the training: its data and their split, how images are scored (``validation``), which kernels run
            (``model.fused``).
        long_sides: longer sides of the images in pixels, 0 for the stored size; default: ``validation.long_side``.
        limit: use at most so many images, evenly spread; 0 for all.
        replicates: of the bootstrap over images.
        folder: see :func:`~featherface.training.data.read_data`.
        report: called with a sentence for each image that is skipped.

    Returns:
        One result for each size and file, sizes outermost, in the order given.

    Raises:
        FeatherFaceError: there are no files.
        CheckpointError: a file cannot be read, or the model cannot be told from it.
        ConfigError, DataError: a source cannot be used, or no images are kept for validation.
    """
    if not files:
        raise FeatherFaceError("name at least one weights file to validate")
    models = []
    for file in files:
        name, path = resolve_weights(file, None)
        models.append((str(file), name, create_model(name, weights=path, fused=config.model.fused or None).to(device)))
    data = read_data(config, folder, report)
    if not len(data.validation):
        raise DataError("the configuration keeps no images for validation; give a source in data.sources a share of it")
    indices = validation_indices(data, dataclasses.replace(config.validation, limit=limit))
    annotations = [data.annotation(index) for index in indices.tolist()]
    results = []
    for side in long_sides or [config.validation.long_side]:
        options = dataclasses.replace(config.validation, long_side=side)
        first: Scores | None = None
        for file, name, model in models:
            found = detect_validation(model, data, indices, options, config.runtime.channels_last)
            scores = evaluate_average_precision(found, annotations)
            difference = None if first is None else bootstrap_difference(scores, first, replicates)
            first = first or scores
            result = Result(AVERAGE_PRECISION_RULES, scores, bootstrap(scores, replicates), difference)
            results.append(Validated(file, name, side, result))
    return results
