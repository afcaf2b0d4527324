"""What setup.py does where parts of a toolchain are missing, and what the packages contain."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")
pytest.importorskip("ninja")
ROOT = Path(__file__).parent.parent
SOURCES = ["csrc", "ffkernels", "featherface", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]


@pytest.fixture
def source(tmp_path):
    """A copy of what the build reads, without anything built."""
    folder = tmp_path / "source"
    folder.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json", "lib")
    for name in SOURCES:
        path = ROOT / name
        shutil.copytree(path, folder / name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder / name)
    return folder


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def without_compilers(tmp_path: Path) -> str:
    """A PATH that holds no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return str(folder)


def test_no_compiler_names_the_two_ways_out(source, tmp_path):
    result = setup(source, "build_ext", "--inplace", PATH=without_compilers(tmp_path), CXX="")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("No C++ compiler found (c++, g++, clang++). Install one")
    assert "FF_BUILD_CPU=0 pip install" in message


def test_wrong_compiler_is_named(source):
    result = setup(source, "build_ext", "--inplace", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "No C++ compiler found (CXX=no-such-compiler)" in result.stderr


def test_cuda_asked_for_without_nvcc_is_an_error(source, tmp_path):
    environment = {"PATH": without_compilers(tmp_path), "CUDA_HOME": str(tmp_path), "CXX": shutil.which("c++") or "c++"}
    result = setup(source, "build_ext", "--inplace", FF_BUILD_CUDA="1", FF_NVCC="", **environment)
    assert result.returncode != 0
    assert "FF_BUILD_CUDA=1, but CUDA kernels cannot be built" in result.stderr
    assert "use FF_BUILD_CUDA=0" in result.stderr


@pytest.mark.parametrize(
    "name,value", [("FF_BUILD_CUDA", "yes"), ("FF_BUILD_CPU", "2"), ("FF_INSTRUCTION_SETS", "avx3;generic")]
)
def test_wrong_switch_names_the_right_values(source, name, value):
    result = setup(source, "build_ext", **{name: value})
    assert result.returncode != 0
    assert re.search(rf"{name}={value!r} is not a valid value; use (one|some) of:", result.stderr)


def test_pure_python_build_records_why(source):
    result = setup(source, "build", FF_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    library = source / "build" / "lib"
    record = json.loads((library / "ffkernels" / "_build_info.json").read_text())
    assert record["cpu"]["reason"] == "not built: FF_BUILD_CPU=0"
    assert not list(library.rglob("*.so"))
    weights = [f"featherface/weights/{name}.safetensors" for name in ("featherface_v2", "featherface_v2_ultra")]
    tables = ["ffkernels/measurements.json", "ffkernels/triton/blocks.json", "featherface/weights/weights.json"]
    for file in (*weights, *tables, "ffkernels/py.typed", "featherface/py.typed"):
        assert (library / file).exists(), file
    command = [sys.executable, "-c", "import ffkernels, ffkernels.info as i; print(i.info()['backends']['cpu'])"]
    environment = {**os.environ, "PYTHONPATH": str(library)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=source / "build")
    assert result.stdout.strip() == "not built: FF_BUILD_CPU=0", result.stderr


def test_sdist_holds_every_native_source(source):
    result = setup(source, "sdist")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        str(p.relative_to(source))
        for folder in ("csrc", "ffkernels", "featherface")
        for p in (source / folder).rglob("*.*")
    }
    missing = {n for n in wanted - names if "__pycache__" not in n and not n.endswith((".so", "_build_info.json"))}
    assert not missing
    assert not [n for n in names if n.endswith((".so", "_build_info.json"))]


@pytest.mark.slow
def test_wheel_holds_the_libraries(source):
    result = setup(source, "bdist_wheel", FF_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as archive:
        names = archive.namelist()
    assert "ffkernels/lib/libffcpu_generic.so" in names
    assert "ffkernels/_build_info.json" in names
    assert [n for n in names if n.startswith("ffkernels/_native.")]


def test_the_stub_of_the_native_module_is_that_of_the_header():
    header = re.sub(r"//[^\n]*", "", (ROOT / "csrc/ff_api.h").read_text(encoding="utf-8"))
    declared = {}
    for name, arguments in re.findall(r"FF_EXPORT[\s\w*]*?\b(ff_\w+)\(([^)]*)\)", header):
        names = [re.split(r"[\s*]+", argument.strip())[-1] for argument in arguments.split(",")]
        # `from` is no name in Python.
        declared[name] = ["source" if n == "from" else n for n in names if n != "void"]
    stub = ast.parse((ROOT / "ffkernels/_native.pyi").read_text(encoding="utf-8")).body
    functions = {f.name: [a.arg for a in f.args.args] for f in stub if isinstance(f, ast.FunctionDef)}
    assert len(declared) > 80
    assert declared == {name: arguments for name, arguments in functions.items() if name.startswith("ff_")}
