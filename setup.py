"""Builds the native kernels: ffkernels._native (pybind11), one libffcpu per instruction set, libffcuda.

PyTorch is not needed to build. Environment: FF_BUILD_CPU=0|1 (default 1), FF_BUILD_CUDA=auto|0|1 (default auto: build
where nvcc is found), FF_CUDA_ARCHS="80;90" (default by toolkit version), FF_INSTRUCTION_SETS="avx2" (of the processor,
beside generic; default: all), FF_OPENMP=1|0 (default: where the compiler has it; 0 takes std::thread), FF_NVCC,
NVCCFLAGS, CXX, CXXFLAGS, MAX_JOBS.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-march=skylake-avx512", "-mprefer-vector-width=512"]
GCC_105593 = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
"""GCC 12 warns of its own header of intrinsics (bug 105593)."""
INSTRUCTION_SETS = {
    "generic": [],
    **(
        {
            "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"],
            "avx512": AVX512,
            "avx512_bf16": [*AVX512, "-mavx512bf16"],
            "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        }
        if X86
        else {}
    ),
}
BFLOAT16 = {"-mavx512bf16", "-mamx-tile", "-mamx-bf16"}
BFLOAT16_MACROS = re.compile("__AVX512BF16__|__AMX_")
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
CXXFLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
NVCCFLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = {12: ("75", "80", "90"), 13: ("75", "80", "90", "100", "120")}
"""By version of the toolkit. Code for 8.0 also runs on 8.6 and 8.9."""


def choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        sys.exit(f"{name}={value!r} is not a valid value; use one of: {', '.join(allowed)}")
    return value


def wanted_instruction_sets() -> set[str]:
    """generic, and those that FF_INSTRUCTION_SETS names; all where it is not set."""
    asked = os.environ.get("FF_INSTRUCTION_SETS")
    names = set(INSTRUCTION_SETS) if asked is None else {"generic", *filter(None, re.split(r"[;,\s]+", asked))}
    if names - set(INSTRUCTION_SETS):
        sys.exit(f"FF_INSTRUCTION_SETS={asked!r} is not a valid value; use some of: {', '.join(INSTRUCTION_SETS)}")
    return names


BUILD_CPU = choice("FF_BUILD_CPU", ("1", "0")) == "1" and os.name != "nt"
BUILD_CUDA = choice("FF_BUILD_CUDA", ("auto", "0", "1"))
OPENMP = choice("FF_OPENMP", ("1", "0")) == "1"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def git_revision() -> str | None:
    """Revision of the checkout, with "-dirty" where it has changes; None where there is none, as in an sdist."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    revision = run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    dirty = run(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return (revision + ("-dirty" if dirty else "")) or None


def find_cxx() -> list[str]:
    """The C++ compiler: CXX, else c++, g++ or clang++; ends the build with the two ways out where there is none."""
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    sys.exit(
        f"No C++ compiler found ({'CXX=' + asked if asked else 'c++, g++, clang++'}). Install one "
        "(Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install), "
        "or install without native kernels: FF_BUILD_CPU=0 pip install ..."
    )


def compiles(cxx: list[str], flags: list[str], source: str, link: bool = False) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        end = ["-o", str(Path(folder, "probe"))] if link else ["-fsyntax-only"]
        return run([*cxx, *flags, str(path), *end]).returncode == 0


def uses_bfloat16(source: Path) -> bool:
    """Whether a source, or a header it includes, asks for what the flags of BFLOAT16 switch on."""
    text = source.read_text()
    headers = (source.parent / name for name in re.findall(r'#include "([\w/]+\.h)"', text))
    return bool(BFLOAT16_MACROS.search(text)) or any(uses_bfloat16(h) for h in headers if h.exists())


