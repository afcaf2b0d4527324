"""``featherface detect``."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import ffkernels

from ..align import align
from ..detections import Detections
from ..detector import FaceDetector
from ..draw import draw_faces
from ..errors import FeatherFaceError, ImageError
from ..files import atomic_write
from ..images import SUFFIXES
from ..video import SUFFIXES as VIDEO_SUFFIXES
from ..video import VideoReader, VideoWriter, opencv
from . import options
from .inputs import Input, expand
from .writers import CsvWriter, JsonWriter, Row, open_text, save_picture


def detect(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images, folders, patterns; videos or the number of a camera (extra: video).",
        ),
    ],
    weights: options.Weights = None,
    model: options.Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write annotated pictures; for one input also a file."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write results as JSON; - is stdout.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one row per face; - is stdout.")] = None,
    crops: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write faces, aligned by their landmarks, 112x112.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also search folders inside folders.")] = False,
    score: options.Score = 0.5,
    nms: options.Nms = 0.4,
    size: options.Size = None,
    pad: options.Pad = 0.0,
    tile: options.Tile = None,
    device: options.Device = "auto",
    fused: options.Fused = None,
    threads: options.Threads = None,
    dtype: options.Dtype = "float32",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Stop each video or camera after so many frames (Ctrl-C stops a camera).")
    ] = None,
    quiet: options.Quiet = False,
) -> int:
    """Find faces in images, folders, videos or a camera's picture.

    Prints the number of faces per input; --output, --json, --csv and --crops write what was found. Inputs that cannot
    be read are reported at the end and do not stop the others. Exit code: 0 all went well, 1 some inputs failed, 2 none
    could be used or the command is wrong.
    """
    found, notes = expand(inputs, recursive, without=[folder for folder in (output, crops) if folder is not None])
    if any(item.video for item in found):
        opencv()
    elif frames is not None:
        raise FeatherFaceError("--frames is of videos and cameras; there is none among the inputs")
    sources = {item.source.resolve() for item in found if isinstance(item.source, Path)}
    if json is not None and csv is not None and json.resolve() == csv.resolve():
        raise FeatherFaceError(f"--json and --csv name the same file: {json}")
    for option, path in (("--json", json), ("--csv", csv)):
        if path is not None and str(path) != "-":
            if path.resolve() in sources or path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES:
                raise FeatherFaceError(f"{option} would replace {path}; name the file to write, such as faces.json")
            options.not_replaced(option, path, None if weights is None else Path(weights))
            options.writable_file(path, option)
    targets = _targets(found, output, sources)
    if crops is not None:
        options.writable_folder(crops, "--crops")
    detector = FaceDetector(weights, model, device, score, nms, size, fused, threads, pad=pad, tile=tile, dtype=dtype)
    if not quiet:
        for note in notes:
            print(f"featherface: {note}", file=sys.stderr)
    return Run(detector, found, sources, targets, json, csv, crops, frames, quiet).run()


class Run:
    """One run of the command over its inputs."""

    def __init__(
        self,
        detector: FaceDetector,
        inputs: list[Input],
        sources: set[Path],
        targets: list[Path] | None,
        json: Path | None,
        csv: Path | None,
        crops: Path | None,
        frames: int | None,
        quiet: bool,
    ) -> None:
        self.detector, self.inputs, self.targets = detector, inputs, targets
        self.json, self.csv, self.crops, self.frames = json, csv, crops, frames
        # What a crop may not replace.
        self.taken = sources | {target.resolve() for target in targets or ()}
        self.errors: list[FeatherFaceError] = []
        self.faces = self.done = 0
        to_stdout = "-" in (str(json), str(csv))
        self.print_lines = not quiet and not to_stdout
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(
            *columns,
            console=console,
            transient=True,
            # No bar in the midst of results that go to the same terminal.
            disable=quiet or not console.is_terminal or (to_stdout and sys.stdout.isatty()),
            redirect_stdout=False,
        )

    def run(self) -> int:
        with contextlib.ExitStack() as stack:
            self.writers: list[JsonWriter | CsvWriter] = []
            if self.json is not None:
                self.writers.append(JsonWriter(stack.enter_context(open_text(self.json)), self._facts()))
            if self.csv is not None:
                self.writers.append(CsvWriter(stack.enter_context(open_text(self.csv))))
            with self.progress:
                self.task = self.progress.add_task("inputs", total=len(self.inputs))
                for video, group in itertools.groupby(enumerate(self.inputs), lambda pair: pair[1].video):
                    if video:
                        for i, item in group:
                            self._video(i, item)
                    else:
                        self._images(list(group))
            for writer in self.writers:
                writer.close()
            if not self.done:
                # Leaving through an error discards the files that hold nothing.
                raise self._nothing_usable()
        for error in self.errors:
            print(f"featherface: error: {error}", file=sys.stderr)
        if failed := len(self.inputs) - self.done:
            print(f"featherface: {failed} of {len(self.inputs)} inputs failed", file=sys.stderr)
        return 1 if self.errors else 0

    def _images(self, group: list[tuple[int, Input]]) -> None:
        stream = self.detector.stream(item.source for _, item in group)
        for (i, item), outcome in zip(group, stream):
            try:
                if outcome.error is not None:
                    raise outcome.error
                self._picture(i, item, outcome.image, outcome.detections)
            except ImageError as error:
                self._failed(str(item.source), error)
            self.progress.advance(self.task)

    def _picture(self, i: int, item: Input, image: np.ndarray, detections: Detections) -> None:
        if self.targets is not None:
            save_picture(draw_faces(image, detections), self.targets[i])
        self._write(Row(str(item.source), detections))
        self.done += 1
        self._crops(item.source, item.name.with_suffix(""), image, detections)
        if self.print_lines:
            self._print(item, f"{_count(len(detections))}")
            if (
                not len(detections)
                and max(detections.image_size) > 1500
                and not (self.detector.size or self.detector.tile)
            ):
                self._print(
                    item, "no face of 10 to 500 pixels; for larger ones try --size 640, for all sizes --tile 640"
                )

    def _video(self, i: int, item: Input) -> None:
        name = f"camera {item.source}" if isinstance(item.source, int) else str(item.source)
        try:
            count, faces = self._write_video(i, item, name)
        except ImageError as error:
            self._failed(name, error)
        else:
            self.done += 1
            if self.print_lines:
                self._print(item, f"{count} frames, {_count(faces)}")
        self.progress.advance(self.task)

    def _write_video(self, i: int, item: Input, name: str) -> tuple[int, int]:
        count = faces = 0
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(VideoReader(item.source))
            writer = None
            if self.targets is not None:
                temporary = stack.enter_context(atomic_write(self.targets[i]))
                writer = stack.enter_context(VideoWriter(temporary, reader.frames_per_second))
            total = min(filter(None, (reader.frame_count, self.frames)), default=None)
            task = self.progress.add_task(item.name.name, total=total)
            stack.callback(self.progress.remove_task, task)
            for image, detections in self._frames(reader):
                if writer is not None:
                    writer.write(np.asarray(draw_faces(image, detections)))
                self._write(Row(name, detections, frame=count, seconds=round(count / reader.frames_per_second, 3)))
                self._crops(name, item.name.with_name(f"{item.name.stem}_{count:06d}"), image, detections)
                count, faces = count + 1, faces + len(detections)
                self.progress.update(task, completed=count)
            # Some containers only estimate their number of frames.
            if total is not None and count < 0.98 * total - 2:
                error = ImageError(f"{name}: only {count} of {total} frames could be read; it is damaged")
                self.errors.append(error)
                self._write(Row(name, error=str(error)))
        return count, faces

    def _frames(self, reader: VideoReader) -> Iterator[tuple[np.ndarray, Detections]]:
        """Frames with their faces; Ctrl-C ends a camera's, which have no end of their own."""
        camera = reader.frame_count is None and reader.name.startswith("camera")
        frames = itertools.islice(reader, self.frames)
        try:
            if camera:
                # One by one, so that nothing waits for a window of frames to fill.
                for frame in frames:
                    yield frame, self.detector.detect(frame)
            else:
                for outcome in self.detector.stream(frames):
                    if outcome.error is not None:
                        raise outcome.error
                    yield outcome.image, outcome.detections
        except KeyboardInterrupt:
            if not camera:
                raise

    def _crops(self, source: Path | str, name: PurePath, image: np.ndarray, detections: Detections) -> None:
        if self.crops is None:
            return
        for i, landmarks in enumerate(detections.landmarks):
            try:
                crop = align(image, landmarks)
            except ImageError as error:
                self.errors.append(ImageError(f"{source}: {error}"))
                continue
            target = self.crops / name.with_name(f"{name.name}_{i}.png")
            if target.resolve() in self.taken:
                self.errors.append(
                    FeatherFaceError(f"{source}: a crop would replace {target}; name another folder with --crops")
                )
                continue
            self.taken.add(target.resolve())
            try:
                save_picture(Image.fromarray(crop), target)
            except ImageError as error:
                self.errors.append(error)

    def _write(self, row: Row) -> None:
        for writer in self.writers:
            writer.write(row)

    def _failed(self, name: str, error: FeatherFaceError) -> None:
        self.errors.append(error)
        self._write(Row(name, error=str(error)))

    def _print(self, item: Input, text: str) -> None:
        source = f"camera {item.source}" if isinstance(item.source, int) else item.source
        if sys.stdout.isatty() and not self.progress.disable:
            self.progress.print(f"{source}: {text}", highlight=False, markup=False, soft_wrap=True)
        else:
            print(f"{source}: {text}")

    def _nothing_usable(self) -> FeatherFaceError:
        if len(self.errors) == 1:
            return self.errors[0]
        return ImageError(f"none of the {len(self.errors)} inputs could be used; the first: {self.errors[0]}")

    def _facts(self) -> dict[str, Any]:
        d = self.detector
        settings = ("score_threshold", "nms_threshold", "size", "pad", "tile")
        return {
            "featherface": ffkernels.__version__,
            "model": d.model_name,
            "weights": d.weights and d.weights.name,
            "weights_sha256": d.weights_sha256,
            "device": str(d.device),
            "kernels": d.kernels,
            **{name: getattr(d, name) for name in settings},
        }


