"""Readers of face annotations, predictions and the official WIDER FACE ground truth.

Coordinates are pixels, x to the right and y down; boxes leave every reader as ``x1 y1 x2 y2`` (``x2 = x + w``).
A malformed line raises :class:`~featherface.errors.DataError` naming the file and the line.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import DataError, FeatherFaceError
from ..files import atomic_write

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
ATTRIBUTES = ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
SETTINGS = ("easy", "medium", "hard")

_SCRFD_HEADER = re.compile(r"(?P<name>\S.*\.\w+)\s+(?P<width>\d+)\s+(?P<height>\d+)")


@dataclass(frozen=True, eq=False)
class Annotation:
    """The annotated faces of one image.

    Attributes:
        name: the image's path below the folder of images, with its suffix, ``group/file.jpg``.
        boxes: (n, 4) float64, ``x1 y1 x2 y2``.
        landmarks: (n, 5, 2) float64, x and y of left eye, right eye, nose, left and right corner of the mouth;
            NaN where a landmark is not annotated.
        ignore: (n,) bool, faces that are neither to be found nor to be trained on: marked invalid, or without area.
        attributes: (n, 6) int64, WIDER FACE's columns in the order of ``ATTRIBUTES``; None in the other formats.
        size: (width, height) where the file states it (``labelv2.txt``), else None.
    """

    name: str
    boxes: np.ndarray
    landmarks: np.ndarray
    ignore: np.ndarray
    attributes: np.ndarray | None = None
    size: tuple[int, int] | None = None

    @property
    def has_landmarks(self) -> np.ndarray:
        """(n,) bool: all five landmarks are annotated."""
        return ~np.isnan(self.landmarks).any(axis=(1, 2))

    @property
    def key(self) -> str:
        """The name without its suffix, by which predictions and ground truth are found."""
        return image_key(self.name)


@dataclass(frozen=True, eq=False)
class WiderGroundTruth:
    """The official WIDER FACE ground truth.

    Attributes:
        names: ``event/image`` without suffix.
        boxes: per image (n, 4) float64, ``x1 y1 x2 y2`` with ``x2 = x + w``. As in the official files, an image without
            faces has one box of zeros.
        keep: per setting (easy, medium, hard) and image (n,) bool: the faces that count; the others are ignored.
    """

    names: tuple[str, ...]
    boxes: tuple[np.ndarray, ...]
    keep: Mapping[str, tuple[np.ndarray, ...]]

    def subset(self, names: Iterable[str]) -> WiderGroundTruth:
        """The ground truth of the named images alone, in the order given.

        Raises:
            DataError: a name is unknown, or named twice.
        """
        index = {name: i for i, name in enumerate(self.names)}
        keys = [image_key(name) for name in names]
        unknown = [key for key in keys if key not in index]
        if unknown:
            raise DataError(
                f"{len(unknown)} of {len(keys)} images are not in the WIDER FACE ground truth, first {unknown[0]};"
                " leave the ground truth out to score by plain average precision"
            )
        if len(set(keys)) != len(keys):
            raise DataError("the list of images names one of them twice")
        order = [index[key] for key in keys]
        return WiderGroundTruth(
            names=tuple(keys),
            boxes=tuple(self.boxes[i] for i in order),
            keep={setting: tuple(flags[i] for i in order) for setting, flags in self.keep.items()},
        )


def image_key(name: str) -> str:
    """``group/file`` of an image's name: forward slashes, no leading ``./``, no image suffix."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def read_annotations(path: str | os.PathLike) -> list[Annotation]:
    """Reads an annotation file in any of three formats, told apart by content.

    =============  ==========================  ==============================================================
    format         line of an image            line of a face
    =============  ==========================  ==============================================================
    RetinaFace     ``# group/file.jpg``        ``x y w h``, 5 x ``x y flag``, blur score (19 and 4 values too)
    SCRFD          ``# group/file.jpg W H``    ``x1 y1 x2 y2``, 5 x ``x y flag``; or the box and an ignore flag
    WIDER FACE     ``group/file.jpg``, then    ``x y w h blur expression illumination invalid occlusion pose``
                   a line with the count       or the box alone; a count of 0 is followed by one row of zeros
    =============  ==========================  ==============================================================

    A landmark is missing where its flag is -1 or both its coordinates are.

    Raises:
        DataError: the file is missing, empty, not text, or malformed.
    """
    lines = _lines(path)
    _, first = lines[0]
    if first.startswith("#"):
        records = _read_hashed(path, lines, scrfd=_SCRFD_HEADER.fullmatch(first[1:].strip()) is not None)
    else:
        records = _read_wider(path, lines)
    seen = set()
    for record in records:
        if record.key in seen:
            raise DataError(f"{path} lists the image {record.name} twice; remove one of the two entries")
        seen.add(record.key)
    return records


