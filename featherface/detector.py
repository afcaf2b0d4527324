"""Images in, faces out."""

from __future__ import annotations

import contextlib
import numbers
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import ffkernels
from ffkernels import Policy, ops, registry
from ffkernels.config import Fused, requested_policy, set_fused
from ffkernels.engine import DTYPES, Engine
from ffkernels.engine import build as build_engine
from ffkernels.nn import FusedModule
from ffkernels.report import Report, ReportRow

from . import images as image_io
from . import weights as packaged
from .detections import Detections
from .errors import CheckpointError, FeatherFaceError, ImageError
from .files import sha256
from .images import ImageLike
from .models import create_model, list_models
from .models.anchors import VARIANCES, anchors
from .models.checkpoint import read_tensors
from .models.registry import WEIGHTS, identify

DEFAULT_MODEL = "featherface_v2"
MAX_PIXELS = 2**26
"""Largest input of the network; at 67 million pixels its feature maps take about 4 GB."""

WINDOW_IMAGES, WINDOW_PIXELS = 16, 2**25
"""Images that are read ahead to be grouped into batches: at most so many, and as many pixels (plus one image)."""

BATCH_PIXELS = {"cpu": 2**22, "cuda": 2**25}
"""Pixels of one batch, by device: at 640 x 640, 10 images on a CPU and 80 on a GPU."""

ANCHOR_SETS = 32
TILE_EDGE = 4
"""Faces closer than this many pixels to a tile's inner edge are left to the neighbouring tile."""

Clock = Callable[[str], contextlib.AbstractContextManager]


class Outcome(NamedTuple):
    """What became of one image: its name, its pixels (H, W, 3), and its faces or the error."""

    name: str
    image: np.ndarray | Tensor | None
    detections: Detections | None
    error: FeatherFaceError | None


class View(NamedTuple):
    """One input of the network: a part of an image, resized and placed on a canvas. Sizes are (height, width)."""

    part: tuple[int, int, int, int]
    size: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]
    inner: tuple[bool, bool, bool, bool]


