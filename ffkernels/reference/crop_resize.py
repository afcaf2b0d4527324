"""Views of photographs in plain PyTorch, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def crop_resize(pixels: Tensor, views: Tensor, images: int, size: int, fill: Sequence[int]) -> Tensor:
    """See :func:`ffkernels.ops.crop_resize.crop_resize`."""
    out = torch.empty(images, 3, size, size, dtype=torch.uint8, device=pixels.device)
    colour = torch.tensor(list(fill), dtype=torch.uint8, device=pixels.device).view(3, 1, 1)
    for row in views.tolist():
        offset, stride, *source, u, v, width, height, mirror, antialias, image, left, top, side = row
        x, y, source_width, source_height = source
        photograph = pixels[offset : offset + 3 * stride * (y + source_height)].view(-1, stride, 3)
        part = photograph[y:, x : x + source_width].permute(2, 0, 1)[None]
        square = out[image, :, top : top + side, left : left + side]
        if (width, height) != (side, side):
            square.copy_(colour.expand_as(square))
        window = square[:, v : v + height, u : u + width]
        if mirror:
            window = square[:, v : v + height, side - u - width : side - u]
        _place(_resize(part, height, width, bool(antialias)), window, bool(mirror))
    return out


def _resize(part: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    if part.device.type == "cpu":
        # PyTorch's resize of channels-last uint8 is several times faster than that of float.
        part = part.contiguous(memory_format=torch.channels_last)
    else:
        part = part.float()
    if part.shape[2:] != (height, width):
        part = interpolate(part, (height, width), mode="bilinear", antialias=antialias)
        if part.dtype != torch.uint8:
            part = part.round().clamp_(0, 255)
    return part


def _place(part: Tensor, window: Tensor, mirror: bool) -> None:
    if not mirror:
        window.copy_(part[0])
    elif window.device.type == "cpu":
        # NumPy copies a reversed view at once; torch.flip is ten times slower on channels-last uint8.
        window.numpy()[...] = part[0].numpy()[..., ::-1]
    else:
        window.copy_(part[0].flip(2))