class Cuda:
    """The CUDA toolkit as nvcc itself describes it, or the reason why there is none."""

    def __init__(self) -> None:
        self.nvcc: str | None = None
        self.reason: str | None = None
        if BUILD_CUDA == "0":
            self.reason = "not built: FF_BUILD_CUDA=0"
            return
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        candidates = [os.environ.get("FF_NVCC"), "nvcc", str(Path(home, "bin", "nvcc"))]
        self.nvcc = next((found for c in candidates if c and (found := shutil.which(c))), None)
        if self.nvcc is None:
            self.reason = "not built: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
        else:
            self._ask()
        if self.reason and BUILD_CUDA == "1":
            sys.exit(f"FF_BUILD_CUDA=1, but CUDA kernels cannot be built ({self.reason}). Install the CUDA toolkit, "
                     "set CUDA_HOME, or use FF_BUILD_CUDA=0.")  # fmt: skip

    def _ask(self) -> None:
        version = re.search(r"release (\d+)\.(\d+)", run([self.nvcc, "--version"]).stdout)
        dryrun = run([self.nvcc, "--dryrun", "-c", "-x", "cu", os.devnull])
        libraries = re.search(r"LIBRARIES=(.*)", dryrun.stderr + dryrun.stdout)
        self.library_dirs = [f[2:] for f in shlex.split(libraries[1]) if f.startswith("-L")] if libraries else []
        if version is None or not any(Path(d, "libcudart_static.a").exists() for d in self.library_dirs):
            self.reason = f"not built: {self.nvcc} has no usable toolkit (libcudart_static.a not found)"
            return
        self.version = (int(version[1]), int(version[2]))
        archs = os.environ.get("FF_CUDA_ARCHS")
        default = CUDA_ARCHS[min(max(self.version[0], 12), 13)]
        self.archs = tuple(re.split(r"[;, ]+", archs.strip())) if archs else default
        for arch in self.archs:
            if not re.fullmatch(r"\d{2,3}[af]?", arch):
                sys.exit(f"FF_CUDA_ARCHS={archs!r}: {arch!r} is not an architecture; write numbers such as '80;90'")

    def gencode(self) -> list[str]:
        """Machine code for each architecture, and PTX of the newest for later ones."""
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        newest = max((a for a in self.archs if a.isdigit()), key=int, default=None)
        return flags + ([f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else [])


class Ninja:
    """Collects build statements and runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            "rule run\n  command = $command\n  description = $what\n  depfile = $depfile\n  deps = gcc",
            "rule link\n  command = $command\n  description = $what",
        ]

    @staticmethod
    def escape(value: str | Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def compile(self, command: list[str], source: Path, output: Path, what: str) -> Path:
        depfile = f"{output}.d"
        line = shlex.join([*command, "-MD", "-MF", depfile, "-c", str(source), "-o", str(output)]).replace("$", "$$")
        self.lines.append(f"build {self.escape(output)}: run {self.escape(source)}\n  command = {line}\n"
                          f"  depfile = {depfile}\n  what = {what}")  # fmt: skip
        return output

    def link(self, command: list[str], objects: list[Path], output: Path, flags: list[str], what: str) -> None:
        line = shlex.join([*command, *map(str, objects), "-o", str(output), *flags]).replace("$", "$$")
        inputs = " ".join(self.escape(o) for o in objects)
        self.lines.append(f"build {self.escape(output)}: link {inputs}\n  command = {line}\n  what = {what}")

    def run(self) -> None:
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR, "ninja"))
        except ImportError:
            program = shutil.which("ninja")
            if program is None:
                sys.exit("ninja is needed to build the native kernels: pip install ninja")
        command = [program, "-C", str(self.folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            sys.exit(
                "Compiling the native kernels failed (see above). To install without the CUDA kernels: "
                "FF_BUILD_CUDA=0 pip install ...; without any native kernels: FF_BUILD_CPU=0 pip install ..."
            )


def write_info(package: Path, info: dict) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def source_hash(folder: Path) -> str:
    """As ``ffkernels.native.source_hash``, which cannot be imported before PyTorch is there."""
    digest = hashlib.sha256()
    for path in [folder / "ff_api.h", *sorted((folder / "cpu").glob("engine*.[ch]*"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def base_info() -> dict:
    return {
        "git_revision": git_revision(),
        "abi": source_hash(ROOT / "csrc"),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


class BuildPy(build_py):
    """Records what a pure-Python build holds; a native build records more in BuildNative."""

    def run(self) -> None:
        super().run()
        if not BUILD_CPU:
            reason = "not built: FF_BUILD_CPU=0" if os.name != "nt" else "not built: Windows is not supported"
            package = ROOT / "ffkernels" if self.editable_mode else Path(self.build_lib, "ffkernels")
            write_info(package, {**base_info(), "cpu": {"reason": reason}, "cuda": {"reason": reason}})


class BuildNative(build_ext):
    """Generates a ninja file and runs it; the libraries land beside the extension module."""

    def run(self) -> None:
        in_source = self.inplace or self.editable_mode
        package = ROOT / "ffkernels" if in_source else Path(self.build_lib, "ffkernels").resolve()
        work = Path(self.build_temp).resolve()
        for folder in (package / "lib", work):
            folder.mkdir(parents=True, exist_ok=True)
        info = base_info()
        ninja = Ninja(work)
        cxx = find_cxx()
        info["cpu"] = self.plan_cpu(ninja, cxx, package, work)
        info["cuda"] = self.plan_cuda(ninja, package, work)
        wanted = {f"libffcpu_{isa}.so" for isa in info["cpu"]["instruction_sets"]}
        wanted |= set() if "reason" in info["cuda"] else {"libffcuda.so"}
        for stale in package.glob("lib/libff*.so"):
            if stale.name not in wanted:
                stale.unlink()
        ninja.run()
        write_info(package, info)

    def plan_cpu(self, ninja: Ninja, cxx: list[str], package: Path, work: Path) -> dict:
        import pybind11

        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        flags = [*CXXFLAGS, *extra, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
        openmp = ["-fopenmp"]
        if not OPENMP or not compiles(cxx, openmp, "#include <omp.h>\nint main() { return 0; }", True):
            openmp = []
        threads = openmp or ["-pthread"]
        quiet = GCC_105593 if compiles(cxx, ["-Werror", *GCC_105593], "int main() { return 0; }") else []
        linux = [] if sys.platform == "darwin" else ["-Wl,-z,defs", "-Wl,--as-needed"]
        shared = ["-shared", *threads, *extra, *linux]
        sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        wanted, built, skipped = wanted_instruction_sets(), {}, {}
        compiled: dict[tuple[str, ...], Path] = {}
        for isa, isa_flags in INSTRUCTION_SETS.items():
            if isa not in wanted:
                skipped[isa] = f"not in FF_INSTRUCTION_SETS={os.environ['FF_INSTRUCTION_SETS']}"
                continue
            if not compiles(cxx, [*flags, *isa_flags], "int main() { return 0; }"):
                skipped[isa] = f"{cxx[0]} does not know {' '.join(isa_flags)}"
                continue
            built[isa] = isa_flags
            warnings = quiet if AVX512[0] in isa_flags else []
            (work / isa).mkdir(exist_ok=True)
            objects = []
            for s in sources:
                source_flags = isa_flags if uses_bfloat16(s) else [f for f in isa_flags if f not in BFLOAT16]
                key = (s.name, *source_flags)
                if key not in compiled:
                    command = [*cxx, *flags, *openmp, *source_flags, *warnings]
                    compiled[key] = ninja.compile(command, s, work / isa / f"{s.stem}.o", f"{s.name} [{isa}]")
                objects.append(compiled[key])
            library = package / "lib" / f"libffcpu_{isa}.so"
            ninja.link(cxx, objects, library, [*shared, "-lm"], library.name)

        python = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
        module = package / ("_native" + sysconfig.get_config_var("EXT_SUFFIX"))
        source = ROOT / "csrc" / "bindings.cpp"
        binding = ninja.compile([*cxx, *flags, *python], source, work / "bindings.o", source.name)
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        ninja.link(cxx, [binding], module, ["-shared", *undefined, *extra, "-ldl"], module.name)
        version = (run([*cxx, "--version"]).stdout.splitlines() or ["unknown"])[0]
        return {
            "compiler": version,
            "flags": " ".join([*CXXFLAGS, *extra, *openmp]),
            "openmp": bool(openmp),
            "instruction_sets": {isa: " ".join(f) for isa, f in built.items()},
            "skipped": skipped,
        }

    def plan_cuda(self, ninja: Ninja, package: Path, work: Path) -> dict:
        cuda = Cuda()
        if cuda.reason:
            return {"reason": cuda.reason}
        (work / "cuda").mkdir(exist_ok=True)
        extra = shlex.split(os.environ.get("NVCCFLAGS", ""))
        flags = [*NVCCFLAGS, *extra, *cuda.gencode(), f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
        objects = [
            ninja.compile([cuda.nvcc, *flags], s, work / "cuda" / f"{s.stem}.o", f"{s.name} [{','.join(cuda.archs)}]")
            for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        ]
        link = ["-shared", "-cudart=static", *cuda.gencode()]
        ninja.link([cuda.nvcc], objects, package / "lib" / "libffcuda.so", link, "libffcuda.so")
        return {
            "compiler": f"nvcc {'.'.join(map(str, cuda.version))}",
            "flags": " ".join([*NVCCFLAGS, *extra]),
            "architectures": list(cuda.archs),
        }

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib, "ffkernels")
        return [str(p) for p in [*package.glob("_native*"), *package.glob("lib/*"), package / "_build_info.json"]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


native = Extension(
    "ffkernels._native",
    sources=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.c*"))],
)
setup(ext_modules=[native] if BUILD_CPU else [], cmdclass={"build_py": BuildPy, "build_ext": BuildNative})
