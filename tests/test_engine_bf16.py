"""Inference engines in bfloat16 against the float64 models, PyTorch's autocast and the float32 engine."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import assert_no_worse
from test_engine import MODELS, NAMES, assert_reads_nothing_unwritten, image, randomised
from torch import Tensor, nn

import ffkernels.engine.engine
from featherface import FaceDetector
from featherface.errors import FeatherFaceError
from featherface.evaluation.average_precision import match
from featherface.models.bifpn import BiFPNNode
from ffkernels import cpu, engine
from ffkernels.engine.bf16 import rounded
from ffkernels.engine.graph import Value
from ffkernels.ops import preprocess

pytestmark = pytest.mark.skipif(engine.unavailable() is not None, reason=f"no engine: {engine.unavailable()}")

LEVELS = cpu.instruction_sets()


@pytest.fixture
def computed(monkeypatch):
    """Makes engines compute in bfloat16 everywhere, on emulated tiles where the instruction set multiplies none."""
    before = cpu.loaded_isa()
    monkeypatch.setattr(ffkernels.engine.engine, "computed_dtype", lambda dtype: dtype)
    yield cpu.set_isa
    cpu.set_isa(before)


def build(model: nn.Module, x: Tensor, **options: object) -> engine.Engine:
    return engine.build(model, x.shape, dtype="bfloat16", **options)


@torch.inference_mode()
def check(model: nn.Module, x: Tensor, **options: object) -> None:
    """The engine's outputs, held to twice the error of PyTorch's autocast."""
    outputs, exact = build(model, x, **options)(x), copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        baseline = model(x)
    for name, actual, theirs, truth in zip(NAMES, outputs, baseline, exact):
        assert_no_worse(actual, theirs, truth, 2, f"{name} of {tuple(x.shape)}")


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (33, 47), (97, 61)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(computed, name: str, size: tuple[int, int]):
    check(randomised(name), image(*size, batch=2), threads=2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets(computed, level: str, name: str):
    computed(level)
    check(randomised(name, seed=1), image(40, 53), threads=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_sizes(computed, name: str):
    model = randomised(name, seed=2)
    for height, width in [*itertools.product((1, 2, 3, 7, 8, 9, 31, 32), repeat=2), (127, 131), (320, 320), (256, 511)]:
        check(model, image(height, width), threads=3)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_large(computed, level: str):
    """Large enough for the longest chains of blocks."""
    computed(level)
    check(randomised("featherface_v2", seed=3), image(640, 640), threads=2)


def test_what_is_computed():
    """Where the processor multiplies no bfloat16, float32 takes its place."""
    model, x = randomised("featherface_v2"), image(64, 48)
    low, full = build(model, x), engine.build(model, x.shape)
    assert (low.dtype, full.dtype, full.computes) == ("bfloat16", "float32", "float32")
    assert low.computes == ("bfloat16" if cpu.loaded_isa() in ("amx", "avx512_bf16") else "float32")
    before = cpu.loaded_isa()
    cpu.set_isa("generic")
    try:
        low, full = build(model, x), engine.build(model, x.shape)
        assert low.computes == "float32"
        assert all(map(torch.equal, low(x), full(x)))
    finally:
        cpu.set_isa(before)


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_batch(computed, batch: int):
    model, x = randomised("featherface_v2"), image(40, 56, batch=batch)
    built = build(model, x)
    outputs = built(x)
    assert [o.shape[0] for o in outputs] == [batch] * 3
    for i in range(batch):
        for whole, alone in zip(outputs, built(x[i : i + 1])):
            assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v2_ultra", "featherface_v1_ssh"])
def test_threads_do_not_change_results(computed, name: str):
    model, x = randomised(name), image(203, 157)
    expected = build(model, x, threads=1)(x)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, build(model, x, threads=threads)(x), expected))


@pytest.mark.parametrize("name", MODELS)
def test_reads_nothing_that_it_did_not_write(computed, name: str):
    x = image(75, 90)
    assert_reads_nothing_unwritten(build(randomised(name), x, threads=2), x)


@pytest.mark.parametrize("name", MODELS)
def test_nan(computed, name: str):
    x = image(64, 64)
    x[0, 1, 30, 30] = float("nan")
    outputs = build(randomised(name), x)(x)
    with torch.inference_mode():
        expected = randomised(name)(x)
    for actual, theirs in zip(outputs, expected):
        assert torch.equal(actual.isnan(), theirs.isnan())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("left", [0, 1, 6])
def test_bytes(computed, level: str, left: int):
    """Bytes minus the mean are whole numbers below 256, which bfloat16 holds."""
    computed(level)
    model = randomised("featherface_v2")
    wide = torch.randint(0, 256, (2, 37, 80, 3), dtype=torch.uint8)
    plain = build(model, image(64, 64))
    for order in ("rgb", "bgr"):
        built = build(model, wide, input="uint8_hwc", order=order)
        for pixels in (wide[:, :, 5:58], wide[:, ::2, :33], wide.flip(2), wide[:1, :, 1:2]):
            canvas, offset = (40, left + pixels.shape[2] + 3), (2, left)
            x = preprocess(pixels if order == "rgb" else pixels.flip(3), canvas=canvas, offset=offset)
            assert all(map(torch.equal, built(pixels, canvas, offset), plain(x)))


def test_raw_and_detections(computed):
    model, x = randomised("featherface_v2"), image(96, 80, batch=3)
    raw, soft = (build(model, x, outputs=outputs)(x) for outputs in ("raw", "softmax"))
    torch.testing.assert_close(raw[1].softmax(-1), soft[1])
    assert torch.equal(raw[0], soft[0]) and torch.equal(raw[2], soft[2])
    found = build(model, x, outputs="detections", score_threshold=float(soft[1][..., 1].median()))(x)
    assert len(found) == 3 and sum(len(faces.scores) for faces in found) > 0


def test_plan_and_profile(computed):
    x = image(64, 64)
    built = build(randomised("featherface_v1_ssh"), x, threads=2)
    assert "bfloat16" in built.plan() and "deform" in built.plan()
    steps = {line.split("  ")[-1].split()[0]: line for line in built.profile(x, repeats=3).splitlines()[2:-1]}
    assert "bfloat16" in steps["stem"] and "float32" in steps["deform"]


class Narrow(nn.Module):
    """A pyramid of too few channels for bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.node = BiFPNNode(16, ["none"], 1)

    def ff_plan(self, builder: engine.Builder, x: Value) -> None:
        builder.module(self.node, builder.conv(x, self.stem))


