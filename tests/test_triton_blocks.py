"""Block sizes of the Triton kernels: the table of measurements, and the script that writes it, with a fake timer."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from ffkernels.ops.conv_chain import Link
from ffkernels.triton import batch_norm, blocks, conv, conv_chain, separable
from ffkernels.triton.blocks import Block, Key

HALF = torch.empty(1, dtype=torch.float16)
CONV = Key(90, "conv", 2, 32, 288)
ROW = {"kind": "conv", "element_size": 2, "columns": 32, "depth": 288, "block": Block(64, 64, 64, 8, 4)._asdict()}


@pytest.fixture
def sm_90(monkeypatch):
    monkeypatch.setattr(blocks, "capability", lambda device: 90)


def table_of(*rows, capability=90):
    return {"devices": [{"capability": capability, "rows": list(rows)}]}


def test_the_committed_table():
    assert all(key.element_size in (2, 4) and key.capability >= 80 for key in blocks.measured())


def test_defaults_follow_capability_and_element_size():
    assert blocks.default("conv", 2, 90) != blocks.default("conv", 4, 90)
    assert blocks.default("conv", 2, 0) == blocks.default("conv", 4, 0)
    assert blocks.default("conv", 4, 90) == blocks.default("conv", 4, 80)
    assert {since for kind in blocks.DEFAULTS.values() for since, _, _ in kind} <= {0, 80, 90, 100}


@pytest.mark.parametrize("rows", [1, 1024, 1025, 65535 * 1024, 65535 * 1024 + 1, 2**31 - 1])
def test_splits_cover_the_rows_and_fit_a_grid(rows):
    count, each = blocks.splits_of(rows)
    assert count <= 65535 and each % blocks.SPLIT == 0
    assert (count - 1) * each < rows <= count * each


@pytest.mark.parametrize("kind", blocks.DEFAULTS)
@pytest.mark.parametrize("capability", [0, 75, 80, 120])
def test_a_small_layer_takes_a_small_block(kind, capability, monkeypatch):
    monkeypatch.setattr(blocks, "capability", lambda device: capability)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        like = torch.empty(1, dtype=dtype)
        assert blocks.block(kind, like, 3, 5)[1:3] == (16, 16)
        large = blocks.block(kind, like, 10**6, 10**6)
        assert large == blocks.default(kind, like.element_size(), capability)


def test_a_measured_block_is_taken_where_all_of_the_key_fits(sm_90, monkeypatch):
    measured = Block(64, 64, 64, 8, 4)
    monkeypatch.setattr(blocks, "measured", lambda: blocks.parse(table_of(ROW)))
    assert blocks.measured() == {CONV: measured}
    assert blocks.block("conv", HALF, 32, 288) == measured._replace(columns=32)
    for kind, like, columns, depth in (
        ("conv", HALF.float(), 32, 288),
        ("conv", HALF, 16, 288),
        ("conv", HALF, 32, 144),
        ("weight_gradient", HALF, 32, 288),
    ):
        default = blocks.default(kind, like.element_size(), 90)
        assert blocks.block(kind, like, columns, depth).rows == default.rows
    monkeypatch.setattr(blocks, "capability", lambda device: 80)
    assert blocks.block("conv", HALF, 32, 288).rows == blocks.default("conv", 2, 80).rows


@pytest.mark.parametrize(
    "table,message",
    [
        ([], "'devices': list indices"),
        ({}, "'devices': 'devices' is missing"),
        ({"devices": [{"rows": []}]}, "devices[0]: 'capability' is missing"),
        (table_of({**ROW, "kind": "convolution"}), "devices[0].rows[0]: unknown kind 'convolution', not one of conv,"),
        (table_of({**ROW, "columns": "32"}), "devices[0].rows[0]: a number is not a positive integer"),
        (
            table_of({**ROW, "block": {**ROW["block"], "rows": 48}}),
            "devices[0].rows[0]: rows, columns and depth",
        ),
        (
            table_of({**ROW, "block": {**ROW["block"], "rows": 8}}),
            "devices[0].rows[0]: rows, columns and depth",
        ),
        (table_of({**ROW, "block": {"columns": 16}}), "devices[0].rows[0]: Block.__new__() missing"),
        (table_of({**ROW, "block": {**ROW["block"], "cols": 16}}), "devices[0].rows[0]: Block.__new__() got an unex"),
        (table_of(ROW, ROW), "devices[0].rows[1]: the same capability, kind, element_size, columns and depth twice"),
    ],
)
def test_a_malformed_table_is_named(table, message, tmp_path, monkeypatch):
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(blocks, "TABLE", path)
    blocks.measured.cache_clear()
    with pytest.raises(ValueError) as error:
        blocks.measured()
    assert str(error.value).startswith(f"{path}: {message}")
    assert str(error.value).endswith("scripts/tune_triton.py --fresh")
    assert len(str(error.value).splitlines()) == 1


def test_a_table_that_is_no_json_is_named(tmp_path, monkeypatch):
    (tmp_path / "blocks.json").write_text("{")
    monkeypatch.setattr(blocks, "TABLE", tmp_path / "blocks.json")
    blocks.measured.cache_clear()
    with pytest.raises(ValueError, match=r"blocks\.json: .*Write the table again"):
        blocks.measured()


# ---- scripts/tune_triton.py

SCRIPT = Path(__file__).parent.parent / "scripts" / "tune_triton.py"


@pytest.fixture(scope="module")
def tune_triton():
    if not SCRIPT.exists():
        pytest.skip("needs the source folder")
    spec = importlib.util.spec_from_file_location("tune_triton", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link(out, channels, kernel, groups=1, dtype=torch.float16):
    weight = torch.empty(out, channels // groups, kernel, kernel, dtype=dtype)
    norm = [torch.empty(out, dtype=dtype) for _ in range(4)]
    return Link(weight, None, *norm, 1, kernel // 2, groups, 2, 2, 0.1, 1e-5)


def test_calls_of_launchers_are_recorded_once(tune_triton, sm_90, monkeypatch):
    for module in (batch_norm, conv, separable):
        monkeypatch.setattr(module, "launch", lambda *arguments, **constants: None)
    dense, pair = link(32, 32, 3), [link(64, 64, 3, 64), link(32, 64, 1)]
    x, wide = (torch.empty(1, n, 8, 8, dtype=torch.float16) for n in (32, 64))
    before = conv_chain.conv_forward
    with tune_triton.recorded() as cases:
        for _ in range(3):
            conv_chain.forward(x, [dense], save=False)
        conv_chain.forward(wide, pair, save=False)
        y, stats, raw = conv_chain.forward(x, [dense], save=True)
        conv_chain.backward(y, x, [dense], stats, raw, [True, True, False, True, True])
    assert conv_chain.conv_forward is before
    found = {case.name.removeprefix("ffkernels.triton."): case for case in cases.values() if case.count != 1}
    assert {name: case.count for name, case in found.items()} == {"conv.conv_forward": 3}
    keys = {key for case in cases.values() for key in case.keys}
    assert keys == {
        CONV,
        Key(90, "separable", 2, 32, 64),
        Key(90, "weight_gradient", 2, 288, blocks.SPLIT),
        Key(90, "elementwise", 2, 32, 16),
        Key(90, "reduction", 2, 32, 16),
    }
    for case in cases.values():
        case.run()


class OutOfResources(Exception):
    """Triton's error of this name."""


