"""Fused kernels for small convolutional networks: C++ for CPUs, CUDA C++ and Triton for GPUs, PyTorch as reference.

>>> import torch, ffkernels
>>> ffkernels.channel_shuffle(torch.arange(4.0).view(1, 4, 1, 1), groups=2).flatten().tolist()
[0.0, 2.0, 1.0, 3.0]
"""

from importlib.metadata import PackageNotFoundError, version

from .batch_norm import BatchNorm
from .config import Policy, set_fused, use
from .ops import *  # noqa: F403
from .ops import __all__ as _ops
from .params import ChannelMLP, ConvParams, ConvUnit, HeadParams
from .registry import BackendUnavailable, FusedKernelRequired
from .report import report

try:
    __version__ = version("featherface")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "BackendUnavailable",
    "BatchNorm",
    "ChannelMLP",
    "ConvParams",
    "ConvUnit",
    "FusedKernelRequired",
    "HeadParams",
    "Policy",
    "report",
    "set_fused",
    "use",
    *_ops,
]
