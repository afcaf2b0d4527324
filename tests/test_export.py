"""Exported files give what PyTorch gives, at any batch and size, and say what they are."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import featherface
from featherface import create_model, list_models
from featherface.cli import main
from featherface.errors import FeatherFaceError
from featherface.export import FORMATS, OUTPUTS, ExportError, check_parity, export, read_metadata
from featherface.models import save_weights

SHAPES = [(1, 64, 64), (3, 33, 200), (2, 161, 95)]


def model(name):
    torch.manual_seed(0)
    return create_model(name)


def load(path, format):
    """The exported file as a function, loaded as its users would."""
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == ["image"]
        assert [o.name for o in session.get_outputs()] == list(OUTPUTS)
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        assert [o.shape for o in session.get_outputs()] == [["batch", "anchors", n] for n in (4, 2, 10)]
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()})]
    if format == "torchscript":
        return torch.jit.load(path)
    return torch.export.load(path).module()


def check(name, format, folder):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    original = model(name)
    state = {key: value.clone() for key, value in original.state_dict().items()}
    path = folder / f"{name}{FORMATS[format]}"
    differences = export(original, path, format, {"weights_sha256": "0" * 64})
    assert set(differences) == set(OUTPUTS) and max(differences.values()) < 1e-4
    assert original.training
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items())
    run = load(path, format)
    original.eval()
    for batch, height, width in SHAPES:
        x = torch.rand(batch, 3, height, width) * 255 - 117
        with torch.no_grad():
            for a, b in zip(original(x), run(x)):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    facts = read_metadata(path)
    assert facts["model"] == name and facts["weights_sha256"] == "0" * 64
    assert facts["mean"] == [104, 117, 123] and facts["channel_order"] == "BGR"
    assert facts["anchors"]["sizes"] == [[16, 32], [64, 128], [256, 512]] and facts["anchors"]["steps"] == [8, 16, 32]
    content = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            content += [file.read(entry) for entry in file.namelist()]
    for folder in (Path(featherface.__file__).parent.parent, Path(torch.__file__).parent):
        assert not any(str(folder).encode() in part for part in content), f"{path} names {folder}"


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_student(format, tmp_path):
    check("featherface_v2", format, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", list_models())
def test_every_model(name, format, tmp_path):
    check(name, format, tmp_path)


def test_small_inputs_are_served_by_torchscript(tmp_path):
    original = model("featherface_v1").eval()
    export(original, tmp_path / "m.pt", "torchscript")
    run = load(tmp_path / "m.pt", "torchscript")
    for height, width in ((1, 1), (7, 40)):
        x = torch.rand(1, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(list(original(x)), list(run(x)))


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    other = model("featherface_v2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.eval()
    from featherface import export as module

    def wrong(path):
        return lambda x: other(x)

    monkeypatch.setitem(module._HANDLERS, "torchscript", (module._HANDLERS["torchscript"][0], wrong))
    path = tmp_path / "m.pt"
    with pytest.raises(ExportError, match="differs from the model"):
        export(model("featherface_v2"), path, "torchscript")
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"older")
    with pytest.raises(ExportError):
        export(model("featherface_v2"), path, "torchscript")
    assert path.read_bytes() == b"older"


def test_parity_notices_shapes_and_refusals():
    network = model("featherface_v2").eval()

    def refuses(x):
        raise RuntimeError("height must be 64")

    with pytest.raises(ExportError, match="refuses an input of 1x3x64x64: height must be 64"):
        check_parity(network, refuses, "test")
    with pytest.raises(ExportError, match="differs"):
        check_parity(network, lambda x: [y[:, :-1] for y in network(x)], "test")
    with pytest.raises(ExportError, match="differs"):
        check_parity(network, lambda x: [y * float("nan") for y in network(x)], "test")


def test_unknown_formats_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="no export format 'tflite'"):
        export(model("featherface_v2"), tmp_path / "x", "tflite")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FeatherFaceError, match=r'pip install "featherface\[export\]"'):
        export(model("featherface_v2"), tmp_path / "x.onnx", "onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FeatherFaceError, match="need onnx,"):
        export(model("featherface_v2"), tmp_path / "x.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_hold_no_metadata(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), tmp_path / "other.pt")
    (tmp_path / "text.pt2").write_text("no model")
    for name in ("other.pt", "text.pt2"):
        with pytest.raises(ExportError, match="holds no metadata"):
            read_metadata(tmp_path / name)


def test_command(capsys, tmp_path, monkeypatch):
    weights = tmp_path / "w.pth"
    save_weights(model("featherface_v2"), weights)
    output = tmp_path / "model.pt"
    assert main(["export", "-w", str(weights), "-f", "torchscript", "-o", str(output)]) == 0
    assert "featherface_v2 as torchscript" in capsys.readouterr().out
    assert read_metadata(output)["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.dumps(read_metadata(output))
    (tmp_path / "file").write_text("")
    assert main(["export", "-w", str(weights), "-o", str(tmp_path / "file" / "m.onnx")]) == 2
    assert "--output" in capsys.readouterr().err
    monkeypatch.setattr("featherface.detector.WEIGHTS", tmp_path / "none")
    assert main(["export"]) == 2
    assert "pass a weights file" in capsys.readouterr().err
