"""Weights that come with the package: manifest, sums, damage."""

import json
import os

import pytest
import torch
from layers import randomize

import featherface
from featherface import weights
from featherface.cli import main
from featherface.errors import CheckpointError, FeatherFaceError
from featherface.models import save_weights
from featherface.models.checkpoint import read_metadata
from featherface.training.averaging import average_weights


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "trained.safetensors"
    save_weights(featherface.create_model("featherface_v2"), path)
    return path


def test_added_weights_are_found_and_checked(saved, tmp_path):
    folder = tmp_path / "package"
    assert weights.available(folder) == {} and weights.find("featherface_v2", folder) is None
    path = weights.add("featherface_v2", saved, folder)
    assert weights.find("featherface_v2", folder) == path and path.read_bytes() == saved.read_bytes()
    assert weights.find("featherface_v1", folder) is None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="SHA-256"):
        weights.find("featherface_v2", folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        weights.find("featherface_v2", folder)
    (folder / weights.MANIFEST).write_text("[1]")
    with pytest.raises(CheckpointError, match="damaged"):
        weights.available(folder)


def test_only_fitting_weights_can_be_added(saved, tmp_path):
    with pytest.raises(CheckpointError, match="featherface_v2"):
        weights.add("featherface_v1", saved, tmp_path / "package")
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="safetensors"):
        weights.add("featherface_v2", tmp_path / "a.pth", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_shipped_weights_are_whole():
    assert set(weights.available()) == {"featherface_v2", "featherface_v2_ultra"}
    for name in weights.available():
        model = featherface.create_model(name, weights=weights.find(name))
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_pretrained_models_are_checked(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "package")
    with pytest.raises(CheckpointError, match="come with this package"):
        featherface.create_model("featherface_v2", pretrained=True)
    path = weights.add("featherface_v2", saved)
    loaded = featherface.create_model("featherface_v2", pretrained=True).state_dict()
    expected = featherface.create_model("featherface_v2", weights=saved).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    path.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="SHA-256"):
        featherface.create_model("featherface_v2", pretrained=True)


def test_the_average_of_weights(tmp_path):
    files = []
    for seed in range(3):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.safetensors")
        save_weights(randomize(featherface.create_model("featherface_v2_ultra")), files[-1])
    assert average_weights(files, tmp_path / "mean.safetensors", [1, 2, 5]) == "featherface_v2_ultra"
    *states, mean = (
        featherface.create_model("featherface_v2_ultra", weights=path).state_dict()
        for path in [*files, tmp_path / "mean.safetensors"]
    )
    for key, value in mean.items():
        expected = sum(share * state[key].double() for share, state in zip((0.125, 0.25, 0.625), states))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=key)
    parts = json.loads(read_metadata(tmp_path / "mean.safetensors")["average_of"])
    assert [(part["file"], part["share"]) for part in parts] == [
        ("0.safetensors", 0.125),
        ("1.safetensors", 0.25),
        ("2.safetensors", 0.625),
    ]


def test_averages_that_cannot_be(saved, tmp_path):
    other = tmp_path / "v1.safetensors"
    save_weights(featherface.create_model("featherface_v1"), other)
    with pytest.raises(CheckpointError, match="different models: featherface_v2, featherface_v1"):
        average_weights([saved, other], tmp_path / "mean.safetensors")
    for files, shares, message in (
        ([saved], None, "at least two"),
        ([saved, saved], [1.0], "each of 2 files"),
        ([saved, saved], [0.0, 0.0], "none negative"),
        ([saved, saved], [-1.0, 2.0], "none negative"),
        ([saved, saved], [float("nan"), 2.0], "none negative"),
    ):
        with pytest.raises(FeatherFaceError, match=message):
            average_weights(files, tmp_path / "mean.safetensors", shares)
    assert not (tmp_path / "mean.safetensors").exists()


def test_average_command(saved, tmp_path, capsys):
    arguments = [
        "average",
        str(saved),
        str(saved),
        "--share",
        "1",
        "--share",
        "3",
        "-o",
        str(tmp_path / "a.safetensors"),
    ]
    assert main(arguments) == 0
    assert "average of 2 weights files of featherface_v2" in capsys.readouterr().out
    first, second = (featherface.create_model("featherface_v2", weights=p).state_dict() for p in (saved, arguments[-1]))
    assert all(torch.equal(first[key], second[key]) for key in first)
