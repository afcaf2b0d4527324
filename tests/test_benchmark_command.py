"""``featherface benchmark``: contenders give the same outputs, results say where and how, what is missing says why."""

import json
import sys

import pytest
import torch

from featherface import create_model
from featherface.benchmark import (
    MIN_ROUNDS,
    Setup,
    Unavailable,
    benchmark_model,
    benchmark_stages,
    contenders,
    crowd,
    interleave,
    prepare,
)
from featherface.cli import main
from featherface.errors import FeatherFaceError
from ffkernels import detect

FAST = ("eager", "channels_last", "fused")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("featherface_v2")


def test_results_are_complete(model):
    training, seen = model.training, []
    results = benchmark_model(model, (64,), (1, 2), FAST, seconds=0, threads=1, progress=seen.append)
    assert model.training == training
    assert [(t.case, t.contender) for t in results.timings] == [
        (f"{batch}x3x64x64", name) for batch in (1, 2) for name in FAST
    ]
    for timing in results.timings:
        assert 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms and timing.rounds == MIN_ROUNDS
        assert timing.difference < 1e-3
    assert any("timing" in text for text in seen)
    document = json.loads(json.dumps(results.to_dict()))
    assert set(document) == {
        "date", "commit", "machine", "versions", "kernels", "protocol", "timings", "missing",
    }  # fmt: skip
    assert document["versions"]["torch"] == torch.__version__ and document["protocol"]["threads"] == 1
    assert document["protocol"]["model"] == "featherface_v2" and document["machine"]["processor"]


def test_what_is_missing_says_why(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "ncnn", None)
    results = benchmark_model(model, (32,), (1,), ("eager", "openvino", "ncnn"), seconds=0)
    assert [t.contender for t in results.timings] == ["eager"]
    assert [(m.contender, 'pip install "featherface[bench]"' in m.reason) for m in results.missing] == [
        ("openvino", True),
        ("ncnn", True),
    ]
    with pytest.raises(FeatherFaceError, match="no contender 'abacus'"):
        benchmark_model(model, (32,), (1,), ("abacus",))


def test_other_outputs_are_not_timed(model, monkeypatch):
    def cheat(setup, x):
        return lambda: [torch.zeros_like(y) for y in setup.model(x)]

    def fail(setup, x):
        raise RuntimeError("no such layer")

    monkeypatch.setattr("featherface.benchmark.contenders", lambda device: {"cheat": cheat, "fail": fail})
    results = benchmark_model(model, (32,), (1,), seconds=0)
    assert not results.timings
    assert "outputs differ" in results.missing[0].reason and results.missing[1].reason == "fails: no such layer"


def test_functions_take_turns():
    calls = []
    timings = interleave("case", {name: (lambda name=name: calls.append(name)) for name in "ab"}, seconds=0)
    rounds = "aabb" * MIN_ROUNDS
    assert "".join(calls).endswith(rounds)
    assert [(t.case, t.contender, t.rounds) for t in timings] == [("case", "a", MIN_ROUNDS), ("case", "b", MIN_ROUNDS)]
    assert interleave("case", {}, seconds=1) == []


def test_crowd_leaves_its_faces():
    for faces in (1, 50, 300):
        predictions = crowd(faces)
        assert predictions[0].shape == (16800, 4)
        assert len(detect(*predictions)[1]) == faces


def test_stages_are_timed(model):
    results = benchmark_stages(model, seconds=0, threads=1)
    assert [(t.case, t.contender) for t in results.timings] == [
        (case, name) for case in ("preprocess", "faces", "image in, faces out") for name in ("PyTorch", "default")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torch.compile", "torch.compile frozen", "engine", "onnxruntime", "openvino", "openvino bf16", "ncnn"]
)
def test_every_contender_gives_the_same(model, name):

    setup = Setup(model, threads=1)
    with torch.no_grad():
        for batch in (1, 2):
            try:
                run, difference = prepare(name, setup, setup.input(batch, 64))
            except Unavailable as error:
                if name == "ncnn" and batch == 2:
                    assert "no batches" in str(error)
                    continue
                pytest.skip(str(error))
            assert difference < (0.1 if "16" in name else 1e-3)
            assert [y.shape[0] for y in run()] == [batch] * 3
    assert name in contenders()


def test_command(capsys, tmp_path):
    line = "benchmark --size 32 --batch 1 --seconds 0 --only eager --only channels_last -d cpu --threads 1"
    arguments = line.split()
    file = tmp_path / "b.json"
    assert main([*arguments, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "1x3x32x32" in out and "channels_last" in out and "image in, faces out" in out
    document = json.loads(file.read_text())
    assert len(document["timings"]) == 2 and len(document["stages"]) == 6 and document["date"]
    assert main([*arguments, "--no-stages", "--json", "-"]) == 0
    assert "stages" not in json.loads(capsys.readouterr().out)
    assert main([*arguments, "--only", "abacus"]) == 2
    assert "no contender 'abacus'" in capsys.readouterr().err
    assert main([*arguments, "--json", str(tmp_path / "b.json" / "c.json")]) == 2
