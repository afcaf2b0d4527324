"""Folders of photographs as lists of records: what is to be trained on, checked before anything is decoded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featherface.errors import DataError
from featherface.evaluation.readers import Annotation, read_annotations
from featherface.images import SUFFIXES

UNLISTED = ("error", "skip", "unlabelled")


@dataclass(frozen=True, eq=False)
class Record:
    """One image to train on.

    Attributes:
        path: the image file.
        name: ``folder/group/file.jpg``: the source's folder name and the image's path below its images. It does not
            depend on where the data lie, so that splits made from it can be repeated elsewhere.
        source: number of the source it came from.
        annotation: its faces; None for an unlabelled image.
    """

    path: Path
    name: str
    source: int
    annotation: Annotation | None


def read_source(
    folder: str | os.PathLike,
    labels: str = "auto",
    unlisted: str = "error",
    source: int = 0,
) -> list[Record]:
    """The images of one folder, in the order of their annotations, or by name where there are none.

    Args:
        folder: images are ``folder/images/<name>`` if there is such a folder, else ``folder/<name>``.
        labels: an annotation file in any format of :func:`featherface.evaluation.read_annotations`, relative to
            ``folder``; ``"auto"``: ``label.txt``, ``labelv2.txt`` or the one file ``*_bbx_gt.txt`` in it; ``"none"``:
            the images are unlabelled.
        unlisted: what becomes of images that the annotations do not name: ``"error"``, ``"skip"`` or ``"unlabelled"``.
        source: the number that the records carry.

    Raises:
        DataError: the folder or its annotations are missing or malformed, an annotated image is missing, an image has
            no annotation and ``unlisted`` is ``"error"``, or there are no images.
    """
    folder = Path(folder)
    if unlisted not in UNLISTED:
        raise DataError(f"unlisted is {unlisted!r}; choose from: {', '.join(UNLISTED)}")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a data set with images/ and label.txt")
    root = folder / "images" if (folder / "images").is_dir() else folder
    name = folder.resolve().name
    present = image_files(root)
    if labels == "none":
        if not present:
            raise DataError(f"{root} holds no images; expected files such as .jpg or .png")
        return [Record(root / file, f"{name}/{file}", source, None) for file in present]

    path = _find_labels(folder, labels)
    annotations = [dataclasses.replace(a, name=_relative(a.name, root)) for a in read_annotations(path)]
    known = set(present)
    missing = [a.name for a in annotations if a.name not in known and not (root / a.name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(annotations)} images named in {path} are missing, the first is "
            f"{root / missing[0]}; add them or remove their entries"
        )
    records = [Record(root / a.name, f"{name}/{a.name}", source, a) for a in annotations]
    listed = {a.name for a in annotations}
    others = [file for file in present if file not in listed]
    if others and unlisted == "error":
        raise DataError(
            f"{len(others)} of {len(present)} images in {root} are not named in {path}, the first is {others[0]}; "
            'annotate them, or set unlisted = "skip" or "unlabelled" for this source'
        )
    if unlisted == "unlabelled":
        records += [Record(root / file, f"{name}/{file}", source, None) for file in others]
    return records


def _relative(name: str, root: Path) -> str:
    """An image's name in an annotation file as :func:`image_files` names it: ``./a.jpg``, ``group//a.jpg``, absolute
    paths and backslashes mean the same file."""
    if "\\" in name and not (root / name).is_file():
        name = name.replace("\\", "/")
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    return Path(os.path.normpath(path)).as_posix()


def image_files(folder: Path) -> list[str]:
    """Image files below a folder, as sorted paths relative to it, with forward slashes."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _find_labels(folder: Path, labels: str) -> Path:
    if labels != "auto":
        path = folder / labels
        if not path.is_file():
            raise DataError(f'{path} is missing; name the annotation file of {folder}, or set labels = "none"')
        return path
    candidates: Sequence[Path] = [folder / "label.txt", folder / "labelv2.txt", *sorted(folder.glob("*_bbx_gt.txt"))]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise DataError(
            f"{folder} has no annotations (label.txt, labelv2.txt or *_bbx_gt.txt); "
            'add them, or set labels = "none" to use its images through a teacher alone'
        )
    return found[0]