def read_predictions(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads predictions in WIDER FACE's text format: a folder with one file per image, or all images in one file.

    A file of the folder is called ``event/image.txt`` and holds a line with the image's name, a line with the number of
    detections and one line ``x y w h score`` for each; the single file holds the same for one image after another.

    Returns:
        ``event/image`` (without suffix) -> (n, 5) float64, ``x1 y1 x2 y2 score``, in the order of the file.

    Raises:
        DataError: nothing is there, or a file is malformed.
    """
    path = Path(path)
    predictions: dict[str, np.ndarray] = {}
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise DataError(f"{path} holds no predictions: expected files named event/image.txt")
        for file in files:
            blocks = list(_prediction_blocks(file, _lines(file)))
            if len(blocks) != 1:
                raise DataError(f"{file} holds {len(blocks)} images; a file in a folder of predictions holds one")
            predictions[file.relative_to(path).with_suffix("").as_posix()] = blocks[0][1]
        return predictions
    for name, rows in _prediction_blocks(path, _lines(path)):
        key = image_key(name)
        if key in predictions:
            raise DataError(f"{path} lists the image {name} twice; remove one of the two entries")
        predictions[key] = rows
    return predictions


def write_predictions(folder: str | os.PathLike, predictions: Mapping[str, np.ndarray]) -> None:
    """Writes ``event/image.txt`` for each image in WIDER FACE's text format, with nine significant digits.

    Args:
        predictions: image name -> (n, 5), ``x1 y1 x2 y2 score``.

    Raises:
        DataError: a file cannot be written, or a name leads out of the folder.
    """
    for name in predictions:
        path = PurePosixPath(image_key(name))
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise DataError(
                f"the image name {name!r} leads out of the folder {folder}; predictions are named after images, whose "
                "names must be relative paths without '..'"
            )
    for name, rows in predictions.items():
        rows = np.asarray(rows, np.float64).reshape(-1, 5)
        key = image_key(name)
        lines = [PurePosixPath(key).name, str(len(rows))]
        lines += [
            f"{x1:.9g} {y1:.9g} {x2 - x1:.9g} {y2 - y1:.9g} {score:.9g}" for x1, y1, x2, y2, score in rows.tolist()
        ]
        target = Path(folder) / f"{key}.txt"
        try:
            with atomic_write(target) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write the predictions {target}: {error.strerror or error}") from error


def read_ground_truth(folder: str | os.PathLike) -> WiderGroundTruth:
    """Reads ``wider_{face,easy,medium,hard}_val.mat``, the ground truth that comes with WIDER FACE's evaluation code.

    Raises:
        FeatherFaceError: scipy is not installed.
        DataError: a file is missing or is not what it should be.
    """
    folder = Path(folder)
    faces_path = folder / "wider_face_val.mat"
    faces = _load_mat(faces_path)
    names: list[str] = []
    boxes: list[np.ndarray] = []
    with _mat_structure(faces_path):
        for event, files, events_boxes in zip(
            _cells(faces, "event_list"), _cells(faces, "file_list"), _cells(faces, "face_bbx_list"), strict=True
        ):
            for file, image_boxes in zip(files.ravel(), events_boxes.ravel(), strict=True):
                names.append(f"{event.item()}/{file.item()}")
                box = image_boxes.astype(np.float64).reshape(-1, 4)
                boxes.append(np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1))
    keep: dict[str, tuple[np.ndarray, ...]] = {}
    for setting in SETTINGS:
        path = folder / f"wider_{setting}_val.mat"
        content = _load_mat(path)
        with _mat_structure(path):
            indices = [index for event in _cells(content, "gt_list") for index in event.ravel()]
            flags = []
            for image_boxes, index in zip(boxes, indices, strict=True):
                flag = np.zeros(len(image_boxes), bool)
                index = index.astype(np.int64).ravel() - 1
                if index.size and index.min() < 0:
                    raise IndexError("an index of 0")
                flag[index] = True
                flags.append(flag)
            keep[setting] = tuple(flags)
    return WiderGroundTruth(tuple(names), tuple(boxes), keep)


def _lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """The stripped lines that are not blank, each with its number."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file; expected annotations or predictions as text") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty; expected annotations or predictions")
    return lines


