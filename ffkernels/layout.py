"""Memory formats of (B, C, H, W) tensors: ops take NCHW or channels_last and their output keeps the format."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of ``x``: channels_last where the channel is its innermost dimension, else contiguous (NCHW)."""
    if x.is_contiguous() or x.shape[1] == 1 or x.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last


def dense(x: Tensor) -> Tensor:
    """``x`` itself if it is dense in either format, else a dense copy in the format it is closest to."""
    return x.contiguous(memory_format=memory_format(x))
