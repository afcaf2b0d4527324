"""A folder of annotated photographs."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError, ImageError
from ..images import UNREADABLE, from_pil
from .readers import Annotation, read_annotations


@dataclass(frozen=True, eq=False)
class FaceDataset:
    """Images and their annotations.

    Attributes:
        folder: the data set's folder; images are ``folder/images/<annotation.name>``.
        annotations: one for each image.
        enlargement: image name -> (x, y), the original image's width and height over the stored one's, from
            ``sizes.csv``; images that are not listed were stored as they were.
    """

    folder: Path
    annotations: tuple[Annotation, ...]
    enlargement: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def __len__(self) -> int:
        return len(self.annotations)

    def path(self, name: str) -> Path:
        return self.folder / "images" / name

    def image(self, name: str) -> np.ndarray:
        """The pixels as stored, (H, W, 3) uint8 RGB. Orientation tags are not applied: annotations mean stored pixels.

        Raises:
            DataError: the file cannot be decoded.
        """
        path = self.path(name)
        try:
            with Image.open(path) as image:
                return from_pil(image, upright=False)
        except (*UNREADABLE, ImageError) as error:
            raise DataError(f"cannot decode the image {path}: {error}") from error

    def limited(self, count: int | None) -> FaceDataset:
        """At most ``count`` images, spread evenly over the set.

        Raises:
            DataError: ``count`` is below 1.
        """
        if count is None:
            return self
        if count < 1:
            raise DataError(f"the number of images must be at least 1, not {count}")
        if count >= len(self):
            return self
        chosen = [self.annotations[i * len(self) // count] for i in range(count)]
        return FaceDataset(self.folder, tuple(chosen), self.enlargement)


def open_dataset(folder: str | os.PathLike) -> FaceDataset:
    """Opens ``folder`` with ``images/<group>/<file>`` and annotations beside it.

    The annotations are ``label.txt``, ``labelv2.txt`` or the one file ``*_bbx_gt.txt``, in any format of
    :func:`~featherface.evaluation.readers.read_annotations`. An optional ``sizes.csv`` with the columns ``path, orig_w,
    orig_h, w, h`` tells what size reduced images had, for scoring against ground truth in original pixels.

    Raises:
        DataError: the folder, its annotations or an annotated image are missing, or a file is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a data set with images/ and label.txt")
    if not (folder / "images").is_dir():
        raise DataError(f"{folder} has no folder images/; expected images/<group>/<file> and label.txt")
    candidates = [folder / "label.txt", folder / "labelv2.txt", *sorted(folder.glob("*_bbx_gt.txt"))]
    present = [path for path in candidates if path.is_file()]
    if not present:
        raise DataError(f"{folder} has no annotations; expected label.txt, labelv2.txt or a file *_bbx_gt.txt")
    annotations = tuple(read_annotations(present[0]))
    dataset = FaceDataset(folder, annotations, _read_sizes(folder / "sizes.csv"))
    missing = [annotation.name for annotation in annotations if not dataset.path(annotation.name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(annotations)} images named in {present[0]} are missing, "
            f"the first is {dataset.path(missing[0])}"
        )
    return dataset


def _read_sizes(path: Path) -> dict[str, tuple[float, float]]:
    if not path.is_file():
        return {}
    sizes = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                sides = [int(row[column]) for column in ("orig_w", "orig_h", "w", "h")]
                if min(sides) < 1:
                    raise ValueError
                sizes[row["path"]] = (sides[0] / sides[2], sides[1] / sides[3])
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"{path}, line {number}: expected the columns path, orig_w, orig_h, w, h with sizes in pixels"
                ) from None
    return sizes
