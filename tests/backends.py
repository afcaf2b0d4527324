"""Test parameters from the registry: every backend of an op, on the device it runs on, skipped with its own reason."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from ffkernels import Policy, config, cuda, registry


class Backend(NamedTuple):
    name: str
    device: str

    @property
    def policy(self) -> Policy:
        return Policy("require", self.name)

    @property
    def emulated(self) -> bool:
        """Whether GPU kernels run on the CPU, slowly: under Triton's interpreter or the CUDA emulation."""
        return self.name != "cpu" and self.device == "cpu"


def backends(op: str) -> list:
    """``pytest.param`` of a :class:`Backend` for each implementation of ``op``."""
    params = []
    for name in registry.implementations(op):
        emulated = config.triton_interpreter() if name == "triton" else cuda.device_type() == "cpu"
        device = "cpu" if name == "cpu" or emulated else "cuda"
        reason = registry.backend_unavailable(name, device)
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"backend {name}: {reason}"))
        params.append(pytest.param(Backend(name, device), id=name, marks=marks))
    return params


def backend_dtypes(op: str) -> list:
    """``pytest.param`` of (:class:`Backend`, dtype) for each dtype that an implementation of ``op`` advertises."""
    return [
        pytest.param(param.values[0], dtype, id=f"{param.id}-{str(dtype).removeprefix('torch.')}", marks=param.marks)
        for param in backends(op)
        for dtype in registry.implementations(op)[param.values[0].name].dtypes
    ]


FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
