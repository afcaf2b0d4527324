"""A training set in memory: sources read, decoded, grouped, split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featherface.errors import DataError
from featherface.evaluation.readers import Annotation

from .duplicates import difference_hashes, group_duplicates, validation_groups
from .sources import Record, read_source
from .store import PixelStore, decode_images

MAX_UNREADABLE = 0.5
"""Share of images that may be undecodable before the set itself is taken to be wrong."""


@dataclass
class Source:
    """A folder of images in the mixture.

    Attributes:
        folder: images are ``folder/images/<name>`` if there is such a folder, else ``folder/<name>``; relative to the
            data set's root.
        labels: an annotation file relative to the folder; ``auto`` finds label.txt, labelv2.txt or *_bbx_gt.txt;
            ``none``: the images are unlabelled, a teacher alone tells what is in them.
        weight: how often each image is seen in an epoch, on average.
        validation: share of the images, in whole groups of near-duplicates, that is kept out for validation.
        unlisted: what becomes of images that the annotations do not name: error, skip or unlabelled.
    """

    folder: str = ""
    labels: str = "auto"
    weight: float = 1.0
    validation: float = 0.0
    unlisted: str = "error"


@dataclass(frozen=True, eq=False)
class FaceData:
    """Images, their faces in stored pixels, and who is in which part.

    Attributes:
        records: every readable or unreadable image.
        store: their pixels.
        boxes: per image (n, 4) float64, the faces to train on, inside the image, in stored pixels.
        landmarks: per image (n, 5, 2) float64, NaN where unknown.
        ignored: per image (m, 4), faces that are neither to be found nor background.
        train: numbers of the images to train on.
        validation: numbers of the images kept for validation; all are annotated.
        weights: per source, see :class:`Source`.
    """

    records: list[Record]
    store: PixelStore
    boxes: list[np.ndarray]
    landmarks: list[np.ndarray]
    ignored: list[np.ndarray]
    train: np.ndarray
    validation: np.ndarray
    weights: list[float] = field(default_factory=list)

    def annotation(self, index: int) -> Annotation:
        """The faces of an image in stored pixels, as the evaluation takes them."""
        faces, ignored = self.boxes[index], self.ignored[index]
        return Annotation(
            name=self.records[index].name,
            boxes=np.concatenate([faces, ignored]),
            landmarks=np.concatenate([self.landmarks[index], np.full((len(ignored), 5, 2), np.nan)]),
            ignore=np.arange(len(faces) + len(ignored)) >= len(faces),
        )


def load_data(
    sources: Sequence[Source],
    root: str | os.PathLike = ".",
    *,
    seed: int = 0,
    max_side: int = 0,
    memory_limit_gb: float = 0.0,
    cache_dir: str | os.PathLike | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> FaceData:
    """Reads, decodes and splits a mixture of sources.

    Boxes without area, outside the image or marked invalid are ignored; what reaches over the border is cut. Images
    that are near-duplicates of a validation image are left out of the training part, whatever source they are from.

    Args:
        sources: what to read.
        root: folders of sources are relative to it.
        seed: of the split.
        max_side, memory_limit_gb, cache_dir, threads, progress: see :func:`featherface.data.store.decode_images`.
        report: called with a sentence for each image that is skipped.

    Raises:
        DataError: a source cannot be used, or nothing is left to train on.
    """
    records: list[Record] = []
    for number, source in enumerate(sources):
        if source.weight < 0:
            raise DataError(f"the weight of the source {source.folder} is {source.weight}; it must not be below 0")
        if not 0 <= source.validation < 1:
            raise DataError(f"validation of the source {source.folder} is {source.validation}; expected 0 to below 1")
        records += read_source(Path(root) / source.folder, source.labels, source.unlisted, number)
    if not records:
        raise DataError("there are no images to train on; name at least one folder in data.sources")
    names: set[str] = set()
    for record in records:
        if record.name in names:
            raise DataError(f"{record.name} comes from two sources; give their folders different names")
        names.add(record.name)

    # Annotations mean stored pixels; where there are none, people should stand upright.
    upright = [record.annotation is None for record in records]
    paths = [record.path for record in records]
    store = decode_images(paths, max_side, memory_limit_gb, cache_dir, threads, progress, upright)
    for index, reason in store.failures.items():
        if report is not None:
            report(f"skipped {records[index].path}: it cannot be decoded ({reason})")
    if len(store.failures) > MAX_UNREADABLE * len(records):
        index, reason = next(iter(store.failures.items()))
        raise DataError(
            f"{len(store.failures)} of {len(records)} images cannot be decoded, the first is {records[index].path} "
            f"({reason}); check the data"
        )

    faces = [_faces(record, store, index) for index, record in enumerate(records)]
    readable = store.sizes.min(axis=1) > 0
    fractions = [sources[r.source].validation if r.annotation is not None else 0.0 for r in records]
    chosen = validation_groups(
        [record.name for record in records], group_duplicates(difference_hashes(store)), fractions, seed
    )
    annotated = np.array([record.annotation is not None for record in records])
    weighted = np.array([sources[record.source].weight > 0 for record in records])
    train = np.flatnonzero(readable & ~chosen & weighted)
    # Validation images come from the sources that gave some; near-duplicates from others are only kept out.
    validation = np.flatnonzero(readable & chosen & annotated & (np.array(fractions) > 0))
    if not len(train):
        raise DataError("no image is left to train on; lower the share of validation, or add images")
    if any(source.validation > 0 for source in sources) and not len(validation):
        raise DataError(
            f"none of {int(readable.sum())} images was chosen for validation; raise its share or add images"
        )
    return FaceData(
        records,
        store,
        [boxes for boxes, _, _ in faces],
        [landmarks for _, landmarks, _ in faces],
        [ignored for _, _, ignored in faces],
        train,
        validation,
        [source.weight for source in sources],
    )


def _faces(record: Record, store: PixelStore, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Faces, landmarks and ignored boxes of an image, in stored pixels."""
    annotation = record.annotation
    if annotation is None:
        return np.empty((0, 4)), np.empty((0, 5, 2)), np.empty((0, 4))
    height, width = store.sizes[index].tolist()
    scale = store.scales[index][::-1]
    boxes = annotation.boxes * np.tile(scale, 2)
    landmarks = annotation.landmarks * scale
    cut = np.clip(boxes, 0, [width, height, width, height])
    area = (cut[:, 2:] - cut[:, :2]).prod(axis=1) > 0
    usable = ~annotation.ignore & area & np.isfinite(boxes).all(axis=1)
    return cut[usable], landmarks[usable], cut[annotation.ignore & area]
