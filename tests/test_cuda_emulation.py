"""CUDA kernels without a GPU: compiled by g++, run on the CPU, every access and every barrier checked.

The op tests run once more in a process where ``libffcuda`` is the emulated one; kernels with deliberate faults prove
that the emulation finds them.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffkernels import native

TESTS = Path(__file__).parent
ROOT = TESTS.parent
OPS = [
    "batch_norm_gpu",
    "bifpn_node_gpu",
    "cbam_gpu",
    "channel_shuffle",
    "conv_chain_gpu",
    "crop_resize_gpu",
    "cuda_tensor_cores",
    "deform_conv2d_gpu",
    "detection_gpu",
    "preprocess_gpu",
    "ssh_and_heads_gpu",
]
FLOATS = ctypes.POINTER(ctypes.c_float)

if not (ROOT / "csrc" / "emulation" / "build.py").exists():
    pytest.skip("needs the source folder", allow_module_level=True)
sys.path.insert(0, str(ROOT / "csrc"))
from emulation import build, translate  # noqa: E402

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="the CUDA emulation needs g++")
UNORDERED = r"(no barrier orders the two|which nothing wrote)$"
FAULTS = {
    "tree_sum_no_barrier_after_load": rf"byte \d+ of shared partial .* at tests/faulty_kernels\.cu:.*{UNORDERED}",
    "tree_sum_no_barrier_in_loop": r"shared partial .*no barrier orders the two",
    "warp_sum_no_syncwarp": rf"shared sums .*{UNORDERED}",
    "blocks_write_the_same": r"writes global memory .* which block .* blocks have no order",
    "atomic_and_plain_write": r"global memory .*no barrier orders the two",
    "barrier_after_exit": r"divergent barrier: .* 48 threads of the block have exited",
    "barrier_in_two_branches": r"divergent barrier: thread .* waits in __syncthreads at .* in __syncthreads at ",
    "shuffle_lanes_missing": r"waits in __shfl_down_sync at .*, but lane \d+ has exited",
    "shuffle_reads_outside_mask": r"reads lane \d+, which its mask leaves out",
    "shared_row_overrun": r"uses index 33, out of the array's range, at tests/faulty_kernels\.cu:",
    "shared_dynamic_overrun": r"reads byte 256 of shared dynamic memory \(256 bytes\) at .*out of bounds",
    "shared_not_written": r"reads byte 256 of shared tile .*which nothing wrote",
    "vector_load_misaligned": r"not a multiple of 16, at tests/faulty_kernels\.cu:",
    "copy_from_null": r"reads a null pointer",
    "too_many_threads": r"^invalid configuration argument",
    "no_blocks": r"^invalid configuration argument",
    "too_much_dynamic_memory": r"^invalid argument",
    "too_much_memory_together": r"528 bytes of static and 49000 of dynamic shared memory; 49152 are allowed together",
    "product_no_barrier_after_load": rf"shared [ab] .*{UNORDERED}",
    "product_no_barrier_before_load": r"shared [ab] .* at .*mma\.cuh:.*no barrier orders the two$",
    "product_lane_missing": r"waits in ldmatrix at .*mma\.cuh:\d+, but lane 5 has exited$",
    "product_misaligned": r"reads byte \d+ of shared a .*mma\.cuh:\d+, not at a multiple of 16$",
    "matrix_rows_no_syncwarp": rf"shared rows .*faulty_kernels\.cu:.*{UNORDERED}",
    "matrix_partial_warp": r"ldmatrix has 16 lanes, not 32$",
    "matrix_in_global_memory": r"reads global memory \w+ as shared memory at .*faulty_kernels\.cu:",
    "too_much_static_memory": r"52000 bytes of static shared memory; 48 KiB are allowed",
}


class Kernels:
    """The entries of faulty_kernels.cu."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.error_text.restype = ctypes.c_char_p

    def run(self, name: str, x: torch.Tensor, outputs: int, n: int = 0) -> tuple[str, torch.Tensor]:
        """Error text ("" for none) and output of an entry."""
        y = torch.full((outputs,), float("nan"))
        pointers = [ctypes.cast(t.data_ptr(), FLOATS) for t in (x, y)]
        code = getattr(self.library, name)(*pointers, n)
        return self.library.error_text(code).decode() if code else "", y


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if build.compiler() is None:
        pytest.skip("the CUDA emulation needs g++")
    work = ROOT / "build" / "emulation"
    return Kernels(build.build(work / "libfaulty.so", [TESTS / "faulty_kernels.cu"]))


@pytest.fixture(scope="session")
def emulated() -> Path:
    """libffcuda for the CPU."""
    if build.compiler() is None:
        pytest.skip("the CUDA emulation needs g++")
    return build.build(ROOT / "build" / "emulation" / "libffcuda_emulated.so")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_in_every_order(kernels, x, name, seed, monkeypatch):
    monkeypatch.setenv("FF_EMULATION_SEED", str(seed))
    message, _ = kernels.run(name, x, 512)
    assert message != "", "the fault was not found"
    assert re.search(FAULTS[name], message), message


