"""Frames of video files and cameras, and video files of frames. Needs the extra ``video`` (OpenCV)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

import numpy as np

from .errors import FeatherFaceError, ImageError

SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp"))
"""File names that are taken for videos."""


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in SUFFIXES


def opencv() -> ModuleType:
    """The ``cv2`` module.

    Raises:
        FeatherFaceError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise FeatherFaceError(
            'videos and cameras need OpenCV, which is not installed: pip install "featherface[video]"'
        ) from error
    return cv2


class VideoReader:
    """Frames of a video file (path) or a camera (number), each (H, W, 3) uint8 red, green, blue.

    Attributes:
        name: of the file or camera, for messages.
        frames_per_second: as the file states it; 30 where it states none.
        frame_count: as the file states it; ``None`` for a camera or where it states none.

    Raises:
        ImageError: it cannot be opened, or holds no frame.
        FeatherFaceError: OpenCV is not installed.
    """

    def __init__(self, source: str | os.PathLike | int) -> None:
        self._cv2 = opencv()
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        if not isinstance(source, int):
            if not Path(source).is_file():
                raise ImageError(f"{source} does not exist or is not a file")
            if Path(source).stat().st_size == 0:
                raise ImageError(f"{source} is an empty file")
        self._capture = self._cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            self._capture.release()
            raise ImageError(f"{self.name} cannot be opened as a video")
        rate = self._capture.get(self._cv2.CAP_PROP_FPS)
        self.frames_per_second = float(rate) if 0 < rate < 1000 else 30.0
        count = int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT))
        self.frame_count = count if count > 0 and not isinstance(source, int) else None

    def __iter__(self) -> Iterator[np.ndarray]:
        index = 0
        while True:
            ok, frame = self._capture.read()
            if not ok:
                break
            yield self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB)
            index += 1
        if index == 0:
            raise ImageError(f"{self.name} holds no frame that can be read")

    def close(self) -> None:
        """Release the file or camera."""
        self._capture.release()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class VideoWriter:
    """Writes (H, W, 3) uint8 frames to a video file (MPEG-4 in ``.mp4``). Write to a temporary name and rename it
    (:func:`featherface.files.atomic_write`): a file that is not closed is not readable.

    Raises:
        FeatherFaceError: OpenCV is not installed, or cannot write the file.
    """

    def __init__(self, path: str | os.PathLike, frames_per_second: float) -> None:
        self._cv2 = opencv()
        self._path, self._rate = Path(path), frames_per_second
        self._writer = None

    def write(self, frame: np.ndarray) -> None:
        """Append a frame; all must have the size of the first."""
        if self._writer is None:
            height, width = frame.shape[:2]
            code = self._cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = self._cv2.VideoWriter(str(self._path), code, self._rate, (width, height))
            if not self._writer.isOpened():
                raise FeatherFaceError(f"OpenCV cannot write a video of {width}x{height} to {self._path}")
        self._writer.write(self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