class Gpu:
    """Calls whose time is a function of the block that they are given."""

    def __init__(self, tune_triton, times):
        self.runs = []
        self.cases = [
            tune_triton.Case("a call", lambda key=key, time=time: self.run(key, time), frozenset([key]), count=2)
            for key, time in times.items()
        ]

    def run(self, key, time):
        chosen = blocks.measured()[key]
        self.runs.append((key, chosen))
        return time(chosen)

    def timer(self, run):
        return run()


DEFAULT = blocks.default("conv", 2, 90)


def test_the_fastest_candidate_that_fits_wins(tune_triton):
    def time(chosen):
        if chosen.rows == 128 and chosen != DEFAULT:
            raise OutOfResources
        return 1 / chosen.columns

    gpu = Gpu(tune_triton, {CONV: time})
    best, measured = tune_triton.best_block(gpu.cases, CONV, gpu.timer)
    candidates = tune_triton.CANDIDATES["conv", 2]
    assert best == max((b for b in candidates if b.rows != 128), key=lambda b: b.columns) and best != DEFAULT
    assert measured == {"ms": round(2 / best.columns, 5), "default_ms": round(2 / DEFAULT.columns, 5)}
    assert [b for _, b in gpu.runs] == [DEFAULT, *(b for b in candidates if b != DEFAULT)]