def _numbers(path: str | os.PathLike, number: int, line: str, lengths: Sequence[int], what: str) -> list[float]:
    """The values of a line, checked to be finite and to be as many as one of ``lengths``."""
    try:
        values = [float(value) for value in line.split()]
    except ValueError:
        raise DataError(f"{path}, line {number}: expected {what}, found {line[:60]!r}") from None
    if len(values) not in lengths:
        raise DataError(f"{path}, line {number}: expected {what}, found {len(values)} values")
    if not all(map(math.isfinite, values)):
        raise DataError(f"{path}, line {number}: a value is not finite: {line[:60]!r}")
    return values


def _record(
    name: str,
    rows: list[tuple[int, list[float]]],
    landmarks: np.ndarray,
    invalid: np.ndarray,
    attributes: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    corners: bool = False,
) -> Annotation:
    boxes = np.array([values[:4] for _, values in rows], np.float64).reshape(-1, 4)
    if not corners:
        boxes[:, 2:] += boxes[:, :2]
    # WIDER FACE holds boxes of zero and of negative width.
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    return Annotation(name, boxes, landmarks, invalid | empty, attributes, size)


def _read_hashed(path: str | os.PathLike, lines: list[tuple[int, str]], scrfd: bool) -> list[Annotation]:
    if scrfd:
        lengths, what = (4, 5, 19, 20), "x1 y1 x2 y2 and, if any, five landmarks x y flag"
        header_form = "# group/file.jpg width height"
    else:
        lengths, what = (4, 19, 20), "x y w h and, if any, five landmarks x y flag and a score"
        header_form = "# group/file.jpg"
    blocks: list[tuple[str, tuple[int, int] | None, list[tuple[int, list[float]]]]] = []
    for number, line in lines:
        if not line.startswith("#"):
            blocks[-1][2].append((number, _numbers(path, number, line, lengths, what)))
            continue
        header = line[1:].strip()
        match = _SCRFD_HEADER.fullmatch(header)
        if not header or scrfd != (match is not None):
            raise DataError(
                f"{path}, line {number}: expected {header_form!r} as in the first line, found {line[:60]!r}"
            )
        if match:
            blocks.append((match["name"], (int(match["width"]), int(match["height"])), []))
        else:
            blocks.append((header, None, []))
    records = []
    for name, size, rows in blocks:
        landmarks = np.full((len(rows), 5, 2), np.nan)
        invalid = np.zeros(len(rows), bool)
        for i, (_, values) in enumerate(rows):
            if len(values) >= 19:
                points = np.array(values[4:19]).reshape(5, 3)
                missing = (points[:, 2] == -1) | (points[:, :2] == -1).all(axis=1)
                landmarks[i] = np.where(missing[:, None], np.nan, points[:, :2])
            elif len(values) == 5:
                invalid[i] = values[4] == 1
        records.append(_record(name, rows, landmarks, invalid, size=size, corners=scrfd))
    return records