def _targets(inputs: list[Input], output: Path | None, sources: set[Path]) -> list[Path] | None:
    """Where each annotated picture or video goes."""
    if output is None:
        return None
    suffix = output.suffix.lower()
    if suffix in (VIDEO_SUFFIXES - {".mp4"}) | {".pdf", ".svg", ".heic"} and not output.is_dir():
        raise FeatherFaceError(f"--output {output}: pictures go to .jpg, .png, ..., videos to .mp4")
    if suffix in SUFFIXES | {".mp4"} and not output.is_dir():
        if len(inputs) > 1:
            raise FeatherFaceError(f"--output {output} is one file, but there are {len(inputs)} inputs; name a folder")
        if inputs[0].video != (suffix == ".mp4"):
            raise FeatherFaceError(f"--output {output}: pictures go to .jpg, .png, ..., videos to .mp4")
        check = options.writable_file if inputs[0].video else options.picture_file
        targets = [check(output, "--output")]
    else:
        options.writable_folder(output, "--output")
        targets = [output / _target_name(item) for item in inputs]
    if replaced := next((target for target in targets if target.resolve() in sources), None):
        raise FeatherFaceError(f"--output would replace the input {replaced}; name another folder or file")
    return targets


def _target_name(item: Input) -> PurePath:
    if item.video:
        return item.name.with_suffix(".mp4")
    keep = item.name.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    return item.name if keep else item.name.with_suffix(".png")


def _count(faces: int) -> str:
    return "1 face" if faces == 1 else f"{faces} faces"
