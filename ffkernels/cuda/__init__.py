"""The CUDA C++ kernels: loads libffcuda and calls into it on the current stream."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..native import FOLDER, build_info, module

_emulation: str | None = None


def emulate(library: str | os.PathLike[str]) -> None:
    """Run the kernels on CPU tensors from here on, by a ``libffcuda`` that csrc/emulation/build.py compiled.

    For tests, in a process of their own: CUDA tensors are refused afterwards. Call it before any op runs.
    """
    global _emulation
    _emulation = os.fspath(library)
    unavailable.cache_clear()


def device_type() -> str:
    """Type of the tensors that the kernels take: ``"cuda"``, under emulation ``"cpu"``."""
    return "cuda" if _emulation is None else "cpu"


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot run, ``None`` if they can. Loads them on the first call."""
    native, reason = module()
    if native is None:
        return reason
    if _emulation is not None:
        native.load_cuda(_emulation)
        return None
    recorded = build_info()["cuda"].get("reason")
    if recorded:
        return recorded
    try:
        native.load_cuda(str(FOLDER / "lib" / "libffcuda.so"))
    except RuntimeError as error:
        return f"libffcuda does not load: {error}"
    devices = native.ff_cuda_device_count()
    if devices < 0:
        return f"CUDA error {-devices}: {native.ff_cuda_error_string(-devices)}"
    if devices == 0:
        return "no CUDA device"
    if not torch.cuda.is_available():
        return "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
    architectures = build_info()["cuda"]["architectures"]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not has_code(architectures, major, minor):
            return (
                f"the kernels were built for sm_{', sm_'.join(architectures)} and {torch.cuda.get_device_name(device)} "
                f"is sm_{major}{minor}: build them with FF_CUDA_ARCHS={major}{minor}"
            )
    return None


def has_code(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Whether code for these architectures, such as "80" or "90a", runs on a GPU of a compute capability.

    Machine code runs on GPUs of the same major and no lower minor version, with the suffix ``a`` on that version alone;
    the PTX of the newest one without a suffix also runs on all later ones, but that of before 8.0 has no code for the
    tensor cores that later GPUs are taken to have.
    """
    plain, capability = [int(arch) for arch in architectures if arch.isdigit()], 10 * major + minor
    if plain and max(plain) <= capability and (max(plain) >= 80 or capability < 80):
        return True
    for arch in architectures:
        of_major, of_minor = divmod(int(arch.rstrip("af")), 10)
        if of_major == major and (of_minor == minor if arch.endswith("a") else of_minor <= minor):
            return True
    return False


def stream(x: Tensor) -> int:
    """The current stream of the tensor's device, as an integer."""
    if _emulation is not None:
        return 0
    return torch.cuda.current_stream(x.device).cuda_stream


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current for a launch."""
    if _emulation is not None or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
