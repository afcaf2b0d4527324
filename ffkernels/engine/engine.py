"""The engine as its user sees it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import cpu
from ..cpu import detection
from ..native import check, module
from .bf16 import Bf16Builder
from .builder import Builder
from .memory import aligned
from .plan import Plan, make_plan

INPUTS = ("float32_nchw", "uint8_hwc", "both")
OUTPUTS = ("raw", "softmax", "detections")
ORDERS = ("bgr", "rgb")
DTYPES = ("float32", "bfloat16")
CACHE_BYTES = 2**30
"""Arenas of cached plans take at most this, the one in use excepted."""
CACHE_PLANS = 32


def unavailable() -> str | None:
    """Why no engine can be built here, ``None`` if one can."""
    return cpu.unavailable()


def computed_dtype(dtype: str) -> str:
    """What an engine of this dtype computes in with the kernels that are loaded: bfloat16 needs AVX512-BF16."""
    return dtype if module()[0].ff_cpu_engine_bf16() else "float32"


def peak(dtype: str = "float32", threads: int = 1) -> float | None:
    """GFLOP/s of that many threads that do nothing but multiply and add, measured for some hundredths of a second.

    ``None`` for a dtype that engines do not compute in here (:func:`computed_dtype`).
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"engine: the C++ kernels cannot be used: {reason}")
    if computed_dtype(dtype) != dtype:
        return None
    return module()[0].ff_cpu_engine_peak(dtype == "bfloat16", threads) / 1e9


class Faces(NamedTuple):
    """Faces of one image, best score first: boxes (M, 4) ``x1 y1 x2 y2``, scores (M,), landmarks (M, 10) x then y;
    coordinates are fractions of the width and height of the network's input."""

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor


class _Planned:
    """A plan, the anchors of its size where faces are wanted, and the arenas that its calls take turns to use."""

    def __init__(self, plan: Plan, priors: Tensor | None) -> None:
        self.plan, self.priors = plan, priors
        self.arenas: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """An arena, 64-byte aligned."""
        try:
            return self.arenas.pop()
        except IndexError:
            return aligned(self.plan.arena + 16)

    @property
    def bytes(self) -> int:
        return 4 * self.plan.arena * max(1, len(self.arenas))


