"""``featherface demo``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ..detector import FaceDetector
from ..draw import draw_faces
from ..errors import FeatherFaceError
from . import options
from .writers import save_picture

REPEATS = 10
OPS = {"preprocess": "preprocessing", "detection": "face selection"}


def photograph() -> np.ndarray:
    """The astronaut Eileen Collins (NASA, public domain), as scikit-image ships her: (512, 512, 3) uint8.

    Raises:
        FeatherFaceError: scikit-image is not installed.
    """
    try:
        from skimage.data import astronaut
    except ImportError as error:
        raise FeatherFaceError(
            'the photograph comes with scikit-image, which is not installed: pip install "featherface[demo]"'
        ) from error
    return astronaut()


def demo(
    weights: options.Weights = None,
    model: options.Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Annotated picture.")] = Path(
        "featherface-demo.png"
    ),
    size: options.Size = None,
    device: options.Device = "auto",
    fused: options.Fused = None,
    threads: options.Threads = None,
    dtype: options.Dtype = "float32",
) -> None:
    """Find the face in a public-domain photograph; show the time of each stage and which kernels ran.

    The photograph comes with scikit-image (extra: demo).
    """
    options.picture_file(output, "--output")
    detector = FaceDetector(weights, model, device, size=size, fused=fused, threads=threads, dtype=dtype)
    image = photograph()
    faces = detector.detect(image)
    save_picture(draw_faces(image, faces), output)
    console = options.console()
    table = Table("face", "score", "x1", "y1", "x2", "y2", title=f"{len(faces)} found by {detector.model_name}")
    for i, (box, score) in enumerate(zip(faces.boxes, faces.scores)):
        table.add_row(str(i), f"{score:.3f}", *(f"{value:.1f}" for value in box))
    console.print(table)
    times = detector.profile(image, REPEATS)
    height, width = faces.image_size
    stages = Table("stage", "ms", title=f"{width}x{height} on {detector.device}, median of {REPEATS}")
    for stage, milliseconds in times.items():
        if milliseconds >= 0.001:
            stages.add_row(stage, f"{milliseconds:.2f}")
    console.print(stages)
    console.print(f"network: {kernels_of(detector, image)}")
    backends = detector.stage_backends(image)
    if detector.engine is not None and "preprocess" not in backends:
        console.print("preprocessing: none, the engine reads the bytes")
    console.print(
        f"{' and '.join(OPS[op] for op in backends)}: {_named([b for row in backends.values() for b in row])}"
    )
    console.print(f"annotated picture: {output}")


def kernels_of(detector: FaceDetector, image: np.ndarray) -> str:
    """What runs the network: the engine, or the backends of its ops and the reasons for what is not fused."""
    if detector.engine is not None:
        return detector.kernels
    rows = detector.report(image)
    reasons = sorted({row.reason for row in rows if row.backend == "reference" and row.reason})
    ops = _named([row.backend for row in rows]) + (f" ({'; '.join(reasons)})" if reasons else "")
    return f"{ops}; no CPU engine: {detector.engine_reason}"


def _named(backends: list[str]) -> str:
    names = {"reference": "plain PyTorch", "cpu": "C++", "cuda": "CUDA C++", "triton": "Triton"}
    counts = Counter(names.get(backend, backend) for backend in backends)
    return ", ".join(f"{count} ops {name}" for name, count in counts.most_common())
