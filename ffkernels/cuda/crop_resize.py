from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import check, module
from . import on_device, stream


def crop_resize(pixels: Tensor, views: Tensor, images: int, size: int, fill: Sequence[int]) -> Tensor:
    native, _ = module()
    rows = views.to(pixels.device, non_blocking=True)
    out = torch.empty(images, 3, size, size, dtype=torch.uint8, device=pixels.device)
    largest = int(views[:, 15].max()) if len(views) else 0
    with on_device(pixels):
        code = native.ff_cuda_crop_resize(
            pixels.data_ptr(), rows.data_ptr(), len(views), largest, out.data_ptr(), size, *fill, stream(pixels)
        )
    check(code, "crop_resize", pixels)
    return out
