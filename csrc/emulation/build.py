"""Compiles CUDA sources with g++ for the emulation: ``python csrc/emulation/build.py [OUTPUT.so]``.

Objects are kept in ``build/emulation`` under a hash of everything they are made from, so only what changed is compiled.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__:
    from .translate import translate
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from translate import translate

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
INSTRUMENT = "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"


def compiler() -> list[str] | None:
    """The g++ command, ``None`` where there is none: the instrumentation is GCC's."""
    command = shlex.split(os.environ.get("FF_EMULATION_CXX", "g++"))
    return command if shutil.which(command[0]) else None


def asan_runtime() -> str | None:
    """Path of AddressSanitizer's runtime, to be preloaded so that accesses outside allocations are found."""
    command = compiler()
    if command is None:
        return None
    path = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) and Path(path).exists() else None


def build(output: Path, sources: Sequence[Path] | None = None, work: Path | None = None) -> Path:
    """Compile ``sources`` (default: csrc/cuda/*.cu) and the runtime into the shared library ``output``.

    Raises :class:`RuntimeError` with the compiler's messages where the sources do not compile.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("the CUDA emulation needs g++")
    work = work or ROOT / "build" / "emulation"
    work.mkdir(parents=True, exist_ok=True)
    kernels = ROOT / "csrc" / "cuda"
    sources = sorted(kernels.glob("*.cu")) if sources is None else list(sources)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    common = hashlib.sha256(f"{version}{FLAGS}{INSTRUMENT}".encode())
    for header in [*HERE.glob("*"), *kernels.glob("*.cuh"), ROOT / "csrc" / "ff_api.h"]:
        if header.suffix in (".h", ".cuh", ".py"):
            common.update(header.name.encode() + header.read_bytes())
    include = work / f"include-{common.hexdigest()[:16]}"
    include.mkdir(exist_ok=True)
    for header in kernels.glob("*.cuh"):
        if not (HERE / header.name).exists():  # the emulation's own takes its place
            _write(include / header.name, translate(header.read_text(), _name(header)))

    def compile_one(source: Path) -> Path:
        text = source.read_text()
        cuda = source.suffix == ".cu"
        if cuda:
            text = translate(text, _name(source))
        digest = common.copy()
        digest.update(text.encode())
        object_file = work / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not object_file.exists():
            translated = object_file.with_suffix(".cpp")
            _write(translated, text)
            flags = [
                *FLAGS,
                f"-ffile-prefix-map={ROOT}=.",
                *([INSTRUMENT] if cuda else []),
                *(f"-I{f}" for f in (HERE, include, ROOT / "csrc")),
            ]
            partial = object_file.with_suffix(f".{os.getpid()}.partial")
            result = subprocess.run(
                [*command, *flags, "-c", str(translated), "-o", str(partial)], capture_output=True, text=True, cwd=ROOT
            )
            if result.returncode != 0:
                raise RuntimeError(f"{source.name} does not compile for the emulation:\n{result.stderr}")
            os.replace(partial, object_file)
        return object_file

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [HERE / "runtime.cpp", *sources]))
    partial = output.with_suffix(f".{os.getpid()}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        [*command, "-shared", *map(str, objects), "-o", str(partial), "-ldl", "-Wl,-z,defs"],
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{output.name} does not link:\n{result.stderr}")
    os.replace(partial, output)
    return output


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    default = ROOT / "build" / "emulation" / "libffcuda_emulated.so"
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
