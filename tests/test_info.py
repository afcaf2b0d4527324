import json
import subprocess
import sys

import pytest
from kernel_checks import needs_cpu_kernels

from ffkernels import cpu
from ffkernels.info import info, render


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    command = [sys.executable, "-m", "ffkernels.info", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_every_backend_has_a_state_and_every_op_is_listed():
    report = info()
    assert set(report["backends"]) == {"cpu", "cuda", "triton"}
    assert all(report["backends"].values())
    assert report["ops"]["channel_shuffle"] == ["cpu", "cuda", "triton"]
    text = render(report)
    assert "compiler: " in text and "torch: " in text


def test_command_prints_json():
    result = run("--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    usable = report["cpu_instruction_sets"]["usable"]
    assert report["cpu_instruction_sets"]["in_use"] == (usable[-1] if usable else None)


def test_cpu_isa_can_be_lowered_and_a_wrong_one_is_an_error():
    if not info()["cpu_instruction_sets"]["usable"]:
        return
    assert json.loads(run("--json", FF_CPU_ISA="generic").stdout)["cpu_instruction_sets"]["in_use"] == "generic"
    result = run(FF_CPU_ISA="sse9")
    assert result.returncode == 2
    assert result.stderr.startswith("FF_CPU_ISA='sse9' is no instruction set; use one of: generic, avx2, avx512")
    assert len(result.stderr.splitlines()) == 1


def test_kernels_built_from_other_sources_are_not_used(monkeypatch):
    from ffkernels import native

    monkeypatch.setattr(native, "build_info", lambda: {"cpu": {}, "cuda": {}, "abi": "of another header"})
    header = native.FOLDER.parent / "csrc" / "ff_api.h"
    module, reason = native.module.__wrapped__()
    assert header.exists() == (reason == "built from other sources: run pip install -e . again")
    assert header.exists() == (module is None)


@needs_cpu_kernels
def test_the_highest_instruction_set_may_be_one_that_is_not_there(monkeypatch):
    usable = cpu.instruction_sets()
    try:
        for highest in cpu.INSTRUCTION_SETS:
            monkeypatch.setenv("FF_CPU_ISA", highest)
            allowed = cpu.INSTRUCTION_SETS[: cpu.INSTRUCTION_SETS.index(highest) + 1]
            assert cpu.set_isa() == [name for name in usable if name in allowed][-1]
        with pytest.raises(ValueError, match="isa='sse9' cannot be used here"):
            cpu.set_isa("sse9")
    finally:
        monkeypatch.undo()
        cpu.set_isa()
