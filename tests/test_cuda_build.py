"""What the compiler made of the CUDA kernels: no warnings, no spilled registers. Needs nvcc, no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ffkernels.native import FOLDER, build_info

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which(os.environ.get("FF_NVCC", "nvcc"))
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
LIBRARY = FOLDER / "lib" / "libffcuda.so"
MOST_REGISTERS = 128
"""Of a thread: 512 threads can be resident on a multiprocessor."""

needs_nvcc = pytest.mark.skipif(NVCC is None or not SOURCES, reason="needs nvcc and the source folder")


def cuobjdump() -> str | None:
    """The toolkit's, else the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


def check_resources(binary: Path, architectures: tuple[str, ...]) -> None:
    """No kernel in ``binary`` keeps anything on a stack, where spilled registers and indexed arrays would lie."""
    listing = subprocess.run([cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = set()
    for code in listing.split("Fatbin elf code:")[1:]:
        found.add(re.search(r"arch = sm_(\d+)", code)[1])
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", code):
            assert int(stack) == 0, f"{name} has {stack} bytes of stack"
            assert int(registers) <= MOST_REGISTERS, f"{name} takes {registers} registers"
    assert found == set(architectures)


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.skipif(not LIBRARY.exists(), reason="CUDA kernels are not built")
def test_installed_kernels_spill_nothing():
    check_resources(LIBRARY, tuple(build_info()["cuda"]["architectures"]))


@needs_nvcc
def test_build_compiles_with_warnings_as_errors(tmp_path):
    """The flag that CI builds with does what it is for: one warning ends the compilation."""
    source = tmp_path / "warning.cu"
    source.write_text("__global__ void kernel() { int unused; }\n")
    command = [NVCC, "-arch=sm_90", "-c", str(source), "-o", str(tmp_path / "warning.o")]
    assert subprocess.run(command).returncode == 0
    assert subprocess.run([*command, "-Werror=all-warnings"]).returncode != 0


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_all_architectures(source, tmp_path):
    output = tmp_path / "kernels.o"
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    architectures = tuple(a for a in ARCHITECTURES if f"compute_{a}" in known)
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [NVCC, "-std=c++17", "-O3", "-Werror=all-warnings", f"-I{source.parents[1]}", *code, "-c", str(source)]
    subprocess.run([*command, "-o", str(output)], check=True)
    check_resources(output, architectures)
