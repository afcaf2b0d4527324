"""The CUDA C++ kernels: loads libffcuda and calls into it on the current stream."""

from __future__ import annotations

import functools
import os
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
    return None


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
