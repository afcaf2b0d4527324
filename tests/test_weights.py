"""Weights that come with the package: manifest, sums, damage."""

import os

import pytest
import torch

import featherface
from featherface import weights
from featherface.errors import CheckpointError
from featherface.models import save_weights


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
