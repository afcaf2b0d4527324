"""scripts/gpu_check.py without a GPU: what it records, how it goes on, what it says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"
if not SCRIPT.exists():
    pytest.skip("needs the source folder", allow_module_level=True)
spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

WHERE = {"gpu": "G", "driver": ["1"], "torch": "2", "cuda": "13", "triton": "3", "python": "3", "commit": "a" * 40}


def test_a_stage_records_fails_and_goes_on(tmp_path):
    path, calls = tmp_path / "gpu_ops.json", []

    def item(name, works):
        def run(left):
            calls.append(name)
            if not works:
                raise ValueError("no luck")
            return {"ms": 1.5}

        return name, run

    def start(works, limit=100):
        record = gpu_check.load(path, WHERE, False)
        items = [item("first", True), item("second", works), item("third", True)]
        return gpu_check.run_stage(items, record, lambda: gpu_check.write(path, json.dumps(record)), limit)

    assert start(False) == 1 and calls == ["first", "second", "third"]
    assert json.loads(path.read_text())["items"]["second"]["error"] == "ValueError: no luck"
    assert start(True) == 0 and calls[3:] == ["second"]
    assert gpu_check.load(path, {**WHERE, "commit": "b"}, False)["items"] == {}
    assert gpu_check.load(path, WHERE, True)["items"] == {}
    page = gpu_check.summary(tmp_path)
    assert "| first | ok | ms 1.5 |" in page and page.count("Not yet run on a GPU.") == 3


def test_out_of_time_leaves_the_rest(tmp_path, monkeypatch):
    clock = iter(range(0, 10000, 30))
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    record = {"items": {}}
    items = [(str(i), lambda left: {}) for i in range(5)]
    assert gpu_check.run_stage(items, record, lambda: None, 200) == 3
    assert 0 < len(record["items"]) < 5


def test_every_stage_lists_its_items(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/true")
    assert "test_channel_shuffle.py" in dict(gpu_check.test_items())
    assert len(dict(gpu_check.sanitize_items())) == len(gpu_check.SANITIZERS) * len(gpu_check.SANITIZED)
    assert "copy" in dict(gpu_check.op_items())
    assert len(dict(gpu_check.model_items())) > 20
    for name in gpu_check.SANITIZED:
        assert (SCRIPT.parent.parent / "tests" / f"test_{name}.py").exists()


def test_the_layer_table_runs():
    for op, layer, make in gpu_check.layer_table():
        run, elements, moved, flops = make(1, torch.float32, "cpu")
        assert run(gpu_check_policy()).shape[0] == 1 and elements > 0 and moved > 0 and flops >= 0, (op, layer)


def gpu_check_policy():
    from ffkernels import Policy

    return Policy("0")


def test_the_preference_table():
    """Layers that both backends served, and the registry's choice by them."""
    case, half = "cbam, 32 channels, batch 1, float32", "cbam, 32 channels, batch 1, float16"
    items = {
        "copy": {"ok": True, "GB/s": 1},
        f"{case}, eager": {"ok": True, "ms": 9.0, "elements": 4096},
        f"{case}, cuda": {"ok": True, "ms": 2.0, "elements": 4096},
        f"{case}, triton": {"ok": True, "ms": 1.0, "elements": 4096},
        f"{half}, cuda": {"ok": True, "ms": 2.0, "elements": 4096},
        f"{half}, triton": {"ok": False, "error": "no"},
    }
    table = gpu_check.preference_table({"environment": WHERE, "items": items})
    row = {"op": "cbam", "dtype": "float32", "elements": 4096, "ms": {"cuda": 2.0, "triton": 1.0}}
    assert table == {"measured": WHERE, "rows": [row]}


def test_pytest_counts():
    assert gpu_check.pytest_counts("x\n3 failed, 12 passed, 1 skipped in 2s\n") == {
        "passed": 12, "failed": 3, "skipped": 1, "error": 0,
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = subprocess.run([sys.executable, str(SCRIPT), "--stage", "ops"], capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.strip() == "gpu_check: PyTorch finds no CUDA device; run this on a machine with an NVIDIA GPU"
