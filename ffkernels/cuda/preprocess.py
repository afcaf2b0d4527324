from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from . import on_device, stream


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
    out = image.new_empty(batch, 3, *canvas, dtype=dtype)
    with on_device(image):
        code = native.ff_cuda_preprocess(
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
            -1 if image.dtype == torch.uint8 else DTYPES[image.dtype],
            DTYPES[dtype],
            stream(image),
        )
    check(code, "preprocess", image)
    return out
