import json
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
from layers import randomize

from featherface import create_model, list_models, weights
from featherface.errors import CheckpointError
from featherface.models import load_weights, save_weights, transfer_weights
from featherface.models.checkpoint import load_backbone, read_metadata, read_tensors, shared_names
from featherface.models.registry import identify
from featherface.models.ultra import INNOVATIONS


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture
def v2():
    return randomize(create_model("featherface_v2"))


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("name", list_models())
def test_round_trip(name, suffix, tmp_path):
    model = randomize(create_model(name))
    path = tmp_path / f"weights{suffix}"
    save_weights(model, path)
    assert same(create_model(name, weights=path), model)
    assert same(create_model(name, weights=str(path)), model)
    assert os.listdir(tmp_path) == [path.name]


def test_shared_tensors_are_stored_once(tmp_path):
    model = randomize(create_model("featherface_v2_ultra"))
    path = tmp_path / "ultra.safetensors"
    save_weights(model, path, {"epoch": "3"})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "epoch": "3",
            "model": "featherface_v2_ultra",
            "options": json.dumps({"innovations": list(INNOVATIONS)}),
        }
        names = list(file.keys())
    assert len(names) == len(shared_names(model)) < len(model.state_dict())
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    assert sum(t.numel() for t in safetensors.torch.load_file(path).values()) == parameters + buffers


def test_options_are_noted_and_followed(tmp_path):
    path = tmp_path / "ultra.safetensors"
    model = create_model("featherface_v2_ultra", innovations=("reuse", "progressive"))
    save_weights(model, path)
    assert identify(read_tensors(path)) == "featherface_v2_ultra"
    assert create_model("featherface_v2_ultra", weights=path).innovations == ("reuse", "progressive")
    other = create_model("featherface_v2_ultra", weights=path, innovations=("multiscale",))
    assert other.innovations == ("multiscale",) and same(other, model)
    with pytest.raises(CheckpointError, match=r"it lacks dynamic_gate.weight, dynamic_gate.bias"):
        create_model("featherface_v2_ultra", weights=path, innovations=("dynamic",))
    with pytest.raises(CheckpointError, match=r"only a .safetensors file tells the model's options"):
        save_weights(model, tmp_path / "ultra.pth")


def test_the_same_weights_make_the_same_bytes(v2, tmp_path):
    notes = {f"note {i}": f"{i}, \u00e9" for i in range(20)}
    save_weights(v2, tmp_path / "a.safetensors", notes)
    save_weights(v2, tmp_path / "b.safetensors", dict(reversed(notes.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert read_metadata(tmp_path / "a.safetensors").items() >= notes.items()


def test_v2_has_no_shared_tensors(v2, tmp_path):
    assert all(len(names) == 1 for names in shared_names(v2))
    safetensors.torch.save_file(v2.state_dict(), tmp_path / "plain.safetensors")
    assert same(create_model("featherface_v2", weights=tmp_path / "plain.safetensors"), v2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {**state, "total_ops": torch.zeros(1), "body.stage1.total_params": torch.zeros(1)},
        lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    ],
    ids=["state_dict", "model", "DataParallel", "compiled", "profiled", "half"],
)
def test_other_programs_checkpoints(wrap, v2, tmp_path):
    v2 = v2.half().float()
    torch.save(wrap(v2.state_dict()), tmp_path / "weights.pth")
    assert same(create_model("featherface_v2", weights=tmp_path / "weights.pth"), v2)


class TestPublished:
    def test_every_tensor_is_used(self, teacher_weights):
        tensors = read_tensors(teacher_weights)
        assert len(tensors) == 437
        model = create_model("featherface_v1_ssh")
        assert tensors.keys() == model.state_dict().keys()
        load_weights(model, teacher_weights)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in tensors.items())

    def test_with_what_a_profiler_leaves(self, teacher_weights, tmp_path):
        content = torch.load(teacher_weights, weights_only=True)
        content |= {f"{key.rpartition('.')[0]}.total_ops": torch.zeros(1) for key in list(content)}
        torch.save(content, tmp_path / "profiled.pth")
        assert same(
            create_model("featherface_v1_ssh", weights=tmp_path / "profiled.pth"),
            create_model("featherface_v1_ssh", weights=teacher_weights),
        )

    def test_a_missing_tensor_is_named(self, teacher_weights, tmp_path):
        content = torch.load(teacher_weights, weights_only=True)
        del content["bifpn.1.conv4_up.pointwise_conv.conv.bias"]
        torch.save(content, tmp_path / "short.pth")
        with pytest.raises(CheckpointError, match=r"short.pth does not fit .*: it lacks bifpn.1.p4_up.pointwise.bias$"):
            create_model("featherface_v1_ssh", weights=tmp_path / "short.pth")

    def test_is_recognised(self, teacher_weights):
        assert identify(read_tensors(teacher_weights)) == "featherface_v1_ssh"
        with pytest.raises(CheckpointError, match=r"is a checkpoint of featherface_v1_ssh, not of featherface_v2$"):
            create_model("featherface_v2", weights=teacher_weights)


class TestTransfer:
    def test_what_v2_and_ultra_have_in_common(self, v2, tmp_path):
        save_weights(randomize(v2), tmp_path / "v2.safetensors")
        ultra = create_model("featherface_v2_ultra")
        before = {name: tensor.clone() for name, tensor in ultra.state_dict().items()}
        taken, total = transfer_weights(ultra, tmp_path / "v2.safetensors")
        source, left = v2.state_dict(), []
        for names in shared_names(ultra):
            common = [source[name] for name in names if name in source and source[name].shape == before[name].shape]
            assert torch.equal(ultra.state_dict()[names[0]], [*common, before[names[0]]][0]), names
            left += [] if common else names
        assert taken == total - len(left)
        assert {name.partition(".")[0] for name in left} == {
            "backbone_cbam_manager",
            "bifpn_cbam_manager",
            "dynamic_gate",
        }

    def test_nothing_in_common(self, tmp_path):
        torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="no tensor in common with featherface_v2"):
            transfer_weights(create_model("featherface_v2"), tmp_path / "w.pth")


