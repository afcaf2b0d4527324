"""How fast the models and the stages of detection are, beside the runtimes that users would choose instead.

All contenders get the same weights and the same random input, and must give the same outputs before they are timed.
They take turns, round after round, so that whatever else the machine does hits all of them alike. Before each turn the
threads of the contender before, which spin for a while, are given time to fall asleep: they would take processors from
the next. Then it runs twice and the second run counts, because the first finds the caches of the one before. Reported
are the median and the 10th and 90th percentile of the rounds.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import importlib
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffkernels import Policy, ops, set_fused
from ffkernels.info import info

from .errors import FeatherFaceError
from .models.anchors import anchors

TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
"""Largest difference from PyTorch eager, relative to the output's largest magnitude, of a float32 contender. On a GPU
PyTorch itself rounds the factors of its convolutions to TF32."""

LOW_PRECISION_TOLERANCE = 0.1
"""The same for contenders that compute in 16 bits."""

WARM_UP, MIN_ROUNDS = 3, 5
PAUSE_SECONDS = 0.02
CONVERSION_SECONDS = 120
PACKAGES = ("torch", "onnxruntime", "openvino", "ncnn", "pnnx", "triton", "numpy", "pillow")

Outputs = Sequence[Tensor]
Run = Callable[[], Outputs]


class Unavailable(Exception):
    """Why a contender does not run."""


@dataclass
class Timing:
    """Milliseconds of one contender in one case; ``difference`` is its largest one from PyTorch eager, relative."""

    case: str
    contender: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    difference: float | None = None


@dataclass
class Missing:
    """A contender that was not timed in a case, and why."""

    case: str
    contender: str
    reason: str


@dataclass
class Results:
    """What was measured and how."""

    protocol: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ``date``, ``commit``, ``machine``, ``versions``, ``kernels``, ``protocol``,
        ``timings`` and ``missing``."""
        environment = info()
        machine = {key: environment.pop(key) for key in ("processor", "platform", "gpus")}
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": environment.pop("git_revision"),
            "machine": machine,
            "versions": {**environment.pop("versions"), **_versions()},
            "kernels": environment,
            "protocol": self.protocol,
            "timings": [asdict(timing) for timing in self.timings],
            "missing": [asdict(missing) for missing in self.missing],
        }


