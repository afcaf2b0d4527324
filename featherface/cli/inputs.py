"""What the user named on the command line: images, folders, patterns, videos, cameras."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from ..errors import ImageError
from ..images import SUFFIXES
from ..video import SUFFIXES as VIDEO_SUFFIXES
from ..video import is_video

FOREIGN_SUFFIXES = frozenset((".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".jxl", ".psd"))
"""Names of images that Pillow does not read."""


class Input(NamedTuple):
    """One image, video or camera.

    Attributes:
        source: path of the file, or number of the camera.
        name: relative path that outputs are named after.
        video: whether it has frames.
    """

    source: Path | int
    name: PurePath
    video: bool


def expand(
    arguments: Sequence[str], recursive: bool = False, without: Sequence[Path] = ()
) -> tuple[list[Input], list[str]]:
    """Inputs in the order in which they were named; of a folder, all images, sorted by name. With them a sentence on
    each folder that holds videos or foreign images, which are no inputs.

    An argument is a file, a folder, a pattern with ``*``, ``?`` or ``[]`` (``**`` for any depth), or, if there is no
    such file, the number of a camera. Names are made unique. Folders ``without`` are not searched where they lie in
    another one.

    Raises:
        ImageError: a folder holds no images, or a pattern matches nothing.
    """
    inputs: list[Input] = []
    notes: list[str] = []
    taken: set[PurePath] = set()
    closed = {path.resolve() for path in without}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = _walk(path, recursive, closed)
            notes += (left_out := _left_out(path, files))
            found = _images(path, files, recursive, left_out)
        else:
            found = _named(argument)
        for source, name in found:
            video = isinstance(source, int) or is_video(source)
            inputs.append(Input(source, _unique(name, taken), video))
    return inputs, notes


def _file(path: Path) -> bool:
    """Whether ``path`` is a file, or a link to nothing, which is reported as an input that cannot be read."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _walk(folder: Path, recursive: bool, closed: set[Path]) -> list[Path]:
    found = folder.rglob("*") if recursive else folder.iterdir()
    inside = {path for path in closed if folder.resolve() in path.parents}
    return sorted(p for p in found if _file(p) and (not inside or inside.isdisjoint(p.resolve().parents)))


def _left_out(folder: Path, files: list[Path]) -> list[str]:
    notes = []
    for suffixes, what in (
        (VIDEO_SUFFIXES, "videos left out, name them themselves"),
        (FOREIGN_SUFFIXES, "images left out, of formats that Pillow does not read"),
    ):
        if found := sorted(suffix for p in files if (suffix := p.suffix.lower()) in suffixes):
            notes.append(f"{folder}: {what}: {len(found)} ({', '.join(dict.fromkeys(found))})")
    return notes


def _images(folder: Path, files: list[Path], recursive: bool, left_out: list[str]) -> list[tuple[Path, PurePath]]:
    found = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        deeper = "" if recursive else " (folders inside it are searched with --recursive)"
        raise ImageError("; ".join([f"the folder {folder} holds no images{deeper}", *left_out]))
    return [(p, p.relative_to(folder)) for p in found]


def _named(argument: str) -> list[tuple[Path | int, PurePath]]:
    path = Path(argument)
    if path.exists():
        return [(path, PurePath(path.name))]
    if argument.isdecimal():
        return [(int(argument), PurePath(f"camera_{argument}"))]
    if glob.has_magic(argument):
        matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
        if not (files := [p for p in matches if _file(p)]):
            raise ImageError(f"no file matches {argument}")
        return [(p, PurePath(p.name)) for p in files]
    # Reported with the other inputs that cannot be read.
    return [(path, PurePath(path.name))]


def _unique(name: PurePath, taken: set[PurePath]) -> PurePath:
    candidate, number = name, 1
    while candidate.with_suffix("") in taken:
        number += 1
        candidate = name.with_name(f"{name.stem}_{number}{name.suffix}")
    taken.add(candidate.with_suffix(""))
    return candidate
