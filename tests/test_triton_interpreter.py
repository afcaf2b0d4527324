"""Triton kernels without a GPU: the op tests once more in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent
OPS = {
    "batch_norm_gpu": "affine and eval and bfloat16",
    "channel_shuffle": "",
    "conv_chain_gpu": "many or eval or none or bfloat16",
    "ssh_and_heads_gpu": "",
    "bifpn_node_gpu": "",
    "cbam_gpu": "bfloat16",
    "deform_conv2d_gpu": "",
    "triton_separable": "bfloat16",
}
"""Stems of test files, and what takes too long to run every time."""


def run(stem: str, selected: str, *options: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *options]
    command.append(str(TESTS / f"test_{stem}.py"))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout.splitlines()[-1], result.stdout


@pytest.mark.parametrize("stem", OPS)
def test_op_tests_pass_in_the_interpreter(stem):
    run(stem, f"triton and not ({OPS[stem]})" if OPS[stem] else "triton")


@pytest.mark.slow
@pytest.mark.parametrize("stem", [*OPS, "models_gpu"])
def test_all_op_tests_pass_in_the_interpreter(stem):
    run(stem, "triton", "-m", "")
