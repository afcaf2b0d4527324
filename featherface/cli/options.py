"""Options that several subcommands share, and checks of what they name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image
from rich.console import Console

from ..errors import FeatherFaceError
from ..files import is_stream

if TYPE_CHECKING:
    from ..training import Config

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", "-w", metavar="FILE|NAME", help="Weights file, or a model whose weights come with the package."
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="NAME", help="Model of the weights; by default told from the file."),
]
Score = Annotated[float, typer.Option("--score", min=0, max=1, help="Faces score more than this.")]
Nms = Annotated[float, typer.Option("--nms", min=0, max=1, help="Largest intersection over union of two faces.")]
Size = Annotated[
    int | None,
    typer.Option("--size", min=1, metavar="PIXELS", help="Scale the long side to this; default: as it is."),
]
Pad = Annotated[
    float,
    typer.Option("--pad", min=0, max=4, help="Border as a fraction of the long side, for faces that fill the image."),
]
Tile = Annotated[
    int | None,
    typer.Option(
        "--tile", min=64, metavar="PIXELS", help="Cut larger images into tiles, for tiny faces in large images."
    ),
]
Device = Annotated[str, typer.Option("--device", "-d", help="auto, cpu, cuda or cuda:N.")]
Fused = Annotated[
    bool | None,
    typer.Option(
        "--fused/--no-fused",
        help="Fused kernels, or plain PyTorch; default: FF_USE_FUSED, or the engine on a CPU and PyTorch on a GPU.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's choice.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="float32, or bfloat16: faster with AVX512-BF16 or AMX, a little less exact.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")]


def configuration(base: Config, file: Path | None, changes: list[str] | None, data: Path | None) -> Config:
    """The configuration of a training as the command line changes it: ``--config``, ``--set``, then ``--data``."""
    from ..training import load_config, override

    chosen = override(load_config(file, base) if file is not None else base, changes or [])
    if data is not None:
        chosen.data.root = str(data)
    return chosen


def writable_folder(path: Path, option: str) -> Path:
    """``path``, created if need be, after proof that a file can be written there.

    Raises:
        FeatherFaceError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".featherface."):
            pass
    except OSError as error:
        raise FeatherFaceError(f"{option} {path} cannot be written to: {error.strerror or error}") from error
    return path


def picture_file(path: Path, option: str) -> Path:
    """``path``, as :func:`writable_file`, if Pillow writes the format that its suffix names.

    Raises:
        FeatherFaceError: it does not, or as :func:`writable_file`.
    """
    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise FeatherFaceError(f"{option} {path}: pictures cannot be written so; name a .png, .jpg, .webp, ... file")
    return writable_file(path, option)


def writable_file(path: Path, option: str) -> Path:
    """``path``, after proof that its folder, created if need be, can be written to.

    Raises:
        FeatherFaceError: it cannot, or ``path`` is a folder or a file that may not be replaced.
    """
    if path.is_dir():
        raise FeatherFaceError(f"{option} {path} is a folder; give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise FeatherFaceError(f"{option} {path} may not be overwritten (permission denied)")
    if not is_stream(path):
        writable_folder(Path(os.path.realpath(path)).parent, option)
    return path


def not_replaced(option: str, path: Path | None, *others: Path | None) -> None:
    """
    Raises:
        FeatherFaceError: ``path``, which ``option`` names for writing, is one of the ``others``: files that are read,
            or that another option writes.
    """
    if path is None or str(path) == "-" or is_stream(path):
        return
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise FeatherFaceError(f"{option} {path} is a file that this command reads or writes otherwise; name another")


def console() -> Console:
    """Standard output. Tables in a file or a pipe are as wide as they need, since nobody can widen that."""
    found = Console(highlight=False, soft_wrap=True)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 1000
    return found
