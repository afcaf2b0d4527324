"""Models as files that other runtimes load: ONNX, TorchScript, PyTorch's exported programs.

Every file has one input, ``image`` (B, 3, H, W), with dynamic B, H and W, three outputs, ``bbox`` (B, N, 4), ``cls``
(B, N, 2; probabilities, the face in column 1) and ``landmarks`` (B, N, 10), and says inside what they mean
(:func:`metadata`). Nothing is written under the final name before the file, loaded again, has given what PyTorch gives.
"""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels import __version__, set_fused
from ffkernels.ops.preprocess import MEAN

from .errors import FeatherFaceError
from .files import atomic_write
from .models.anchors import SIZES, STEPS, VARIANCES

OUTPUTS = ("bbox", "cls", "landmarks")
METADATA_FILE = "featherface.json"
"""Name of the JSON entry that holds the metadata inside TorchScript and exported-program files."""

PARITY_SHAPES = ((1, 64, 64), (2, 97, 131), (1, 40, 320), (3, 160, 96))
"""Batch, height, width of the random inputs that a file is checked on."""

PARITY_TOLERANCE = 1e-4
"""Largest difference from PyTorch, relative to the largest magnitude of the output."""

_EXAMPLE = (2, 3, 96, 128)

Run = Callable[[Tensor], Sequence[Tensor]]


class ExportError(FeatherFaceError):
    """A model cannot be written in this format, or the file does not give what the model gives."""