class Setup:
    """A model, where it runs, and what contenders share."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", threads: int | None = None) -> None:
        self.device = torch.device(device)
        self.model = set_fused(copy.deepcopy(model), False).to(self.device).eval()
        self.name = getattr(model, "name", None) or type(model).__name__
        self.threads = threads or torch.get_num_threads()

    def input(self, batch: int, size: int) -> Tensor:
        """(batch, 3, size, size) random input of the range of a real one."""
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(batch, 3, size, size, generator=generator) * 255 - 117).to(self.device)

    @functools.cached_property
    def onnx(self) -> bytes:
        """The model as an ONNX file."""
        from .export import export

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                export(self.model, path, "onnx")
            except FeatherFaceError as error:
                raise Unavailable(str(error)) from error
            return path.read_bytes()


def contenders(device: str | torch.device = "cpu") -> dict[str, Callable[[Setup, Tensor], Run]]:
    """Ways to run a model on a device: name -> ``make(setup, x)``, which returns the function that is timed.

    ``make`` raises :class:`Unavailable`, or whatever the runtime raises, where it cannot run the model.
    """
    table = {"eager": _eager, "channels_last": _channels_last, "fused": _fused, "torch.compile": _compiled}
    if torch.device(device).type == "cpu":
        table |= {
            "torch.compile frozen": _frozen,
            "engine": _engine,
            "engine bf16": _engine_bf16,
            "onnxruntime": _onnxruntime,
            "openvino": _openvino,
            "openvino bf16": _openvino_bf16,
            "ncnn": _ncnn,
        }
    return table


def prepare(name: str, setup: Setup, x: Tensor) -> tuple[Run, float]:
    """A contender ready to run, and its largest difference from PyTorch eager, relative to the largest value.

    Raises:
        Unavailable: it cannot run the model here, or its outputs are others.
    """
    try:
        run = contenders(x.device)[name](setup, x)
        found = [torch.as_tensor(y).detach().float().cpu() for y in run()]
    except Unavailable:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unavailable(f"fails: {reason[:200]}") from error
    expected = [y.detach().float().cpu() for y in setup.model(x)]
    difference = max(_difference(a, b) for a, b in zip(expected, found))
    if not difference <= (LOW_PRECISION_TOLERANCE if "16" in name else TOLERANCE[x.device.type]):
        raise Unavailable(f"its outputs differ from PyTorch's by {difference:.1e} of the largest value")
    return run, difference


def benchmark_model(
    model: nn.Module,
    sizes: Sequence[int] = (320, 640),
    batches: Sequence[int] = (1, 8),
    names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    seconds: float = 10.0,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Results:
    """Time a whole model, input tensor in, predictions out, with every contender.

    Args:
        model: a model; it is not changed.
        sizes: sides of the square inputs.
        batches: batch sizes.
        names: of :func:`contenders`; default: all.
        device: where to run.
        seconds: time for the rounds of one case.
        threads: CPU threads of every contender; default: torch's.
        progress: called with what is being done.

    Raises:
        FeatherFaceError: a name is unknown.
    """
    known = contenders(device)
    names = list(names or known)
    if unknown := [name for name in names if name not in known]:
        raise FeatherFaceError(f"there is no contender {unknown[0]!r} on {device}; choose from: {', '.join(known)}")
    setup = Setup(model, device, threads)
    results = Results(_protocol(setup, seconds))
    with _threads(setup.threads), torch.no_grad():
        for size in sizes:
            for batch in batches:
                case = f"{batch}x3x{size}x{size}"
                x = setup.input(batch, size)
                runs: dict[str, Run] = {}
                differences: dict[str, float] = {}
                for name in names:
                    progress(f"{case}: preparing {name}")
                    try:
                        runs[name], differences[name] = prepare(name, setup, x)
                    except Unavailable as error:
                        results.missing.append(Missing(case, name, str(error)))
                progress(f"{case}: timing")
                for timing in interleave(case, runs, seconds, setup.device):
                    timing.difference = differences[timing.contender]
                    results.timings.append(timing)
    return results


def crowd(faces: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw predictions for a 640 x 640 image (16,800 anchors) with ``faces`` faces on a grid.

    Four in ten anchors of 16 or 32 pixels near a face predict it, with some error, and score more than 0.5: about eight
    candidates per face.

    Returns:
        bbox (16800, 4), scores (16800,), landmarks (16800, 10), priors (16800, 4), as :func:`ffkernels.detect` takes
        them.
    """
    generator = torch.Generator().manual_seed(seed)
    priors = anchors(640, 640)
    columns = round((4 / 3 * faces) ** 0.5)
    rows = -(-faces // columns)
    number = torch.arange(faces)
    centre = torch.stack(((number % columns + 0.5) / columns, (number // columns + 0.5) / rows), dim=1)
    distance, nearest = torch.cdist(priors[:, :2], centre).min(dim=1)
    near = (distance < 14 / 640) & (priors[:, 2] < 40 / 640) & (torch.rand(len(priors), generator=generator) < 0.4)
    offset = (centre[nearest] - priors[:, :2]) / priors[:, 2:] / 0.1
    scale = torch.log(24 / 640 / priors[:, 2:]) / 0.2
    bbox = torch.cat((offset, scale), dim=1) + 0.2 * torch.randn(len(priors), 4, generator=generator)
    scores = torch.rand(len(priors), generator=generator)
    landmarks = torch.randn(len(priors), 10, generator=generator)
    return bbox, torch.where(near, 0.5 + 0.5 * scores, 0.4 * scores), landmarks, priors


def stages(setup: Setup) -> dict[str, dict[str, Callable[[], Any]]]:
    """What happens around the network: case -> {"PyTorch": run, "default": run, if that differs}.

    ``preprocess``: a 1280 x 720 image to a 640 x 384 input. ``faces``: decoding, filter, top-k and suppression of
    16,800 anchors with 300 faces (:func:`crowd`). ``image in, faces out``: the whole detector on that image.
    """
    from .detector import FaceDetector

    image = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).to(setup.device)
    predictions = [t.to(setup.device) for t in crowd()]
    device = str(setup.device)
    plain = FaceDetector(None, copy.deepcopy(setup.model), device, size=640, fused=False, threads=setup.threads)
    # With a weights file, kernels and the engine are the default; a module has to ask for them.
    default = FaceDetector(None, copy.deepcopy(setup.model), device, size=640, fused=True, threads=setup.threads)
    cases: dict[str, dict[str, Callable[[], Any]]] = {"preprocess": {}, "faces": {}, "image in, faces out": {}}
    for name, detector in (("PyTorch", plain), ("default", default)):
        policy = detector.policy
        cases["preprocess"][name] = functools.partial(ops.preprocess, pixels, (360, 640), (384, 640), policy=policy)
        cases["faces"][name] = functools.partial(ops.detect, *predictions, policy=policy)
        cases["image in, faces out"][name] = functools.partial(detector.detect, image)
    return cases


def benchmark_stages(
    model: nn.Module, device: str | torch.device = "cpu", seconds: float = 5.0, threads: int | None = None
) -> Results:
    """Time :func:`stages`, each for ``seconds``. Arguments as for :func:`benchmark_model`."""
    setup = Setup(model, device, threads)
    results = Results(_protocol(setup, seconds))
    with _threads(setup.threads), torch.no_grad():
        for case, runs in stages(setup).items():
            results.timings += interleave(case, runs, seconds, setup.device)
    return results


def interleave(
    case: str, runs: dict[str, Callable[[], Any]], seconds: float, device: str | torch.device = "cpu"
) -> list[Timing]:
    """Time functions in turn for ``seconds``, at least :data:`MIN_ROUNDS` rounds; of two calls the second counts."""
    cuda = torch.device(device).type == "cuda"
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, start = 0, time.perf_counter()
    while runs and (rounds < MIN_ROUNDS or time.perf_counter() - start < seconds):
        rounds += 1
        for name, run in runs.items():
            if len(runs) > 1:
                time.sleep(PAUSE_SECONDS)
            run()
            if cuda:
                torch.cuda.synchronize(device)
            before = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - before))
    timings = []
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        timings.append(Timing(case, name, statistics.median(values), deciles[0], deciles[-1], rounds))
    return timings


def _eager(setup: Setup, x: Tensor) -> Run:
    return lambda: setup.model(x)


def _channels_last(setup: Setup, x: Tensor) -> Run:
    model = copy.deepcopy(setup.model).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


def _fused(setup: Setup, x: Tensor) -> Run:
    model = set_fused(copy.deepcopy(setup.model).to(memory_format=torch.channels_last), Policy("1"))
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


def _compiled(setup: Setup, x: Tensor) -> Run:
    model = torch.compile(copy.deepcopy(setup.model).to(memory_format=torch.channels_last), dynamic=False)
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


def _frozen(setup: Setup, x: Tensor) -> Run:
    """torch.compile with the weights as constants."""
    from torch._inductor import config

    run = _compiled(setup, x)
    with config.patch(freezing=True):
        run()
    return run


def _engine(setup: Setup, x: Tensor, dtype: str = "float32") -> Run:
    try:
        engine = importlib.import_module("ffkernels.engine")
    except ImportError:
        raise Unavailable("this version of ffkernels has none") from None
    built = engine.build(setup.model, tuple(x.shape), dtype, threads=setup.threads, outputs="softmax")
    if built.computes != dtype:
        raise Unavailable("this processor multiplies no bfloat16")
    return lambda: built(x)


def _engine_bf16(setup: Setup, x: Tensor) -> Run:
    return _engine(setup, x, "bfloat16")


def _onnxruntime(setup: Setup, x: Tensor) -> Run:
    runtime = _optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    session = runtime.InferenceSession(setup.onnx, options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: [torch.from_numpy(y) for y in session.run(None, {"image": array})]


def _openvino(setup: Setup, x: Tensor, precision: str = "f32") -> Run:
    core = _optional("openvino").Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this processor has no bfloat16 arithmetic")
    network = core.read_model(setup.onnx)
    network.reshape({"image": list(x.shape)})
    options = {
        "INFERENCE_NUM_THREADS": setup.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(network, "CPU", options).create_infer_request()
    array = x.numpy()

    def run() -> Outputs:
        outputs = request.infer({"image": array}, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(outputs[i]) for i in range(3)]

    return run


def _openvino_bf16(setup: Setup, x: Tensor) -> Run:
    return _openvino(setup, x, "bf16")


def _ncnn(setup: Setup, x: Tensor) -> Run:
    ncnn, pnnx = _optional("ncnn"), _optional("pnnx")
    if x.shape[0] != 1:
        raise Unavailable("ncnn has no batches")
    from .export import trace

    net = ncnn.Net()
    net.opt.num_threads = setup.threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    with tempfile.TemporaryDirectory() as folder:
        torch.jit.save(trace(setup.model, x), f"{folder}/model.pt")
        shape = ",".join(map(str, x.shape))
        command = [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]f32"]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=CONVERSION_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"pnnx needs more than {CONVERSION_SECONDS} s to convert the model") from None
        if net.load_param(f"{folder}/model.ncnn.param") or net.load_model(f"{folder}/model.ncnn.bin"):
            raise Unavailable("ncnn lacks a layer of the model")
    array = np.ascontiguousarray(x[0].numpy())

    def run() -> Outputs:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(array))
        return [torch.from_numpy(np.array(extractor.extract(f"out{i}")[1]))[None] for i in range(3)]

    return run


def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise Unavailable(f'{package} is not installed (pip install "featherface[bench]")') from None


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max())


def _protocol(setup: Setup, seconds: float) -> dict[str, Any]:
    return {
        "model": setup.name,
        "device": str(setup.device),
        "threads": setup.threads,
        "rounds": f"contenders in turn, a pause of {1000 * PAUSE_SECONDS:.0f} ms and two runs each of which the second "
        f"counts, for {seconds:g} s and at least {MIN_ROUNDS} rounds per case",
        "warm_up": WARM_UP,
        "statistic": "median, 10th and 90th percentile of the rounds, milliseconds",
        "equality": f"outputs within {TOLERANCE[setup.device.type]:g} ({LOW_PRECISION_TOLERANCE:g} in 16 bits) "
        "of PyTorch eager's largest",
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"python": platform.python_version(), **found}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
