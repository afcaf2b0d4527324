import torch
from torch import Tensor

from ..native import DTYPES, NCHW, NHWC, check, module


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    native, _ = module()
    nchw = x.is_contiguous()
    y = torch.empty_like(x)
    batch, channels, height, width = x.shape
    code = native.ff_cpu_channel_shuffle(
        x.data_ptr(),
        y.data_ptr(),
        batch,
        channels,
        height * width,
        groups,
        NCHW if nchw else NHWC,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    check(code, "channel_shuffle", x)
    return y