@pytest.mark.parametrize("seed", range(4))
def test_correct_kernels_give_their_results_in_every_order(kernels, x, seed, monkeypatch):
    monkeypatch.setenv("FF_EMULATION_SEED", str(seed))

    def run(name, outputs):
        message, y = kernels.run(name, x, 512)
        assert message == ""
        assert torch.isnan(y[outputs:]).all()
        return y[:outputs]

    sums = x[:320].view(5, 64).double().sum(1).float()
    torch.testing.assert_close(run("tree_sum_right", 5), sums)
    torch.testing.assert_close(run("warp_sum_right", 5), sums)
    assert torch.equal(run("barrier_right", 64), torch.ones(64))
    lanes = torch.arange(64.0)
    assert torch.equal(run("shuffle_right", 64), lanes + (lanes < 15))
    assert torch.equal(run("shared_bounds_right", 64), torch.full((64,), 3.0))
    assert torch.equal(run("allowed_dynamic_memory", 64), torch.full((64,), 3.0))
    torch.testing.assert_close(run("vector_load_right", 16), x[:64].view(16, 4).sum(1))
    assert torch.equal(run("matrix_rows_right", 32), x[:8:2].half().float().repeat(8))


@pytest.mark.parametrize("entry", ["half", "bfloat16", "half_turned_b", "half_turned_both"])
def test_elements_of_tensor_cores_lie_where_they_do_on_a_device(kernels, entry):
    """Products of numbers that are exact; every element comes out in its place, however the factors lie."""
    values = torch.randint(-8, 9, (64 * 32 + 32 * 32,), generator=torch.Generator().manual_seed(1)).float()
    message, y = kernels.run(f"product_{entry}", values, 64 * 32)
    assert message == ""
    assert torch.equal(y.view(64, 32), values[: 64 * 32].view(64, 32) @ values[64 * 32 :].view(32, 32))


def test_tensor_cores_sum_in_float32(kernels):
    """Not better than the devices: what lies below the 24 bits of the largest number is cut off."""
    values = torch.randn(64 * 32 + 32 * 32, generator=torch.Generator().manual_seed(2)).half().float()
    message, y = kernels.run("product_half", values, 64 * 32)
    assert message == ""
    a, b = values[: 64 * 32].view(64, 32).double(), values[64 * 32 :].view(32, 32).double()
    error = (y.view(64, 32) - a @ b).abs()
    assert 2**-25 < error.max() < 17 * 2**-23 * (a.abs() @ b.abs()).max()


def test_atomics(kernels, x):
    y = torch.zeros(1)
    pointers = [ctypes.cast(t.data_ptr(), FLOATS) for t in (x, y)]
    assert kernels.library.atomic_count_right(*pointers, 0) == 0
    assert y.view(torch.int32).item() == (x[:320] > 0).sum()


def test_half_types_round_as_pytorch_does(kernels):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([values.view(torch.float16).float(), values.view(torch.bfloat16).float()])
    bits = torch.randint(-(2**31), 2**31, (40000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([exact, exact * (1 + 2**-11), exact * (1 + 2**-9), exact * 1.001, bits.view(torch.float32)])
    message, y = kernels.run("rounding", x, 2 * len(x), len(x))
    assert message == ""
    for result, dtype in zip(y.chunk(2), (torch.float16, torch.bfloat16)):
        expected = x.to(dtype).float()
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(0).view(torch.int32), expected.nan_to_num(0).view(torch.int32))


def process(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """A Python process with AddressSanitizer's runtime, where there is one."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if (runtime := build.asan_runtime()) is not None:
        variables["LD_PRELOAD"] = runtime
        variables["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, cwd=ROOT)


@needs_compiler
@pytest.mark.skipif(build.asan_runtime() is None, reason="no libasan")
def test_accesses_outside_tensors_are_found(kernels):
    script = f"""
import ctypes
library = ctypes.CDLL({kernels.library._name!r})
library.error_text.restype = ctypes.c_char_p
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x, y = (ctypes.c_void_p(libc.malloc(ctypes.c_size_t(33 * 4))) for _ in range(2))
for offset in (-1, 0, 1, 2):
    code = library.copy_with_offset(x, y, offset)
    print(offset, library.error_text(code).decode() if code else "fine")
"""
    result = process(["-c", script])
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stderr
    for line, found in zip(lines, (True, False, False, True)):
        assert ("reads 4 bytes of global memory" in line and "outside every allocation" in line) == found, line
        assert ("fine" in line) != found


@needs_compiler
@pytest.mark.skipif(native.module()[0] is None, reason="ffkernels is not built")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_op_tests_pass_in_emulation(emulated, marks):
    files = [str(TESTS / f"test_{op}.py") for op in OPS]
    options = ["-q", "-p", "no:cacheprovider", "-m", marks, "-k", "cuda"]
    result = process(["-m", "pytest", *options, *files], FF_TEST_CUDA_EMULATION=str(emulated))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout.splitlines()[-1], result.stdout


def test_translation_keeps_lines_comments_and_strings():
    source = "\n".join(
        [
            "// kernel<<<1, 2>>>(x);",
            'const char *text = "a<<<b";',
            "a::kernel<T, (4 + 1)>",
            "    <<<grid, block>>>();",
            "__shared__ alignas(16) Pair<int, 3> p[2][K + 1];",
            "end",
        ]
    )
    lines = translate.translate(source, "k.cu").splitlines()
    assert lines[0] == '#line 1 "k.cu"'
    assert lines[1:3] == source.splitlines()[:2]
    assert lines[3] == '::emulation::Launch("a::kernel<T, (4 + 1)>", grid, block)(a::kernel<T, (4 + 1)>);'[:-2]
    assert lines[5] == 'auto &p = ::emulation::shared<Pair<int, 3>[2][K + 1]>("p", [] {});'
    assert lines[6] == "end"


@pytest.mark.parametrize("source", ["k<<<1, 2>>>;", "<<<1, 2>>>(x);", "__shared__ int a, b;", "__shared__ int a = 3;"])
def test_translation_refuses_what_it_cannot_read(source):
    with pytest.raises(translate.TranslationError, match=r"k\.cu:2: "):
        translate.translate("\n" + source, "k.cu")