class Engine:
    """A network ready to run on the CPU. Made by :func:`build`.

    Attributes:
        dtype: what was asked for.
        computes: what it computes in: ``"float32"`` where bfloat16 was asked for and the processor multiplies none.
        isa: the instruction set of its kernels.

    Calls are safe from several threads: each has an arena of its own. The results do not depend on the number of
    threads. Batches run image after image, all threads on each.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        dtype: str = "float32",
        threads: int | None = None,
        input: str = "float32_nchw",
        outputs: str = "softmax",
        order: str = "bgr",
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        top_k: int = 5000,
        keep_top_k: int = 750,
    ) -> None:
        for name, value, allowed in (
            ("dtype", dtype, DTYPES),
            ("input", input, INPUTS),
            ("outputs", outputs, OUTPUTS),
            ("order", order, ORDERS[:1] if input == "float32_nchw" else ORDERS),
        ):
            if value not in allowed:
                raise ValueError(f"engine: {name}={value!r} is not a valid value; use one of: {', '.join(allowed)}")
        if not 0 <= nms_threshold <= 1:
            raise ValueError(f"engine: nms_threshold={nms_threshold} must be from 0 to 1")
        if top_k < 1 or keep_top_k < 1:
            raise ValueError(f"engine: top_k={top_k}, keep_top_k={keep_top_k}; both must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"engine: threads={threads} must be at least 1")
        if (reason := unavailable()) is not None:
            raise RuntimeError(f"engine: the C++ kernels cannot be used: {reason}")
        self.input, self.outputs, self.dtype, self.threads, self.order = input, outputs, dtype, threads, order
        self._selection = (score_threshold, nms_threshold, top_k, keep_top_k)
        self.isa = cpu.loaded_isa()
        native, _ = module()
        self._native = native
        self._lanes = native.ff_cpu_engine_lanes()
        self._fields = native.ff_cpu_engine_fields().strip(",").split(",")
        self.computes = computed_dtype(dtype)
        if self.computes == "bfloat16":
            builder = Bf16Builder(self._lanes, native.ff_cpu_engine_bf16())
        else:
            builder = Builder(self._lanes)
        builder.name_parameters(model)
        builder.describe(model)
        if outputs == "detections" and builder.priors is None:
            raise ValueError("engine: the model does not tell its anchors (builder.anchors), which detections need")
        self._builder = builder
        self._weights = builder.weights.array()
        self._packed = builder.packed()
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[int, int, int, bool], _Planned] = OrderedDict()
        self._seconds: np.ndarray | None = None
        self._profiled: tuple[int, int, int, bool] | None = None
        self.prepare(input_shape)

    def __repr__(self) -> str:
        return f"Engine({self.input}, {self.outputs}, {self.dtype}, {self.isa}, {len(self._plans)} plans)"

    def __call__(
        self, x: Tensor, canvas: tuple[int, int] | None = None, offset: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor, Tensor] | list[Faces]:
        """Run the network.

        Args:
            x: ``"float32_nchw"``: (B, 3, H, W) float32, as the model takes it. ``"uint8_hwc"``: (B, H, W, 3) or
                (H, W, 3) uint8, blue, green, red or as ``order`` says. ``"both"``: either of these. On the CPU; copied
                if it is not contiguous, except that rows of bytes may be apart. B may be 0, H and W are any from 1.
            canvas: height and width of the network's input for bytes, mean colour around the image; by default just as
                large as ``offset`` and x need.
            offset: row and column of the image's top left corner on the canvas.

        Returns:
            bbox (B, N, 4), cls (B, N, 2), landmarks (B, N, 10), as the model in evaluation mode: cls are probabilities,
            or logits where the engine was built with ``outputs="raw"``. With ``outputs="detections"`` the
            :class:`Faces` of each image, as :func:`ffkernels.ops.detect` selects them.

        Raises:
            TypeError: x is not a tensor of that dtype.
            ValueError: wrong shape or device, or the image does not fit on the canvas.
        """
        planned, outputs = self._run(x, None, canvas, offset)
        if planned.priors is None:
            return outputs
        return [self._faces(planned.priors, *image) for image in zip(*outputs)]

    def prepare(self, input_shape: Sequence[int]) -> None:
        """Plan for an input size, as the first call of that size does. ``input_shape`` as for :func:`build`."""
        height, width = self._image_size(tuple(input_shape))
        self._planned(height, width, self._thread_count(), self.input == "uint8_hwc")

    def _faces(self, priors: Tensor, bbox: Tensor, cls: Tensor, landmarks: Tensor) -> Faces:
        variances = self._builder.priors[1]
        *columns, count = detection.detect(bbox, cls[:, 1], landmarks, priors, *self._selection, variances)
        return Faces(*(column[: int(count)] for column in columns))

    def _run(
        self,
        x: Tensor,
        seconds: np.ndarray | None,
        canvas: tuple[int, int] | None = None,
        offset: tuple[int, int] = (0, 0),
    ) -> tuple[_Planned, tuple[Tensor, Tensor, Tensor]]:
        if cpu.loaded_isa() != self.isa:
            raise RuntimeError(
                f"engine: it was built for {self.isa}, but the kernels of {cpu.loaded_isa()} are loaded; build it again"
            )
        x, batch, *size = self._checked(x)
        if canvas is None:
            canvas = size[0] + offset[0], size[1] + offset[1]
        height, width = canvas
        if x.dtype == torch.float32 and (tuple(canvas) != tuple(size) or any(offset)):
            raise ValueError("engine: a canvas needs an image of bytes")
        if any(at < 0 or at + side > whole for at, side, whole in zip(offset, size, canvas)):
            raise ValueError(
                f"engine: {size[0]}x{size[1]} pixels at {tuple(offset)} do not fit on a canvas of {canvas}"
            )
        threads = self._thread_count()
        picture = np.array([x.stride(0), x.stride(1), *size, *offset], np.int64)
        picture[:2] *= x.element_size()
        planned = self._planned(height, width, threads, x.dtype == torch.uint8)
        plan = planned.plan
        outputs = tuple(torch.empty(batch, plan.anchors, k, device="cpu") for k in (4, 2, 10))
        if batch == 0:
            return planned, outputs
        arena = planned.take()
        try:
            code = self._native.ff_cpu_engine_run(
                plan.rows.ctypes.data,
                len(plan.rows),
                arena.ctypes.data,
                plan.scratch,
                plan.scratch_size,
                self._weights.ctypes.data,
                x.data_ptr(),
                picture.ctypes.data,
                *(out.data_ptr() for out in outputs),
                plan.anchors,
                batch,
                0 if seconds is None else seconds.ctypes.data,
                self._lanes,
                threads,
            )
        finally:
            planned.arenas.append(arena)
        check(code, "engine", x)
        return planned, outputs

    def _checked(self, x: Tensor) -> tuple[Tensor, int, int, int]:
        dtypes = {"float32_nchw": (torch.float32,), "uint8_hwc": (torch.uint8,)}.get(
            self.input, (torch.float32, torch.uint8)
        )
        if not isinstance(x, Tensor) or x.dtype not in dtypes:
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"engine: the input must be a tensor of {' or '.join(map(str, dtypes))}, got {got}")
        if x.device.type != "cpu":
            raise ValueError(f"engine: the input is on {x.device}, the engine runs on the CPU")
        channels = 1 if x.dtype == torch.float32 else 3
        if channels == 3 and x.dim() == 3:
            x = x.unsqueeze(0)
        if x.dim() != 4 or x.shape[channels] != 3:
            layout = "(B, 3, H, W)" if channels == 1 else "(B, H, W, 3)"
            raise ValueError(f"engine: the input must be {layout}, got {tuple(x.shape)}")
        height, width = (x.shape[2], x.shape[3]) if channels == 1 else (x.shape[1], x.shape[2])
        if height == 0 or width == 0:
            raise ValueError(f"engine: the input has no pixels: {tuple(x.shape)}")
        x = x.detach()
        if channels == 1 or x.stride()[2:] != (3, 1):
            x = x.contiguous()
        return x, x.shape[0], height, width

    def _image_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        last = self.input == "uint8_hwc"
        size, channels = (shape[-3:-1], shape[-1:]) if last else (shape[-2:], shape[-3:-2])
        if len(shape) not in (3, 4) or channels != (3,) or any(side < 1 for side in size):
            layout = "(B, H, W, 3)" if last else "(B, 3, H, W)"
            raise ValueError(f"engine: input_shape must be {layout}, got {shape}")
        return size

    def _thread_count(self) -> int:
        return self.threads or torch.get_num_threads()

    def _planned(self, height: int, width: int, threads: int, of_bytes: bool) -> _Planned:
        key = (height, width, threads, of_bytes)
        with self._lock:
            planned = self._plans.get(key)
            if planned is None:
                b = self._builder
                plan = make_plan(
                    b.nodes,
                    b.heads,
                    self._fields,
                    self._lanes,
                    self._packed,
                    (height, width),
                    threads,
                    1 + ORDERS.index(self.order) if of_bytes else 0,
                    self.outputs != "raw",
                )
                priors = None
                if self.outputs == "detections":
                    priors = b.priors[0](height, width).float().contiguous()
                    if priors.shape != (plan.anchors, 4):
                        raise ValueError(
                            f"engine: the model has {plan.anchors} anchors at {height}x{width}, but its priors are "
                            f"{tuple(priors.shape)}"
                        )
                planned = self._plans[key] = _Planned(plan, priors)
            self._plans.move_to_end(key)
            while len(self._plans) > 1 and (
                len(self._plans) > CACHE_PLANS or sum(p.bytes for p in self._plans.values()) > CACHE_BYTES
            ):
                self._plans.popitem(last=False)
            return planned

    def profile(self, x: Tensor, repeats: int = 20, peak: float | None = None) -> str:
        """Run ``x`` that many times with a clock after every step; :meth:`plan` then has times. Returns its text.

        Every step ends with a barrier here, so the sum is somewhat more than a plain call takes.
        """
        x, batch, height, width = self._checked(x)
        key = (height, width, self._thread_count(), x.dtype == torch.uint8)
        rows = len(self._planned(*key).plan.rows)
        runs = np.zeros((repeats, rows))
        self._run(x, None)
        for seconds in runs:
            self._run(x, seconds)
        self._seconds, self._profiled = np.median(runs, axis=0) / max(batch, 1), key
        return self.plan(peak)

    def plan(self, peak: float | None = None) -> str:
        """The steps: blocks, output, MFLOP, kilobytes read and written; after :meth:`profile` also time and GFLOP/s,
        and, for a ``peak`` in GFLOP/s, the share of it."""
        key = self._profiled or next(reversed(self._plans))
        plan = self._planned(*key).plan
        lines = [
            f"{key[1]}x{key[0]}, {key[2]} threads, {self.computes} on {self.isa}: {len(plan.steps)} steps, "
            f"{plan.barriers} barriers, {sum(s.flops for s in plan.steps) / 1e6:.1f} MFLOP, "
            f"arena {4 * plan.scratch / 2**20:.2f} MB + {key[2]} x {4 * plan.scratch_size / 1024:.0f} kB of scratch, "
            f"weights {self._weights.nbytes / 2**20:.2f} MB",
            f"{'us':>7} {'GFLOP/s':>8} {'peak':>5} {'MFLOP':>7} {'kB':>7}  {'output':>14}  {'dtype':>8}  blocks "
            "(last layer)",
        ]
        for step in plan.steps:
            time = rate = share = ""
            if self._seconds is not None:
                seconds = self._seconds[step.last_row]
                speed = step.flops / max(seconds, 1e-9) / 1e9
                time, rate, share = f"{1e6 * seconds:.1f}", f"{speed:.1f}", f"{speed / peak:.0%}" if peak else ""
            output = "x".join(map(str, step.output))
            lines.append(
                f"{time:>7} {rate:>8} {share:>5} {step.flops / 1e6:>7.2f} {step.bytes / 1024:>7.0f}  {output:>14}  "
                f"{step.dtype:>8}  {step.kind} ({step.name})"
            )
        if self._seconds is not None:
            total = self._seconds.sum()
            speed = sum(s.flops for s in plan.steps) / max(total, 1e-9) / 1e9
            share = f", {speed / peak:.0%} of {peak:.1f}" if peak else ""
            lines.append(f"{1e6 * total:>7.1f} us in all, {speed:.1f} GFLOP/s{share}")
        return "\n".join(lines)


def build(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: str = "float32",
    threads: int | None = None,
    input: str = "float32_nchw",
    outputs: str = "softmax",
    *,
    order: str = "bgr",
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    top_k: int = 5000,
    keep_top_k: int = 750,
) -> Engine:
    """An engine for a model and an input size; called with another size, it plans and caches that too.

    The model is read, not modified, and as in evaluation mode: batch normalisations are folded with their running
    statistics, and later changes of the model do not reach the engine.

    Args:
        model: a network whose modules have ``ff_plan`` (docs/engine.md).
        input_shape: (B, 3, H, W), or (B, H, W, 3) for ``input="uint8_hwc"``; the batch size does not matter.
        dtype: ``"float32"``, or ``"bfloat16"``: maps and weights of convolutions, with float32 sums. Where the
            processor has neither AMX nor AVX512-BF16 such an engine computes in float32 (:attr:`Engine.computes`).
        threads: ``None`` follows ``torch.get_num_threads()`` at every call.
        input: ``"float32_nchw"``; ``"uint8_hwc"``: bytes from which the engine subtracts the mean; ``"both"``: each
            call may have either, told apart by the dtype.
        outputs: ``"softmax"`` (what the model returns in evaluation mode), ``"raw"`` (class logits) or
            ``"detections"`` (:class:`Faces`, decoded, filtered and suppressed).
        order: ``"bgr"`` or ``"rgb"``, the order of the bytes of an image.
        score_threshold: of detections: faces score more than this.
        nms_threshold: of detections: largest intersection over union of two faces.
        top_k: of detections: candidates that enter suppression, at most.
        keep_top_k: of detections: faces per image, at most.

    Raises:
        TypeError: a module has no ``ff_plan``; the message names it.
        ValueError: an argument is wrong, or the model has a layer that engines do not run.
        RuntimeError: the C++ kernels are not available.
    """
    return Engine(
        model,
        input_shape,
        dtype,
        threads,
        input,
        outputs,
        order,
        score_threshold,
        nms_threshold,
        top_k,
        keep_top_k,
    )