def test_few_channels(computed):
    with pytest.raises(ValueError, match="fewer than 17 channels"):
        build(Narrow(), image(8, 8))


def test_rounding():
    """The planner rounds weights as PyTorch does."""
    values = torch.randn(1000, dtype=torch.float32) * torch.logspace(-30, 30, 1000)
    ties = (torch.arange(1, 200) * 2**15 + 2**30).int().view(torch.float32)
    for x in (values, ties):
        assert torch.equal(torch.from_numpy(rounded(x.numpy()).view("int16")), x.bfloat16().view(torch.int16))


def test_detector(teacher_weights, data_dir, monkeypatch):
    monkeypatch.delenv("FF_USE_FUSED", raising=False)
    photo = data_dir / "faces" / "demo" / "images" / "ageitgey+face_recognition" / "two_people.jpg"
    low = FaceDetector(teacher_weights, device="cpu", size=320, dtype="bfloat16")
    assert low.engine.dtype == "bfloat16"
    assert len(low.detect(photo)) == len(FaceDetector(teacher_weights, device="cpu", size=320).detect(photo)) > 0
    with pytest.raises(FeatherFaceError, match=r"bfloat16 needs the CPU engine.*plain PyTorch"):
        FaceDetector(teacher_weights, device="cpu", fused=False, dtype="bfloat16")
    with pytest.raises(FeatherFaceError, match="one of: float32, bfloat16"):
        FaceDetector(teacher_weights, dtype="half")


@pytest.mark.slow
def test_detections_on_photographs(data_dir):
    """Fewer than 1 % of the faces in photographs are found by one of both only."""
    full, low = (FaceDetector("featherface_v2", device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    photos = sorted((data_dir / "faces" / "wider_val_bench" / "images").rglob("*.jpg"))
    alone = total = 0
    for photo in photos:
        boxes, others = (detector.detect(photo).boxes for detector in (full, low))
        total += len(boxes)
        alone += len(boxes) + len(others) - 2 * int((match(others, boxes, 0.5) >= 0).sum())
    assert total > 500
    assert alone < 0.01 * total, f"{alone} of {total}"
