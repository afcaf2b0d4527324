"""Triton kernels without a GPU: the op tests once more in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent
OPS = ["channel_shuffle"]


@pytest.mark.parametrize("op", OPS)
def test_op_tests_pass_in_the_interpreter(op):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        str(TESTS / f"test_{op}.py"),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout.splitlines()[-1], result.stdout