def export(
    model: nn.Module, path: str | os.PathLike, format: str = "onnx", extra: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Write ``model`` to ``path``.

    Args:
        model: a FeatherFace model on any device; it is not changed. Its weights are written as they are, in float32.
        path: file to write, best with the suffix of :data:`FORMATS`.
        format: ``"onnx"``, ``"torchscript"`` or ``"exported-program"``.
        extra: more entries for the metadata, such as ``weights_sha256``.

    Returns:
        Largest relative difference from PyTorch, by output.

    Raises:
        ExportError: the format is unknown, the exporter fails, or the file differs from the model on random inputs.
        FeatherFaceError: a package of the extra ``export`` is missing.
        OSError: the file cannot be written.
    """
    if format not in FORMATS:
        raise ExportError(f"there is no export format {format!r}; choose from: {', '.join(FORMATS)}")
    model = set_fused(copy.deepcopy(model), False).cpu().float().eval()
    facts = metadata(model, extra)
    write, read = _HANDLERS[format]
    with atomic_write(path) as temporary, _quiet():
        try:
            write(model, temporary, facts)
        except FeatherFaceError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"{facts['model']} cannot be exported as {format}: {reason}") from error
        return check_parity(model, read(temporary), format)


def metadata(model: nn.Module, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a program needs to know to use the file: input, preprocessing, outputs, anchors, origin."""
    return {
        "model": getattr(model, "name", None) or type(model).__name__,
        "featherface": __version__,
        "torch": torch.__version__,
        "input": "image: float32 (B, 3, H, W), blue green red, 0 to 255, minus the mean; any B, H, W",
        "channel_order": "BGR",
        "mean": list(MEAN),
        "outputs": {
            "bbox": "(B, N, 4) offsets of centre and logarithm of size against the anchors, divided by the variances",
            "cls": "(B, N, 2) probabilities, the face in column 1",
            "landmarks": "(B, N, 10) x y of left eye, right eye, nose, left and right mouth corner, as the centres",
        },
        "anchors": {
            "steps": list(STEPS),
            "sizes": [list(sizes) for sizes in SIZES],
            "variances": list(VARIANCES),
            "order": "level, row, column, size; a level has ceil(H / step) rows and ceil(W / step) columns; "
            "centres at (column + 0.5) * step, (row + 0.5) * step",
        },
        **(extra or {}),
    }


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata inside a file that :func:`export` wrote.

    Raises:
        ExportError: the file holds none.
    """
    path = Path(path)
    try:
        if path.suffix == ".onnx":
            entries = {entry.key: entry.value for entry in _onnx().load(path).metadata_props}
            return json.loads(entries["featherface"])
        files = {METADATA_FILE: ""}
        with _quiet():
            if path.suffix == ".pt2":
                torch.export.load(path, extra_files=files)
            else:
                torch.jit.load(path, map_location="cpu", _extra_files=files)
        return json.loads(files[METADATA_FILE])
    except (FeatherFaceError, OSError):
        raise
    except Exception as error:
        raise ExportError(f"{path} holds no metadata of featherface") from error


def check_parity(model: nn.Module, run: Run, name: str) -> dict[str, float]:
    """Largest difference of ``run`` from ``model`` on random inputs of :data:`PARITY_SHAPES`, relative, by output.

    Raises:
        ExportError: it is larger than :data:`PARITY_TOLERANCE`, or an input is refused.
    """
    worst = dict.fromkeys(OUTPUTS, 0.0)
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in PARITY_SHAPES:
        x = torch.rand(batch, 3, height, width, generator=generator) * 255 - 117
        with torch.no_grad():
            expected = model(x)
        try:
            found = run(x)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"the {name} file refuses an input of {batch}x3x{height}x{width}: {reason}") from error
        for output, a, b in zip(OUTPUTS, expected, found):
            difference = float((a - b).abs().max() / a.abs().max()) if a.shape == b.shape else float("inf")
            if not difference <= PARITY_TOLERANCE:
                raise ExportError(
                    f"the {name} file differs from the model: {output} of a {batch}x3x{height}x{width} input by "
                    f"{difference:.1e} of its largest value; nothing was written"
                )
            worst[output] = max(worst[output], difference)
    return worst


def exported_program(model: nn.Module) -> torch.export.ExportedProgram:
    """``model`` as an exported program with dynamic batch, height and width."""
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    return torch.export.export(_Named(model), (torch.zeros(_EXAMPLE),), dynamic_shapes=(dynamic,))


def trace(model: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    """``model`` as TorchScript with dynamic batch, height and width, traced on ``example``."""
    with torch.no_grad(), _quiet():
        return torch.jit.trace(_Named(model), example, check_trace=False)


class _Named(nn.Module):
    """The model with its input called ``image`` and without options."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model(image, logits=False)


def _write_onnx(model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    onnx = _onnx()
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise FeatherFaceError(_missing("onnxscript")) from error
    _onnxruntime()
    program = torch.onnx.export(
        exported_program(model), (), dynamo=True, input_names=["image"], output_names=list(OUTPUTS), verbose=False
    )
    proto = program.model_proto
    axes = {proto.graph.input[0].name: ("batch", None, "height", "width")}
    axes |= {output.name: ("batch", "anchors", None) for output in proto.graph.output}
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, axes[value.name]):
            if name is not None:
                dimension.dim_param = name
    # Shapes of intermediate values are in terms of the names that were just replaced; notes on nodes hold stack traces.
    del proto.graph.value_info[:]
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.helper.set_model_props(proto, {"featherface": json.dumps(facts), "model": facts["model"]})
    proto.producer_name, proto.producer_version = "featherface", __version__
    onnx.checker.check_model(proto)
    onnx.save_model(proto, path)


def _read_onnx(path: Path) -> Run:
    session = _onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(list(OUTPUTS), {"image": x.numpy()})]

    return run


def _write_torchscript(model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.jit.save(trace(model, torch.zeros(_EXAMPLE)), buffer, _extra_files={METADATA_FILE: json.dumps(facts)})
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # stacks, with the folders of this machine
                target.writestr(entry, source.read(entry))


def _read_torchscript(path: Path) -> Run:
    module = torch.jit.load(path, map_location="cpu")

    def run(x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return module(x)

    return run


def _write_program(model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        program = exported_program(model)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it names the folders of this machine
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(facts)})


def _read_program(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return module(x)

    return run


_HANDLERS: dict[str, tuple[Callable[[nn.Module, Path, dict[str, Any]], None], Callable[[Path], Run]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torchscript": (_write_torchscript, _read_torchscript),
    "exported-program": (_write_program, _read_program),
}

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "exported-program": ".pt2"}
"""Formats and their usual suffix."""


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise FeatherFaceError(_missing("onnx")) from error
    return onnx


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise FeatherFaceError(_missing("onnxruntime")) from error
    return onnxruntime


def _missing(package: str) -> str:
    return f'ONNX files need {package}, which is not installed: pip install "featherface[export]"'


@contextmanager
def _quiet():
    """Exporters announce deprecations and internals at length; what matters here arrives as an exception."""
    loggers = [getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
