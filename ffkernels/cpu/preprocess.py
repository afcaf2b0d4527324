from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import DTYPES, check, module


def preprocess(
    image: Tensor,
    size: Sequence[int],
    canvas: Sequence[int],
    offset: Sequence[int],
    flip: bool,
    mean: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    native, _ = module()
    if image.dim() == 3:
        image = image.unsqueeze(0)
    batch, height, width, _ = image.shape
    threads = torch.get_num_threads()
    out = image.new_empty(batch, 3, *canvas, dtype=dtype)
    needed = native.ff_cpu_preprocess_workspace(height, width, *size, DTYPES[dtype], threads)
    workspace = image.new_empty(needed, dtype=torch.uint8)
    code = native.ff_cpu_preprocess(
        image.data_ptr(),
        *image.stride(),
        batch,
        height,
        width,
        out.data_ptr(),
        *size,
        *canvas,
        *offset,
        int(flip),
        *mean,
        workspace.data_ptr(),
        -1 if image.dtype == torch.uint8 else DTYPES[image.dtype],
        DTYPES[dtype],
        threads,
    )
    check(code, "preprocess", image)
    return out