def test_noise_does_not_replace_the_default(tune_triton):
    gpu = Gpu(tune_triton, {CONV: lambda chosen: 1.0 if chosen == DEFAULT else 0.99})
    assert tune_triton.best_block(gpu.cases, CONV, gpu.timer) == (DEFAULT, {"ms": 2.0, "default_ms": 2.0})


def test_other_errors_of_a_candidate_are_raised(tune_triton):
    def time(chosen):
        if chosen != DEFAULT:
            raise RuntimeError("illegal address")
        return 1.0

    gpu = Gpu(tune_triton, {CONV: time})
    with pytest.raises(RuntimeError, match="illegal address"):
        tune_triton.best_block(gpu.cases, CONV, gpu.timer)


WHERE = {"gpu": "G", "torch": "2", "triton": "3", "commit": "a" * 40}


def test_a_stopped_run_goes_on(tune_triton, tmp_path, monkeypatch, sm_90):
    keys = [CONV, Key(90, "depthwise", 4, 64, 16), Key(90, "separable", 2, 32, 32)]
    gpu = Gpu(tune_triton, dict.fromkeys(keys, lambda chosen: float(chosen.rows)))
    path = tmp_path / "blocks.json"

    def start(minutes, where=WHERE, fresh=False):
        gpu.runs.clear()
        record = tune_triton.load(path, fresh)
        device = tune_triton.device_of(record, 90, where, fresh)
        seconds = iter(range(0, 600, 60))
        save = lambda: tune_triton.write(path, json.dumps(record))  # noqa: E731
        code = tune_triton.tune(gpu.cases, device, save, 60 * minutes, gpu.timer, lambda: next(seconds))
        return code, len({key for key, _ in gpu.runs})

    assert start(1) == (3, 1)
    assert [row["kind"] for row in json.loads(path.read_text())["devices"][0]["rows"]] == ["conv"]
    assert start(5, {**WHERE, "commit": "a" * 40 + "-dirty"}) == (0, 2)
    assert start(5) == (0, 0)
    monkeypatch.setattr(blocks, "TABLE", path)
    blocks.measured.cache_clear()
    assert set(blocks.measured()) == set(keys)
    assert blocks.block("depthwise", HALF.float(), 64).rows == 16, "the fastest by this clock"
    blocks.measured.cache_clear()
    assert start(5, {**WHERE, "commit": "b" * 40}) == (0, 3), "another commit begins anew"
    assert start(5, {**WHERE, "commit": "b" * 40}, fresh=True) == (0, 3)
    record = json.loads(path.read_text())
    tune_triton.device_of(record, 80, WHERE, False)
    assert [device["capability"] for device in record["devices"]] == [80, 90], "other capabilities stay"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_malformed_table_stops_the_script(tune_triton, tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text('{"devices": [{}]}')
    with pytest.raises(SystemExit, match=r"devices\[0\]: 'capability' is missing; --fresh writes a new table"):
        tune_triton.load(path, fresh=False)
    assert tune_triton.load(path, fresh=True) == {"devices": []}


def test_every_kind_has_candidates(tune_triton):
    assert set(tune_triton.CANDIDATES) == {(kind, size) for kind in blocks.DEFAULTS for size in (2, 4)}
    for (kind, size), candidates in tune_triton.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates) > 1
        rows = [{**ROW, "kind": kind, "element_size": size, "block": b._asdict(), "depth": i + 1}
                for i, b in enumerate(candidates)]  # fmt: skip
        assert list(blocks.parse(table_of(*rows)).values()) == candidates


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tune_triton):
    with pytest.raises(SystemExit, match=r"^tune_triton: PyTorch finds no CUDA device; run this on a machine with"):
        tune_triton.main([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_models_ask_for_every_kind(tune_triton):
    command = [
        sys.executable,
        str(SCRIPT),
        "--list",
        "--size",
        "64",
        "--models",
        "featherface_v2",
        "featherface_v1_ssh",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    asked = {tuple(line.split()[:2]) for line in result.stdout.splitlines()}
    assert asked == {(kind, str(size)) for kind in blocks.DEFAULTS for size in (2, 4)}
    assert "weight_gradient 2 288 1024" in result.stdout.splitlines()
