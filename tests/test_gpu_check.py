"""scripts/gpu_check.py without a GPU: what it records, how it goes on, what it says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffkernels import Policy, registry

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "scripts" / "gpu_check.py"
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


def test_what_takes_too_long_waits_for_the_next_start_or_fails():
    def hangs(left):
        raise subprocess.TimeoutExpired("pytest", left)

    record, calls = {"items": {}}, []
    assert gpu_check.run_stage([("slow", hangs)], record, lambda: calls.append(1), 100) == 1
    assert record["items"]["slow"]["error"].startswith("did not finish in 100 s")
    record = {"items": {}}
    ticks = iter((0, 0, 0, 0, 30, 30))
    clock = gpu_check.time.monotonic
    try:
        gpu_check.time.monotonic = lambda: next(ticks)
        assert gpu_check.run_stage([("quick", lambda left: {}), ("slow", hangs)], record, lambda: None, 100) == 3
    finally:
        gpu_check.time.monotonic = clock
    assert list(record["items"]) == ["quick"]


def test_a_worker_outlives_its_items_failures(tmp_path):
    """An item that hangs, one that ends its process and one that raises leave the next ones alone."""
    script = tmp_path / "stage.py"
    script.write_text(
        f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("gpu_check", {str(SCRIPT)!r})
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)
def printing(left):
    print("noise")
    return {{"pid": os.getpid(), "left": left}}
def raising(left):
    raise ValueError("no luck")
gpu_check.serve([("fine", printing), ("raises", raising), ("dies", lambda left: os._exit(7)),
                 ("hangs", lambda left: time.sleep(600))])
"""
    )
    worker = gpu_check.Worker("ops")
    worker.command = [sys.executable, str(script)]
    try:
        first = worker.run("fine", 30)
        assert first["ok"] and first["left"] == 30 and worker.run("fine", 30)["pid"] == first["pid"]
        assert worker.run("raises", 30) == {"ok": False, "error": "ValueError: no luck"}
        with pytest.raises(RuntimeError, match="ended with code 7"):
            worker.run("dies", 30)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.run("hangs", 0.5)
        assert worker.run("fine", 30)["pid"] != first["pid"]
    finally:
        worker.stop()


def test_a_command_that_hangs_is_killed_with_its_children():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.run_bounded([sys.executable, "-c", script], 1)
    assert gpu_check.run_bounded([sys.executable, "-c", "import os; print(os.environ['A'])"], 30, A="b").stdout == "b\n"


@pytest.fixture
def everything(monkeypatch):
    """As on a machine where the CUDA and Triton kernels run."""
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(registry, "backend_unavailable", lambda name, device="cuda": None)


@pytest.fixture
def one_process(everything, monkeypatch):
    """As where pytest-xdist is not installed."""
    find = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "xdist" else find(name))


def test_all_tests_of_a_backend_are_an_item_where_processes_share_them(everything, monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object())
    names = list(dict(gpu_check.test_items()))
    assert names[:2] == ["tests, cuda", "tests, triton"] and not any(".py" in name for name in names)


def test_every_stage_lists_its_items(one_process):
    names = list(dict(gpu_check.test_items()))
    assert "test_channel_shuffle.py, triton" in names and "test_cuda_tensor_cores.py, cuda" in names
    assert "test_cuda_tensor_cores.py, triton" not in names and not any("test_engine" in name for name in names)
    assert len(dict(gpu_check.sanitize_items())) == len(gpu_check.SANITIZERS) * len(gpu_check.SANITIZED)
    assert len(dict(gpu_check.model_items())) > 30
    emulated = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*_gpu.py")} - {"models_gpu"}
    assert emulated | {"channel_shuffle", "cuda_tensor_cores"} == set(gpu_check.SANITIZED)


def test_every_item_of_the_tests_selects_some(one_process):
    """pytest ends with an error where nothing is selected, and the stage would never be done."""
    wanted = {tuple(name.split(", ")) for name, _ in gpu_check.test_items() if name.startswith("test_")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    files = sorted({str(TESTS / name) for name, _ in wanted})
    result = subprocess.run([*command, *files], capture_output=True, text=True, cwd=SCRIPT.parent.parent)
    tests = [line for line in result.stdout.splitlines() if "::" in line]
    assert wanted <= {(t.split("::")[0].rpartition("/")[2], b) for t in tests for b in ("cuda", "triton") if b in t}


def test_the_layer_table_runs(everything):
    """Every op with kernels for networks is in it, and a layer of each runs."""
    table, ops = gpu_check.layer_table(), set()
    for name, entry in table.items():
        op = name.split(", ")[0]
        if op in ops:
            continue
        ops.add(op)
        run, elements, moved, flops = gpu_check.make_layer(entry, 2, torch.float32, "cpu")
        with torch.no_grad():
            run(Policy("0"))
        assert elements > 0 and moved > 4 * elements and flops >= 0, name
        assert flops > 0 or op == "channel_shuffle", name
    assert ops == set(registry.ops()) - {"crop_resize", "detection", "preprocess"}
    names = [name for name, _ in gpu_check.op_items()]
    assert names[0] == "copy" and len(names) == len(set(names)) == 1 + 9 * len(table)


def test_the_goals_in_the_summary():
    def ms(value, **more):
        return {"ok": True, "ms": value, **more}

    items = {
        "V2 forward, batch 1, float16 channels_last, fused, CUDA graph": ms(1.0),
        "V2 forward, batch 1, float16 channels_last, compile default, CUDA graph": ms(4.0),
        "V2 forward, batch 64, float16 channels_last, fused": ms(2.0),
        "V2 forward, batch 64, float16 channels_last, compile max-autotune": ms(6.0),
        "V2 training step, batch 32, autocast channels_last, eager": ms(9.0, **{"peak GiB": 4.0}),
        "V2 training step, batch 32, autocast channels_last, compile default": ms(6.0),
        "V2 training step, batch 32, autocast channels_last, fused": ms(3.0, **{"peak GiB": 1.0}),
    }
    assert gpu_check.targets("model", items) == [
        "- forward, batch 1, in a CUDA graph: 0.25 of the best torch.compile",
        "- forward, batch 64: 3.00x the best torch.compile, 32000 images/s",
        "- training step: 3.00x eager, 2.00x the best torch.compile",
        "- training step: 0.25 of eager's peak memory",
    ]
    layers = {"copy": {"ok": True, "GB/s": 200}, "cbam, x, batch 64, float16, cuda": {"ok": True, "GB/s": 150}}
    assert gpu_check.targets("ops", layers) == ["- cbam, x, batch 64, float16, cuda: 75 % of the copy"]
    assert gpu_check.targets("model", {}) == gpu_check.targets("tests", {}) == []


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