class TestBackbone:
    def test_imagenet(self, data_dir):
        path = data_dir / "weights" / "mobilenetv1_025_imagenet.tar"
        content = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        for name in ("featherface_v1_ssh", "featherface_v2_ultra"):
            body = create_model(name, backbone_weights=path).body.state_dict()
            assert all(torch.equal(value, content[f"module.{key}"]) for key, value in body.items())

    def test_published(self, teacher_weights):
        content = torch.load(teacher_weights, weights_only=True)
        body = create_model("featherface_v2", backbone_weights=teacher_weights).body.state_dict()
        assert all(torch.equal(value, content[f"body.{key}"]) for key, value in body.items())

    @pytest.mark.parametrize("name", list_models())
    def test_of_any_model(self, name, tmp_path):
        model = randomize(create_model(name))
        save_weights(model, tmp_path / "w.safetensors")
        student = create_model("featherface_v2")
        heads = student.shared_heads[0].cls_head.weight.clone()
        load_backbone(student, tmp_path / "w.safetensors")
        assert same(student.body, model.body)
        assert torch.equal(student.shared_heads[0].cls_head.weight, heads)

    def test_none_inside(self, tmp_path):
        torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"holds no backbone: its names start with fc.weight"):
            create_model("featherface_v2", backbone_weights=tmp_path / "w.pth")

    def test_of_another_width(self, v2, tmp_path):
        state = {key: value for key, value in v2.state_dict().items() if key.startswith("body.")}
        state["body.stage1.0.0.weight"] = torch.zeros(16, 3, 3, 3)
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"stage1.0.0.weight \(16, 3, 3, 3\) instead of \(8, 3, 3, 3\)"):
            create_model("featherface_v2", backbone_weights=tmp_path / "w.pth")


