"""Registration of raw ops with PyTorch. Raw ops are private: they have no autograd; public functions guard them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.library import Library

_library = Library("ffkernels", "FRAGMENT")


def define(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> Callable[..., object]:
    """Define ``ffkernels::<schema>`` for CPU and CUDA tensors, and the function that computes its output's shapes.

    The schema's name begins with an underscore. Returns the callable op.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"ffkernels::{name}", fake, lib=_library)
    return getattr(torch.ops.ffkernels, name).default


@functools.cache
def kernels(backend: str, op: str) -> ModuleType:
    """The module ``ffkernels.<backend>.<op>``, imported on first use: Triton is optional."""
    return importlib.import_module(f"ffkernels.{backend}.{op}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
