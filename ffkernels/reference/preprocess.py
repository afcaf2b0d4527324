"""From an 8-bit image to the network's input in plain PyTorch: resize, letterbox, channel order, mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def preprocess(
    image: Tensor,
    size: tuple[int, int],
    canvas: tuple[int, int],
    offset: tuple[int, int],
    flip: bool,
    mean: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`ffkernels.ops.preprocess.preprocess`."""
    x = image.movedim(-1, -3).unsqueeze(0) if image.dim() == 3 else image.movedim(-1, -3)
    if tuple(x.shape[-2:]) != size:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x = F.interpolate(x.to(compute), size=size, mode="bilinear", align_corners=False, antialias=True)
    out = torch.zeros(x.shape[0], 3, *canvas, dtype=dtype, device=x.device)
    top, left = offset
    inside = out[:, :, top : top + size[0], left : left + size[1]]
    for channel in range(3):
        torch.sub(x[:, 2 - channel if flip else channel], float(mean[channel]), out=inside[:, channel])
    return out