class TestErrors:
    def load(self, path, name="featherface_v2"):
        with pytest.raises(CheckpointError) as error:
            create_model(name, weights=path)
        message = str(error.value)
        assert str(path) in message and "\n" not in message
        return message

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_missing_file(self, suffix, tmp_path):
        assert "is missing" in self.load(tmp_path / f"none{suffix}")

    def test_directory(self, tmp_path):
        assert "is a directory" in self.load(tmp_path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("keep", [0, 10, 1000, 100_000, -1])
    def test_truncated(self, keep, suffix, v2, tmp_path):
        path = tmp_path / f"w{suffix}"
        save_weights(v2, path)
        path.write_bytes(path.read_bytes()[:keep])
        assert "is damaged or is not a weights file" in self.load(path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_not_weights(self, suffix, tmp_path):
        path = tmp_path / f"w{suffix}"
        path.write_text("<html>404 Not Found</html>\n" * 100)
        assert "is damaged or is not a weights file" in self.load(path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("hello", "world")
        assert "is damaged or is not a weights file" in self.load(path)

    def test_pickle_that_would_run_code(self, v2, tmp_path):
        target, path = tmp_path / "ran", tmp_path / "w.pth"
        torch.save({**v2.state_dict(), "payload": Code(target)}, path)
        assert "refused, because loading it could run code" in self.load(path)
        torch.save({**v2.state_dict(), "payload": Code(target)}, path, _use_new_zipfile_serialization=False)
        assert "refused, because loading it could run code" in self.load(path)
        path.write_bytes(pickle.dumps(Code(target), protocol=2))
        self.load(path)
        assert not target.exists()

    def test_whole_module(self, v2, tmp_path):
        torch.save(v2, tmp_path / "w.pth")
        assert "save its state_dict alone" in self.load(tmp_path / "w.pth")

    @pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {}, {"epoch": 3}, {"state_dict": {}}])
    def test_nothing_by_name(self, content, tmp_path):
        torch.save(content, tmp_path / "w.pth")
        assert "save a state_dict" in self.load(tmp_path / "w.pth")

    @pytest.mark.parametrize("other", [name for name in list_models() if name != "featherface_v2"])
    def test_checkpoint_of_another_model(self, other, tmp_path):
        save_weights(create_model(other), tmp_path / "w.pth")
        assert f"is a checkpoint of {other}, not of featherface_v2" in self.load(tmp_path / "w.pth")

    def test_retinaface(self, data_dir):
        message = self.load(data_dir / "weights" / "retinaface_mnet025_published.pth")
        assert "does not fit the model: it lacks " in message and " more; it holds unknown " in message

    def test_missing_unknown_and_reshaped_tensors(self, v2, tmp_path):
        state = dict(v2.state_dict())
        state["extra.weight"] = state.pop("bifpn.0.p4_up.fusion_weight")
        state["ssh1.conv3X3.0.weight"] = torch.zeros(16, 8, 1, 1)
        torch.save(state, tmp_path / "w.pth")
        message = self.load(tmp_path / "w.pth")
        assert "it lacks bifpn.0.p4_up.fusion_weight; it holds unknown extra.weight; " in message
        assert message.endswith("it holds ssh1.conv3X3.0.weight (16, 8, 1, 1) instead of (16, 8, 3, 3)")

    def test_a_failed_load_changes_nothing(self, v2, tmp_path):
        state = dict(create_model("featherface_v2").state_dict())
        del state["ssh3.conv7x7_3.1.running_var"]
        torch.save(state, tmp_path / "w.pth")
        before = {key: value.clone() for key, value in v2.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"lacks ssh3.conv7x7_3.1.running_var"):
            load_weights(v2, tmp_path / "w.pth")
        assert all(torch.equal(value, before[key]) for key, value in v2.state_dict().items())

    def test_shared_tensors_that_differ(self, tmp_path):
        state = {key: value.clone() for key, value in create_model("featherface_v2_ultra").state_dict().items()}
        state["ssh2.conv3X3.0.weight"] += 1
        torch.save(state, tmp_path / "w.pth")
        message = self.load(tmp_path / "w.pth", "featherface_v2_ultra")
        assert "ssh1.conv3X3.0.weight, ssh2.conv3X3.0.weight" in message and "differ in the file" in message

    def test_pretrained_without_weights(self, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "FOLDER", tmp_path)
        for name in list_models():
            with pytest.raises(CheckpointError, match=f"no weights of {name} come with .* pass weights='FILE'"):
                create_model(name, pretrained=True)

    def test_unwritable_output(self, v2, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_weights(v2, tmp_path / "file" / "w.pth")
        with pytest.raises(CheckpointError, match="cannot be written"):
            folder = tmp_path / "folder.safetensors"
            folder.mkdir()
            save_weights(v2, folder)
        with pytest.raises(CheckpointError, match=r"weights are written as .safetensors, .pth or .pt"):
            save_weights(v2, tmp_path / "w.onnx")
        assert sorted(os.listdir(tmp_path)) == ["file", "folder.safetensors"]

    def test_unreadable_options(self, v2, tmp_path):
        metadata = {"model": "featherface_v2", "options": "[1"}
        safetensors.torch.save_file(v2.state_dict(), tmp_path / "w.safetensors", metadata)
        assert "notes options that are not JSON: '[1'" in self.load(tmp_path / "w.safetensors")
