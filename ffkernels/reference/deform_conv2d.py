"""Modulated deformable convolution, DCNv2 (Zhu et al. 2019): every tap reads the image where its offset says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_norm import BatchNorm
from ..layout import memory_format
from ..params import ConvParams
from .layers import activate, batch_norm


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    conv: ConvParams,
    bn: BatchNorm | None,
    activation: str = "none",
    negative_slope: float = 0.1,
) -> Tensor:
    kh, kw = conv.weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    # Half precision cannot hold a position: 100.3 becomes 100.5 in bfloat16.
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    offset = offset.unflatten(1, (kh, kw, 2)).permute(0, 4, 5, 1, 2, 3)
    mask = mask.unflatten(1, (kh, kw)).permute(0, 3, 4, 1, 2)
    first_row = torch.arange(out_h, device=x.device, dtype=offset.dtype) * conv.stride - conv.padding
    first_column = torch.arange(out_w, device=x.device, dtype=offset.dtype) * conv.stride - conv.padding
    columns = first_column[:, None] + torch.arange(kw, device=x.device)

    framed = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()
    y = None
    for i in range(kh):  # A row of taps at a time bounds the memory.
        row = first_row[:, None, None] + i + offset[:, :, :, i, :, 0]
        samples = bilinear(framed, row, columns + offset[:, :, :, i, :, 1]) * mask[:, :, :, i, :, None]
        part = F.linear(samples.flatten(3), conv.weight[:, :, i].transpose(1, 2).flatten(1))
        y = part if y is None else y + part
    if conv.bias is not None:
        y = y + conv.bias
    y = y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))
    return activate(batch_norm(y, bn), activation, negative_slope)


def bilinear(framed: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Samples an image at positions row, column (B, H', W', K), in pixels; the result is (B, H', W', K, C).

    ``framed`` (B, H + 2, W + 2, C) is the image in a frame of zeros one pixel wide. Each of the four neighbours of a
    position is inside or outside on its own: those outside, however far, read the frame.
    """
    batch, height, width, channels = framed.shape
    image = torch.arange(batch, device=framed.device)[:, None, None, None] * (height * width)
    top, left = row.floor(), column.floor()
    below, right = row - top, column - left
    y = None
    for di, row_weight in ((0, 1 - below), (1, below)):
        i = (top.long() + 1 + di).clamp(0, height - 1)
        for dj, column_weight in ((0, 1 - right), (1, right)):
            j = (left.long() + 1 + dj).clamp(0, width - 1)
            pixels = framed.view(-1, channels).index_select(0, (image + i * width + j).flatten())
            weight = (row_weight * column_weight).to(framed.dtype)
            part = weight[..., None] * pixels.view(*weight.shape, channels)
            y = part if y is None else y + part
    return y