def _read_wider(path: str | os.PathLike, lines: list[tuple[int, str]]) -> list[Annotation]:
    records = []
    for name, rows in _counted_blocks(path, lines, (4, 10), "x y w h, or these and six attributes"):
        if any(len(values) != len(rows[0][1]) for _, values in rows):
            raise DataError(f"{path}, line {rows[0][0]}: the faces of {name} have differing numbers of values")
        attributes = np.zeros((len(rows), len(ATTRIBUTES)), np.int64)
        for i, (number, values) in enumerate(rows):
            if any(value != int(value) for value in values[4:]):
                raise DataError(f"{path}, line {number}: expected whole numbers as the six attributes")
            attributes[i, : len(values) - 4] = values[4:]
        invalid = attributes[:, ATTRIBUTES.index("invalid")] == 1
        records.append(_record(name, rows, np.full((len(rows), 5, 2), np.nan), invalid, attributes))
    return records


def _prediction_blocks(path: str | os.PathLike, lines: list[tuple[int, str]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, rows in _counted_blocks(path, lines, (5,), "x y w h score"):
        values = np.array([values for _, values in rows], np.float64).reshape(-1, 5)
        values[:, 2:4] += values[:, :2]
        yield name, values


def _counted_blocks(
    path: str | os.PathLike, lines: list[tuple[int, str]], lengths: Sequence[int], what: str
) -> Iterator[tuple[str, list[tuple[int, list[float]]]]]:
    """Blocks of a name, a count, and as many lines of numbers; a count of 0 may be followed by one line of zeros."""
    at = 0
    while at < len(lines):
        number, name = lines[at]
        if _is_row(name):
            raise DataError(
                f"{path}, line {number}: expected the name of an image, found {name[:60]!r}; "
                "the count above it may be too small"
            )
        if at + 1 == len(lines):
            raise DataError(f"{path}, line {number}: the file ends after the name {name[:60]!r}; a count must follow")
        count_number, count_line = lines[at + 1]
        if not (count_line.isascii() and count_line.isdigit()):
            raise DataError(
                f"{path}, line {count_number}: expected the number of boxes of {name}, found {count_line[:60]!r}"
            )
        count = int(count_line)
        at += 2
        if at + count > len(lines):
            raise DataError(
                f"{path}, line {count_number}: {count} boxes announced for {name}, but the file ends after "
                f"{len(lines) - at}; it may be truncated"
            )
        yield (
            name,
            [
                (row_number, _numbers(path, row_number, row, lengths, what))
                for row_number, row in lines[at : at + count]
            ],
        )
        at += count
        if count == 0 and at < len(lines) and _is_row(lines[at][1]):
            values = _numbers(path, *lines[at], lengths, what)
            if any(values):
                raise DataError(f"{path}, line {lines[at][0]}: a box follows although 0 are announced for {name}")
            at += 1


def _is_row(line: str) -> bool:
    """Whether a line is made of several numbers and so cannot be the name of an image."""
    values = line.split()
    if len(values) < 2:
        return False
    with contextlib.suppress(ValueError):
        for value in values:
            float(value)
        return True
    return False


def _load_mat(path: Path) -> dict[str, np.ndarray]:
    try:
        import scipy.io
    except ImportError as error:
        raise FeatherFaceError(
            "reading WIDER FACE's .mat ground truth needs scipy; install it with: pip install 'featherface[eval]'"
        ) from error
    if not path.is_file():
        raise DataError(
            f"{path} is missing; the ground truth folder must hold wider_face_val.mat and "
            "wider_{easy,medium,hard}_val.mat of WIDER FACE's evaluation code"
        )
    try:
        return scipy.io.loadmat(str(path))
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise DataError(f"{path} is not a readable .mat file: {error}") from error


def _cells(content: dict[str, np.ndarray], key: str) -> list[np.ndarray]:
    return list(content[key][:, 0])


@contextlib.contextmanager
def _mat_structure(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise DataError(f"{path} does not have the structure of WIDER FACE's ground truth: {error}") from error
