"""What the user named on the command line: images, folders, patterns, videos, cameras."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
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


def expand(arguments: Sequence[str], recursive: bool = False, without: Sequence[Path] = ()) -> list[Input]:
    """Inputs in the order in which they were named; of a folder, all images, sorted by name.

    An argument is a file, a folder, a pattern with ``*``, ``?`` or ``[]`` (``**`` for any depth), or, if there is no
    such file, the number of a camera. Names are made unique. Folders ``without`` are not searched where they lie in
    another one.

    Raises:
        ImageError: a folder holds no images, or a pattern matches nothing.
    """
    inputs: list[Input] = []
    taken: set[PurePath] = set()
    closed = {path.resolve() for path in without}
    for argument in arguments:
        for source, name in _expand_one(argument, recursive, closed):
            video = isinstance(source, int) or is_video(source)
            inputs.append(Input(source, _unique(name, taken), video))
    return inputs


def left_out(arguments: Sequence[str], recursive: bool = False) -> list[str]:
    """For each folder among the arguments a sentence on the videos and foreign images in it that are no inputs."""
    notes = []
    for folder in map(Path, arguments):
        if not folder.is_dir():
            continue
        files = list(_walk(folder, recursive))
        for suffixes, what in (
            (VIDEO_SUFFIXES, "videos left out, name them themselves"),
            (FOREIGN_SUFFIXES, "images left out, of formats that Pillow does not read"),
        ):
            if found := sorted(p.suffix.lower() for p in files if p.suffix.lower() in suffixes and p.is_file()):
                notes.append(f"{folder}: {what}: {len(found)} ({', '.join(dict.fromkeys(found))})")
    return notes


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    return folder.rglob("*") if recursive else folder.iterdir()


def _expand_one(argument: str, recursive: bool, closed: set[Path]) -> Iterator[tuple[Path | int, PurePath]]:
    path = Path(argument)
    if path.is_dir():
        found = sorted(p for p in _walk(path, recursive) if _is_image(p))
        if inside := {folder for folder in closed if path.resolve() in folder.parents}:
            found = [p for p in found if inside.isdisjoint(p.resolve().parents)]
        if not found:
            deeper = "" if recursive else " (folders inside it are searched with --recursive)"
            others = "".join(f"; {note}" for note in left_out([argument], recursive))
            raise ImageError(f"the folder {path} holds no images{deeper}{others}")
        yield from ((p, p.relative_to(path)) for p in found)
    elif path.exists():
        yield path, PurePath(path.name)
    elif argument.isdecimal():
        yield int(argument), PurePath(f"camera_{argument}")
    elif glob.has_magic(argument):
        matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
        found = [p for p in matches if p.is_file()]
        if not found:
            raise ImageError(f"no file matches {argument}")
        yield from ((p, PurePath(p.name)) for p in found)
    else:
        # Reported with the other inputs that cannot be read.
        yield path, PurePath(path.name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _unique(name: PurePath, taken: set[PurePath]) -> PurePath:
    candidate, number = name, 1
    while candidate.with_suffix("") in taken:
        number += 1
        candidate = name.with_name(f"{name.stem}_{number}{name.suffix}")
    taken.add(candidate.with_suffix(""))
    return candidate
