"""Inference engines against the float64 models."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import assert_no_worse
from torch import Tensor, nn

import featherface
from featherface import FaceDetector
from featherface.models.anchors import anchors
from featherface.models.ultra import INNOVATIONS
from ffkernels import cpu, engine
from ffkernels.ops import detect, preprocess

pytestmark = pytest.mark.skipif(engine.unavailable() is not None, reason=f"no engine: {engine.unavailable()}")

MODELS = featherface.list_models()
SIZES = [(1, 1), (2, 5), (33, 47), (97, 61)]
NAMES = ("bbox", "cls", "landmarks")


def randomised(name: str, seed: int = 0, **options: object) -> nn.Module:
    """A model with random statistics, signed batch normalisation weights, offsets and fusion weights."""
    torch.manual_seed(seed)
    model = featherface.create_model(name, **options)
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if key.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("fusion_weight"):
            tensor.data.uniform_(-0.2, 1.5)
        elif "offset_conv" in key or "modulator_conv" in key:
            tensor.data.normal_(0, 0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            module.weight.data.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.1, -1, 1))
            module.bias.data.normal_(0, 0.2)
    return model.eval()


def image(*size: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size)).float() - torch.tensor([104.0, 117.0, 123.0])[:, None, None]


@torch.inference_mode()
def check(model: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, ...]:
    """The engine's outputs, held to twice PyTorch's own error."""
    outputs = engine.build(model, x.shape, **options)(x)
    exact, baseline = copy.deepcopy(model).double()(x.double()), model(x)
    for name, actual, theirs, truth in zip(NAMES, outputs, baseline, exact):
        assert_no_worse(actual, theirs, truth, 2, f"{name} of {tuple(x.shape)}")
    return outputs


@pytest.fixture
def isa():
    """Loads the kernels of an instruction set, and those of before at the end."""
    before = cpu.loaded_isa()
    yield cpu.set_isa
    cpu.set_isa(before)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, size: tuple[int, int]):
    check(randomised(name), image(*size, batch=2), threads=2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", cpu.instruction_sets())
def test_instruction_sets(isa, level: str, name: str):
    isa(level)
    check(randomised(name, seed=1), image(70, 53), threads=2)


@pytest.mark.parametrize("innovation", [(), *[(i,) for i in INNOVATIONS]], ids=str)
def test_innovations(innovation: tuple[str, ...]):
    check(randomised("featherface_v2_ultra", innovations=innovation), image(65, 33))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_sizes(name: str):
    model = randomised(name, seed=2)
    for height, width in [*itertools.product((1, 2, 3, 7, 8, 9, 31, 32), repeat=2), (127, 131), (320, 320), (256, 511)]:
        check(model, image(height, width), threads=3)


@pytest.mark.slow
@pytest.mark.parametrize("level", cpu.instruction_sets())
def test_large(isa, level: str):
    """Large enough for the longest chains of blocks."""
    isa(level)
    check(randomised("featherface_v2", seed=3), image(640, 640), threads=2)


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_batch(batch: int):
    model = randomised("featherface_v2")
    built = engine.build(model, (1, 3, 40, 56))
    x = image(40, 56, batch=batch)
    outputs = built(x)
    assert [o.shape[0] for o in outputs] == [batch] * 3
    for i in range(batch):
        for whole, alone in zip(outputs, built(x[i : i + 1])):
            assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v2_ultra", "featherface_v1_ssh"])
def test_threads_do_not_change_results(name: str):
    model, x = randomised(name), image(203, 157)
    expected = engine.build(model, x.shape, threads=1)(x)
    for threads in (2, 3, 8):
        built = engine.build(model, x.shape, threads=threads)
        for _ in range(3):
            assert all(map(torch.equal, built(x), expected))


@pytest.mark.parametrize("name", MODELS)
def test_reads_nothing_that_it_did_not_write(name: str):
    x = image(75, 90)
    assert_reads_nothing_unwritten(engine.build(randomised(name), x.shape, threads=2), x)


def assert_reads_nothing_unwritten(built: engine.Engine, x: Tensor) -> None:
    expected = built(x)
    for poison in (float("nan"), float("inf"), -1e30):
        for planned in built._plans.values():
            for arena in planned.arenas:
                arena.fill(poison)
        assert all(map(torch.equal, built(x), expected))


@pytest.mark.parametrize("name", MODELS)
def test_nan(name: str):
    x = image(64, 64)
    x[0, 1, 30, 30] = float("nan")
    outputs = engine.build(randomised(name), x.shape)(x)
    with torch.inference_mode():
        expected = randomised(name)(x)
    for actual, theirs in zip(outputs, expected):
        assert torch.equal(actual.isnan(), theirs.isnan())


def test_raw_and_softmax():
    model, x = randomised("featherface_v2"), image(64, 48)
    raw, soft = (engine.build(model, x.shape, outputs=outputs)(x) for outputs in ("raw", "softmax"))
    torch.testing.assert_close(raw[1].softmax(-1), soft[1])
    assert torch.equal(raw[0], soft[0]) and torch.equal(raw[2], soft[2])


@pytest.mark.parametrize("size", [(64, 48), (33, 21), (1, 1)], ids=str)
def test_bytes(size: tuple[int, int]):
    model = randomised("featherface_v2")
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    x = pixels.permute(0, 3, 1, 2).float() - torch.tensor([104.0, 117.0, 123.0])[:, None, None]
    built = engine.build(model, pixels.shape, input="uint8_hwc")
    expected = engine.build(model, x.shape)(x)
    assert all(map(torch.equal, built(pixels), expected))
    assert torch.equal(built(pixels[0])[0], expected[0][:1])
    both = engine.build(model, x.shape, input="both")
    for image_or_bytes in (x, pixels):
        assert all(map(torch.equal, both(image_or_bytes), expected))


@pytest.mark.parametrize("level", cpu.instruction_sets())
@pytest.mark.parametrize("left", [0, 1, 6])
def test_bytes_on_a_canvas(isa, level: str, left: int):
    isa(level)
    model = randomised("featherface_v2")
    wide = torch.randint(0, 256, (2, 37, 80, 3), dtype=torch.uint8)
    built = engine.build(model, wide.shape, input="uint8_hwc", order="rgb")
    plain = engine.build(model, (1, 3, 64, 64))
    for pixels in (wide[:, :, 5:58], wide[:, ::2, :33], wide.flip(2), wide[:1, :, 1:2]):
        canvas, offset = (40, left + pixels.shape[2] + 3), (2, left)
        x = preprocess(pixels, canvas=canvas, offset=offset)
        assert all(map(torch.equal, built(pixels, canvas, offset), plain(x)))


@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v1_ssh"])
def test_detections(name: str):
    model, x = randomised(name), image(96, 80, batch=3)
    bbox, cls, landmarks = engine.build(model, x.shape)(x)
    scores = cls[..., 1]
    settings = {"score_threshold": float(scores.median()), "nms_threshold": 0.3, "top_k": 100, "keep_top_k": 20}
    found = engine.build(model, x.shape, outputs="detections", **settings)(x)
    assert len(found) == 3 and sum(len(faces.scores) for faces in found) > 0
    for i, faces in enumerate(found):
        expected = detect(bbox[i], scores[i], landmarks[i], anchors(96, 80), **settings)
        assert all(map(torch.equal, faces, expected))
    other = image(41, 57)
    assert engine.build(model, x.shape, outputs="detections", score_threshold=2)(other)[0].boxes.shape == (0, 4)
    assert engine.build(model, x.shape, outputs="detections")(x[:0]) == []


def test_layouts_of_the_input():
    model, x = randomised("featherface_v2"), image(50, 60)
    built = engine.build(model, x.shape)
    expected = built(x)
    wide = image(50, 120)
    for other in (x.contiguous(memory_format=torch.channels_last), wide.copy_(x.repeat_interleave(2, 3))[..., ::2]):
        assert all(map(torch.equal, built(other), expected))


def test_training_mode_is_ignored_and_the_model_untouched():
    model = randomised("featherface_v2_ultra").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = image(48, 48)
    outputs = engine.build(model, x.shape)(x)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(map(torch.equal, outputs, engine.build(model.eval(), x.shape)(x)))


def test_several_threads_and_engines():
    models = [randomised(name) for name in ("featherface_v2", "featherface_v1_ssh")]
    engines = [engine.build(model, (1, 3, 64, 64), threads=2) for model in models]
    inputs = [image(40 + 7 * i, 90 - 5 * i) for i in range(4)]
    expected = [[built(x) for x in inputs] for built in engines]

    def run(job: int) -> bool:
        e, i = job % 2, job // 2 % 4
        return all(map(torch.equal, engines[e](inputs[i]), expected[e][i]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(48)))


def test_plans_are_cached_and_bounded():
    built = engine.build(randomised("featherface_v2"), (1, 3, 32, 32))
    x = image(32, 32)
    built(x)
    first = next(iter(built._plans.values()))
    built(x)
    assert list(built._plans.values()) == [first]
    built.prepare((2, 3, 16, 48))
    assert len(built._plans) == 2
    built(image(16, 48))
    assert len(built._plans) == 2
    with pytest.raises(ValueError, match="input_shape"):
        built.prepare((3, 16))
    for width in range(33, 33 + 40):
        built(image(32, width))
    assert len(built._plans) <= 32


def test_plan_and_profile():
    built = engine.build(randomised("featherface_v2"), (1, 3, 64, 64), threads=2)
    text = built.plan()
    assert "separable" in text and "barriers" in text and "body.stage1" in text
    text = built.profile(image(64, 64), repeats=3)
    assert "us in all" in text and "%" not in text
    assert "% of 1.0" in built.profile(image(64, 64), repeats=3, peak=1.0)


def test_peak():
    assert 0.1 < engine.peak() < 1e4 and 0.1 < engine.peak(threads=2) < 1e4
    low = engine.peak("bfloat16")
    built = engine.build(randomised("featherface_v2"), (1, 3, 16, 16), dtype="bfloat16")
    assert (low is not None) == (built.computes == "bfloat16")
    assert low is None or 0.1 < low < 1e5


class Unplannable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_errors():
    model = randomised("featherface_v2")
    built = engine.build(model, (1, 3, 64, 64))
    with pytest.raises(TypeError, match=r"torch\.float32, got torch\.float64"):
        built(image(64, 64).double())
    with pytest.raises(TypeError, match="got ndarray"):
        built(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        built(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="no pixels"):
        built(torch.zeros(1, 3, 0, 8))
    with pytest.raises(ValueError, match="runs on the CPU"):
        built(torch.zeros(1, 3, 8, 8, device="meta"))
    with pytest.raises(ValueError, match="input_shape"):
        engine.build(model, (1, 3, 0, 8))
    for option in (
        {"dtype": "int8"},
        {"input": "jpeg"},
        {"outputs": "faces"},
        {"threads": 0},
        {"order": "rgb"},
        {"nms_threshold": 2},
        {"top_k": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            engine.build(model, (1, 3, 8, 8), **option)
    with pytest.raises(ValueError, match="canvas"):
        built(image(64, 64), (96, 96))
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not fit"):
        engine.build(model, pixels.shape, input="uint8_hwc")(pixels, (8, 9), (1, 0))
    model.ssh2 = Unplannable()
    with pytest.raises(TypeError, match="cannot plan ssh2"):
        engine.build(model, (1, 3, 64, 64))


def test_other_instruction_set_loaded(isa):
    if len(cpu.instruction_sets()) < 2:
        pytest.skip("one instruction set only")
    *others, last = cpu.instruction_sets()
    isa(last)
    built = engine.build(randomised("featherface_v2"), (1, 3, 16, 16))
    for other in others:
        isa(other)
        with pytest.raises(RuntimeError, match="build it again"):
            built(image(16, 16))


def test_detector_runs_in_an_engine(teacher_weights, data_dir, monkeypatch):
    monkeypatch.delenv("FF_USE_FUSED", raising=False)
    photo = data_dir / "faces" / "demo" / "images" / "ageitgey+face_recognition" / "two_people.jpg"
    detector = FaceDetector(teacher_weights, device="cpu", size=320)
    plain = FaceDetector(teacher_weights, device="cpu", size=320, fused=False)
    assert detector.engine is not None and detector.engine_reason is None
    assert plain.engine is None and "plain PyTorch" in plain.engine_reason
    faces, expected = detector.detect(photo), plain.detect(photo)
    assert len(faces) == len(expected) > 0
    np.testing.assert_allclose(faces.boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose(faces.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(faces.landmarks, expected.landmarks, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"pad": 0.1}, {"tile": 160}, {"size": 200}], ids=str)
def test_detector_reads_bytes(options: dict[str, object]):
    detector = FaceDetector(model=randomised("featherface_v2"), device="cpu", fused=True, **options)
    photo = np.random.default_rng(0).integers(0, 256, (190, 251, 3), np.uint8)
    images = [photo, photo[:, ::-1], photo[3:187, 7:]]
    scores = detector.engine(preprocess(torch.from_numpy(photo)))[1][..., 1]
    detector.score_threshold = float(scores.median())
    found = detector.detect(images)
    assert ("preprocess" in detector.stage_backends(photo)) == bool({"size", "tile"} & set(options))
    assert "preprocess" in detector.stage_backends(photo.astype(np.float32))
    expected = detector.detect([pixels.astype(np.float32) for pixels in images])
    assert sum(map(len, expected)) > 0
    for faces, others in zip(found, expected):
        for column in ("boxes", "scores", "landmarks"):
            np.testing.assert_array_equal(getattr(faces, column), getattr(others, column))


def test_detector_of_a_given_module(monkeypatch):
    monkeypatch.delenv("FF_USE_FUSED", raising=False)
    model = randomised("featherface_v2")
    assert FaceDetector(model=model, device="cpu").engine is None
    assert FaceDetector(model=model, device="cpu", fused=True).engine is not None
    monkeypatch.setenv("FF_USE_FUSED", "0")
    assert FaceDetector(model=model, device="cpu").engine is None
