"""Detections as JSON and CSV, written as they come, whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from ..detections import LANDMARK_NAMES, Detections
from ..errors import ImageError
from ..files import atomic_write

CSV_COLUMNS = (
    "file",
    "frame",
    "face",
    "score",
    "x1",
    "y1",
    "x2",
    "y2",
    *(f"{name}_{axis}" for name in LANDMARK_NAMES for axis in "xy"),
)
"""One row per face. ``frame`` is empty for an image, ``face`` counts from 0 by descending score; pixels."""


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture in the format of the suffix, whole or not at all.

    Raises:
        ImageError: Pillow cannot write that format, or not this picture in it, or the file cannot be written for a
            reason that other files need not share.
    """
    quality = {"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    try:
        with atomic_write(path) as temporary:
            picture.save(temporary, **quality)
    except (KeyError, ValueError) as error:
        raise ImageError(f"pictures cannot be written to {path}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise ImageError(f"{path} cannot be written: {error.strerror or error}") from error


class Row:
    """One image or frame and what was found in it."""

    def __init__(
        self,
        file: str,
        detections: Detections | None = None,
        error: str | None = None,
        frame: int | None = None,
        seconds: float | None = None,
    ) -> None:
        self.file, self.detections, self.error, self.frame, self.seconds = file, detections, error, frame, seconds


class JsonWriter:
    """Writes ``{"detector": {...}, "results": [...]}``.

    ``detector`` holds version, model, weights with SHA-256, device, kernels and settings. A result has ``file``; in
    videos ``frame`` (from 0) and ``seconds``; and either ``error`` or ``width``, ``height`` and ``faces``. A face has
    ``box`` (x1 y1 x2 y2), ``score`` and ``landmarks`` (name to [x, y]), in pixels of the upright image.
    """

    def __init__(self, file: TextIO, detector: dict[str, Any]) -> None:
        self._file, self._first = file, True
        file.write(f'{{"detector": {json.dumps(detector)},\n"results": [')

    def write(self, row: Row) -> None:
        entry: dict[str, Any] = {"file": row.file}
        if row.frame is not None:
            entry |= {"frame": row.frame, "seconds": row.seconds}
        entry |= {"error": row.error} if row.detections is None else row.detections.to_dict()
        self._file.write(("\n" if self._first else ",\n") + json.dumps(entry, ensure_ascii=False))
        self._first = False

    def close(self) -> None:
        self._file.write("\n]}\n")


class CsvWriter:
    """Writes :data:`CSV_COLUMNS`. Images without faces have no row."""

    def __init__(self, file: TextIO) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(CSV_COLUMNS)

    def write(self, row: Row) -> None:
        if row.detections is None:
            return
        faces = zip(row.detections.boxes, row.detections.scores, row.detections.landmarks)
        frame = "" if row.frame is None else row.frame
        for i, (box, score, points) in enumerate(faces):
            numbers = [f"{value:.3f}" for value in (*box.tolist(), *points.ravel().tolist())]
            self._writer.writerow([row.file, frame, i, f"{float(score):.6f}", *numbers])

    def close(self) -> None:
        pass


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file that appears under ``path`` when the block succeeds; ``-`` is stdout.

    File names that are no UTF-8 are written with escapes such as ``\\udce9``, which JSON's readers turn back into the
    name.
    """
    if str(path) == "-":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield sys.stdout
        sys.stdout.flush()
        return
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        yield file