class FaceDetector:
    """Finds faces and their five landmarks.

    >>> detector = FaceDetector("weights.safetensors")          # doctest: +SKIP
    >>> faces = detector.detect("group.jpg")                    # doctest: +SKIP
    >>> faces.boxes, faces.scores, faces.landmarks              # doctest: +SKIP

    Args:
        weights: a weights file (``.safetensors`` or a PyTorch checkpoint), or the name of a model whose weights come
            with the package. ``None`` takes those that come with the package.
        model: a name of :func:`featherface.list_models`, by default the model that the weights fit; or a module, used
            as it is: it is put into evaluation mode and moved to ``device``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: a GPU if there is one (a given module stays put).
        score_threshold: faces score more than this, 0 to 1.
        nms_threshold: largest intersection over union of two faces, 0 to 1.
        size: long side in pixels that images are scaled to; ``None`` keeps their own size. A face should come to 10 to
            500 pixels.
        fused: ``None`` follows ``FF_USE_FUSED``; ``True``, ``False`` or ``"require"`` override it. On a CPU a network
            whose weights are loaded here runs in an inference engine (:mod:`ffkernels.engine`) unless plain PyTorch is
            asked for; a given module does so where ``fused`` or ``FF_USE_FUSED`` asks for kernels, and then later
            changes of its parameters have no effect.
        threads: CPU threads of torch while detecting; ``None`` leaves torch's setting.
        pad: border of mean colour added on every side, as a fraction of the long side: for faces that fill the image.
        tile: images larger than this are cut into overlapping tiles of this side, at full size, half size, a quarter
            and so on until they fit: for faces that are tiny, or of all sizes, in very large images.
        multiple: inputs are padded at right and bottom to a multiple of this, so that images of similar sizes make a
            batch. The result for an image does not depend on the others in the batch.
        top_k: candidates that enter non-maximum suppression.
        keep_top_k: most faces per image.
        dtype: ``"float32"`` or ``"bfloat16"``: of the engine's convolutions. On processors without AVX512-BF16
            the engine computes in float32 either way (``detector.engine.computes``).

    Raises:
        FeatherFaceError: an option is out of range, the device is not available, or bfloat16 is asked for where no
            engine runs the network.
        CheckpointError: there are no weights, or they cannot be read or do not fit.
    """

    def __init__(
        self,
        weights: str | os.PathLike | None = None,
        model: str | nn.Module | None = None,
        device: str | torch.device = "auto",
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        size: int | None = None,
        fused: Fused = None,
        threads: int | None = None,
        *,
        pad: float = 0.0,
        tile: int | None = None,
        multiple: int = 32,
        top_k: int = 5000,
        keep_top_k: int = 750,
        dtype: str = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise FeatherFaceError(f"dtype is {dtype!r}; it must be one of: {', '.join(DTYPES)}")
        _check("score_threshold", score_threshold, 0, 1)
        _check("nms_threshold", nms_threshold, 0, 1)
        _check("size", size, 1, 65536, whole=True)
        _check("threads", threads, 1, 4096, whole=True)
        _check("pad", pad, 0, 4)
        _check("tile", tile, 64, 65536, whole=True)
        _check("multiple", multiple, 1, 4096, whole=True)
        _check("top_k", top_k, 1, 10**9, whole=True)
        _check("keep_top_k", keep_top_k, 1, 10**9, whole=True)
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.size, self.pad, self.tile, self.multiple = size, pad, tile, multiple
        self.top_k, self.keep_top_k, self.threads = top_k, keep_top_k, threads
        self.weights: Path | None = None
        if isinstance(model, nn.Module):
            if weights is not None:
                raise FeatherFaceError("weights and a module exclude each other: load the weights into the module")
            self.model = model if fused is None else set_fused(model, fused)
            self.model_name = getattr(model, "name", None) or type(model).__name__
        else:
            self.model_name, self.weights = resolve_weights(weights, model)
            model = create_model(self.model_name, weights=self.weights, fused=fused)
            self.model = model.to(memory_format=torch.channels_last)
        self.device = resolve_device(device, None if self.weights else self.model)
        self._asked = requested_policy(fused)
        self.policy = self._asked or _default_policy(self.device)
        self.model.eval().to(self.device)
        self.dtype = dtype
        self.engine, self.engine_reason = self._build_engine()
        if self.engine is None and dtype != "float32":
            raise FeatherFaceError(f"{dtype} needs the CPU engine, which does not run here: {self.engine_reason}")
        self._anchors: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def _build_engine(self) -> tuple[Engine | None, str | None]:
        """The CPU engine of the network, or None and the reason."""
        asked, given = self._asked, self.weights is None
        if self.device.type != "cpu":
            return None, f"the device is {self.device}"
        if asked is None and given:
            return None, "a given module is run as it is"
        if asked is not None and (asked.mode == "0" or asked.backend not in ("auto", "cpu")):
            return None, "plain PyTorch was asked for" if asked.mode == "0" else f"{asked.backend} was asked for"
        try:
            return build_engine(self.model, (1, 3, 64, 64), self.dtype, input="both", order="rgb"), None
        except (TypeError, ValueError, RuntimeError) as error:
            return None, str(error)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("engine", "engine_reason")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The engine is built anew: what it has planned is for the processor that it is on."""
        vars(self).update(state)
        self.engine, self.engine_reason = self._build_engine()

    def __copy__(self) -> FaceDetector:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __repr__(self) -> str:
        return f"FaceDetector({self.model_name}, {self.weights or 'given module'}, {self.device})"

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights file; ``None`` for a given module."""
        return None if self.weights is None else sha256(self.weights)

    @property
    def kernels(self) -> str:
        """What runs the network: the engine with its dtype and instruction set, fused kernels, or plain PyTorch."""
        if self.engine is not None:
            return f"CPU engine ({self.engine.computes}, {self.engine.isa})"
        policies = {module.ff_policy for module in self.model.modules() if isinstance(module, FusedModule)}
        fused = sorted(policy.backend for policy in policies if policy.mode != "0" and policy.backend != "reference")
        return f"fused kernels ({', '.join(fused)})" if fused else "plain PyTorch"

    @overload
    def detect(self, images: str | os.PathLike | Image.Image) -> Detections: ...

    @overload
    def detect(self, images: np.ndarray | Tensor) -> Detections | list[Detections]: ...

    @overload
    def detect(self, images: Iterable[ImageLike]) -> list[Detections]: ...

    def detect(self, images: ImageLike | Iterable[ImageLike]) -> Detections | list[Detections]:
        """Faces of one image or of many.

        Args:
            images: a path, a Pillow image, an (H, W, 3) uint8 array (red, green, blue), a (3, H, W) tensor (red, green,
                blue, uint8 or floating point 0 to 255); or a collection of these, of any sizes; or a (B, H, W, 3) array
                or (B, 3, H, W) tensor.

        Returns:
            :class:`Detections` for one image, a list of them, in order, for a collection (also of one).

        Raises:
            ImageError: an image cannot be read or used; its message names it.
        """
        stream, single = self._outcomes(images)
        results = []
        for outcome in stream:
            if outcome.error is not None:
                raise outcome.error
            results.append(outcome.detections)
        return results[0] if single else results

    __call__ = detect

    def stream(self, images: Iterable[ImageLike]) -> Iterator[Outcome]:
        """Like :meth:`detect`, but one :class:`Outcome` after the other, in order, with memory for a few images only.

        An image that cannot be read or used gives an outcome with an error, and the others go on.
        """
        return self._outcomes(images)[0]

    def profile(self, image: ImageLike, repeats: int = 20) -> dict[str, float]:
        """Median milliseconds of each stage for one image.

        Returns:
            ``read`` (decoding the file, if it is one), ``preprocess``, ``network``, ``faces`` (decoding of boxes,
            filter, top-k and suppression) and ``total``.
        """
        _check("repeats", repeats, 1, 10**9, whole=True)
        source, single = image_io.sources(image)
        if not single:
            raise FeatherFaceError("profile takes one image")
        source = next(source)
        runs: list[dict[str, float]] = []
        for run in range(repeats + 2):
            times = dict.fromkeys(("read", "preprocess", "network", "faces"), 0.0)

            @contextlib.contextmanager
            def clock(stage: str, times: dict[str, float] = times) -> Iterator[None]:
                start = time.perf_counter()
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times[stage] += 1e3 * (time.perf_counter() - start)

            start = time.perf_counter()
            with clock("read"):
                pixels = source.read()
            with self._running():
                self._faces([pixels], clock)
            times["total"] = 1e3 * (time.perf_counter() - start)
            if run >= 2:
                runs.append(times)
        return {stage: statistics.median(times[stage] for times in runs) for stage in runs[0]}

    def report(self, image: ImageLike) -> Report:
        """Which backend runs each op of the model on this image, and why not a better one; one row for an engine."""
        if self.engine is not None:
            facts = f"{self.engine.computes}, {self.engine.isa}"
            return Report([ReportRow(self.model_name, "engine", "cpu", facts)])
        source = next(image_io.sources(image)[0])
        pixels = source.read()
        view = self._views(pixels.shape[0], pixels.shape[1])[0]
        with self._running():
            return ffkernels.report(self.model, self._input([(pixels, view)]))

    def stage_backends(self, image: ImageLike) -> dict[str, list[str]]:
        """Which backends prepare this image and select its faces: per op, one entry for each call.

        An engine reads an image of bytes that needs no resizing as it is; then there is no ``preprocess``.
        """
        calls: list[tuple[str, registry.Selection]] = []
        pixels = next(image_io.sources(image)[0]).read()
        with registry.record(calls), self._running():
            self._faces([pixels])
        backends: dict[str, list[str]] = {}
        for op, selection in calls:
            if op in ("preprocess", "detection"):
                backends.setdefault(op, []).append(selection.backend)
        return backends

    def _outcomes(self, images: ImageLike | Iterable[ImageLike]) -> tuple[Iterator[Outcome], bool]:
        sources, single = image_io.sources(images)
        return self._windows(sources), single

    def _windows(self, sources: Iterator[image_io.Source]) -> Iterator[Outcome]:
        window: list[Outcome] = []
        pixels = 0
        for source in sources:
            try:
                image = source.read()
                self._views(*image.shape[:2])
                window.append(Outcome(source.name, image, None, None))
                pixels += image.shape[0] * image.shape[1]
            except FeatherFaceError as error:
                if not str(error).startswith(source.name):
                    error = type(error)(f"{source.name}: {error}")
                window.append(Outcome(source.name, None, None, error))
            if len(window) >= WINDOW_IMAGES or pixels >= WINDOW_PIXELS:
                yield from self._finish(window)
                window, pixels = [], 0
        yield from self._finish(window)

    def _finish(self, window: list[Outcome]) -> Iterator[Outcome]:
        usable = [i for i, outcome in enumerate(window) if outcome.error is None]
        if usable:
            with self._running():
                found = self._faces([window[i].image for i in usable])
            for i, detections in zip(usable, found):
                window[i] = window[i]._replace(detections=detections)
        return iter(window)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            if self.threads is not None:
                torch.set_num_threads(threads)

    def _faces(self, images: list[np.ndarray | Tensor], clock: Clock | None = None) -> list[Detections]:
        clock = clock or (lambda stage: contextlib.nullcontext())
        tensors = [_as_tensor(image) for image in images]
        groups: dict[tuple[int, int], list[tuple[int, View]]] = {}
        for i, image in enumerate(tensors):
            for view in self._views(*image.shape[:2]):
                groups.setdefault(view.canvas, []).append((i, view))
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in tensors]
        for canvas, views in groups.items():
            step = max(1, BATCH_PIXELS.get(self.device.type, 2**22) // (canvas[0] * canvas[1]))
            for start in range(0, len(views), step):
                batch = views[start : start + step]
                outputs = self._predictions([(tensors[i], view) for i, view in batch], clock)
                with clock("faces"):
                    for (i, view), (bbox, cls, landmarks) in zip(batch, outputs):
                        if torch.isnan(cls).any():
                            raise FeatherFaceError(
                                f"{self.model_name} gives scores that are not numbers; its weights are bad"
                            )
                        found[i].append(self._in_image(view, bbox, cls[:, 1], landmarks))
        with clock("faces"):
            return [self._merge(parts, tuple(image.shape[:2])) for parts, image in zip(found, tensors)]

    def _predictions(self, batch: list[tuple[Tensor, View]], clock: Clock) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The network's outputs for views of one canvas. Where an engine runs, it reads bytes as they are, without a
        float copy, if they need no resizing."""
        outputs: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(batch)
        others = []
        for j, (image, view) in enumerate(batch):
            part = _part(image, view).to(self.device)
            if self.engine is None or part.dtype != torch.uint8 or tuple(part.shape[:2]) != view.size:
                others.append(j)
                continue
            with clock("network"):
                outputs[j] = tuple(column[0] for column in self.engine(part, view.canvas, view.offset))
        if others:
            with clock("preprocess"):
                x = self._input([batch[j] for j in others])
            with clock("network"):
                columns = (self.engine or self.model)(x)
            for j, *image in zip(others, *columns):
                outputs[j] = tuple(image)
        return outputs

    def _views(self, height: int, width: int) -> list[View]:
        scale = 1.0 if self.size is None else self.size / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        views = []
        while self.tile is not None and max(size) > self.tile:
            views += self._tiles(height, width, size)
            size = max(1, (size[0] + 1) // 2), max(1, (size[1] + 1) // 2)
        border = round(self.pad * max(size))
        canvas = tuple(_round_up(side + 2 * border, self.multiple) for side in size)
        if canvas[0] * canvas[1] > MAX_PIXELS:
            raise ImageError(
                f"an input of {canvas[1]}x{canvas[0]} pixels would need too much memory; "
                "scale the image (size=1280 or --size 1280, say) or cut it into tiles (tile=1024 or --tile 1024)"
            )
        whole = View((0, 0, height, width), size, (border, border), canvas, (False,) * 4)
        return [*views, whole]

    def _tiles(self, height: int, width: int, size: tuple[int, int]) -> list[View]:
        views = []
        rows, columns = (_spans(side, self.tile, self.tile // 4) for side in size)
        y_scale, x_scale = height / size[0], width / size[1]
        for top, bottom in rows:
            for left, right in columns:
                part = round(top * y_scale), round(left * x_scale), round(bottom * y_scale), round(right * x_scale)
                tile = bottom - top, right - left
                canvas = tuple(_round_up(side, self.multiple) for side in tile)
                inner = top > 0, left > 0, bottom < size[0], right < size[1]
                views.append(View(part, tile, (0, 0), canvas, inner))
        return views

    def _input(self, batch: list[tuple[np.ndarray | Tensor, View]]) -> Tensor:
        parts = []
        for image, view in batch:
            part = _part(_as_tensor(image), view).to(self.device)
            parts.append(ops.preprocess(part, view.size, view.canvas, view.offset, policy=self.policy))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _priors(self, canvas: tuple[int, int]) -> Tensor:
        priors = self._anchors.pop(canvas, None)
        if priors is None:
            priors = anchors(*canvas).to(self.device)
        self._anchors[canvas] = priors
        while len(self._anchors) > ANCHOR_SETS:
            self._anchors.popitem(last=False)
        return priors

    def _in_image(self, view: View, bbox: Tensor, scores: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, points = ops.detect(
            bbox,
            scores,
            landmarks,
            self._priors(view.canvas),
            self.score_threshold,
            self.nms_threshold,
            self.top_k,
            self.keep_top_k,
            VARIANCES,
            policy=self.policy,
        )
        y1, x1, y2, x2 = view.part
        # Canvas units to pixels of the tile, then to pixels of the image.
        canvas = boxes.new_tensor((view.canvas[1], view.canvas[0]))
        offset = boxes.new_tensor((view.offset[1], view.offset[0]))
        scale = boxes.new_tensor(((x2 - x1) / view.size[1], (y2 - y1) / view.size[0]))
        origin = boxes.new_tensor((x1, y1))
        boxes, points = boxes.view(-1, 2, 2) * canvas - offset, points.view(-1, 5, 2) * canvas - offset
        if any(view.inner):
            top, left, bottom, right = view.inner
            low = boxes.new_tensor((TILE_EDGE if left else -torch.inf, TILE_EDGE if top else -torch.inf))
            high = boxes.new_tensor(
                (view.size[1] - TILE_EDGE if right else torch.inf, view.size[0] - TILE_EDGE if bottom else torch.inf)
            )
            whole = ((boxes[:, 0] > low) & (boxes[:, 1] < high)).all(dim=1)
            boxes, scores, points = boxes[whole], scores[whole], points[whole]
        return boxes * scale + origin, scores, points * scale + origin

    def _merge(self, parts: list[tuple[Tensor, Tensor, Tensor]], image_size: tuple[int, int]) -> Detections:
        boxes, scores, points = (torch.cat(columns) for columns in zip(*parts))
        boxes = boxes.flatten(1)
        if len(parts) > 1:
            keep = ops.nms(boxes, scores, self.nms_threshold, policy=self.policy)[: self.keep_top_k]
            boxes, scores, points = boxes[keep], scores[keep], points[keep]
        height, width = image_size
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height, width, height)))
        inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        columns = (boxes[inside], scores[inside], points[inside])
        return Detections(*(column.float().cpu().numpy() for column in columns), image_size=image_size)


def resolve_weights(weights: str | os.PathLike | None, model: str | None) -> tuple[str, Path]:
    """Name of the model and its weights file, from what the user gave of both. See :class:`FaceDetector`.

    Raises:
        FeatherFaceError: there is no such model, or two are named.
        CheckpointError: there is no such file, or the model cannot be told from it.
    """
    names = list_models()
    if model is not None and model not in names:
        raise FeatherFaceError(f"there is no model {model!r}; choose from: {', '.join(names)}")
    if weights is None or (str(weights) in names and not Path(weights).exists()):
        if weights is not None and model not in (None, str(weights)):
            raise FeatherFaceError(f"the weights are those of {weights}, the model is {model}; name one of the two")
        name = model or (str(weights) if weights is not None else DEFAULT_MODEL)
        path = WEIGHTS / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"no trained weights of {name} come with this package; "
                "pass a weights file: --weights FILE, or weights=... in Python"
            )
        packaged.find(name, WEIGHTS)
        return name, path
    path = Path(weights)
    if model is None:
        model = identify(read_tensors(path))
        if model is None:
            raise CheckpointError(f"{path} fits none of the models; name the one it belongs to (--model, model=...)")
    return model, path


def resolve_device(device: str | torch.device, module: nn.Module | None = None) -> torch.device:
    """The device to run on. ``"auto"``: that of the module, if one is given, else a GPU if there is one, else the CPU.

    Raises:
        FeatherFaceError: there is no such device here.
    """
    if str(device) == "auto":
        parameter = None if module is None else next(module.parameters(), None)
        if parameter is not None:
            return parameter.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FeatherFaceError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return device


def _default_policy(device: torch.device) -> Policy:
    """How images are prepared and faces selected where nothing was asked for: natively, where that is built."""
    native = device.type == "cpu" and registry.backend_unavailable("cpu") is None
    return Policy("1", "cpu") if native else Policy("0")


def _part(image: Tensor, view: View) -> Tensor:
    y1, x1, y2, x2 = view.part
    return image[y1:y2, x1:x2]


def _as_tensor(image: np.ndarray | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if not image.flags.writeable or any(stride < 0 for stride in image.strides):
        image = image.copy()
    return torch.from_numpy(image)


def _check(name: str, value: float | None, low: float, high: float, whole: bool = False) -> None:
    kind = numbers.Integral if whole else numbers.Real
    if value is not None and not (isinstance(value, kind) and low <= value <= high):
        what = "a whole number" if whole else "a number"
        raise FeatherFaceError(f"{name} is {value!r}; it must be {what} from {low} to {high}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Start and end of tiles that cover ``length``, evenly spread, overlapping by at least ``overlap``."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    return [(start, start + tile) for start in (round(i * (length - tile) / (count - 1)) for i in range(count))]
