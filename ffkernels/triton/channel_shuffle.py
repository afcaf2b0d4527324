import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device

BLOCK = 1024


@triton.jit
def channel_shuffle_kernel(
    x_ptr,  # (outer, channels, inner)
    y_ptr,  # (outer, channels, inner)
    total,  # outer * channels * inner
    channels,
    inner,  # H * W for NCHW, 1 for NHWC
    groups,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    row = at // inner
    channel = row % channels
    source = (channel % groups) * (channels // groups) + channel // groups
    value = tl.load(x_ptr + at + (source - channel) * inner, mask=mask)
    tl.store(y_ptr + at, value, mask=mask)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    y = torch.empty_like(x)
    total = x.numel()
    if total:
        inner = x.shape[2] * x.shape[3] if x.is_contiguous() else 1
        with on_device(x):
            channel_shuffle_kernel[(triton.cdiv(total, BLOCK),)](
                x, y, total, x.shape[1], inner, groups, BLOCK=BLOCK, enable_fp_fusion=False
            )
    return y
