"""The loss of JPEG compression (ITU-T T.81) for a batch of images, without the entropy coding that loses nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

# The example tables of ITU-T T.81, annex K.1: luminance and chrominance.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(images: Tensor, quality: Sequence[float]) -> Tensor:
    """Compresses and decompresses: colour transform, chroma halved, 8 x 8 cosine transform, quantisation and back.

    Args:
        images: (B, 3, H, W) float RGB, 0 to 255; H and W are multiples of 16.
        quality: B values from 1 to 100, as the Independent JPEG Group's software scales the tables.

    Returns:
        (B, 3, H, W), whole numbers from 0 to 255.

    Raises:
        ValueError: H or W is not a multiple of 16.
    """
    if images.shape[2] % 16 or images.shape[3] % 16:
        raise ValueError(f"jpeg: images are {tuple(images.shape)}, height and width must be multiples of 16")
    device, dtype = images.device, images.dtype
    values = torch.as_tensor(list(quality), dtype=torch.float64).clamp(1, 100)
    scale = torch.where(values < 50, 5000 / values, 200 - 2 * values)[:, None, None]
    tables = [
        torch.floor((torch.tensor(table, dtype=torch.float64) * scale + 50) / 100).clamp(1, 255).to(device, dtype)
        for table in (_LUMINANCE, _CHROMINANCE)
    ]
    ycc = torch.einsum("ij,bjhw->bihw", torch.tensor(_TO_YCC, dtype=dtype, device=device), images.round())
    luma = _quantise(ycc[:, :1] - 128, tables[0]) + 128
    chroma = _quantise(avg_pool2d(ycc[:, 1:], 2), tables[1])
    chroma = interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = torch.einsum("ij,bjhw->bihw", torch.tensor(_TO_RGB, dtype=dtype, device=device), torch.cat([luma, chroma], 1))
    return rgb.round_().clamp_(0, 255)


def _quantise(planes: Tensor, table: Tensor) -> Tensor:
    """(B, C, H, W) with every 8 x 8 block's cosine coefficients rounded to multiples of ``table`` (B, 8, 8)."""
    frequency, position = torch.arange(8)[:, None], torch.arange(8)
    basis = torch.cos((2 * position + 1) * frequency * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    basis = basis.to(planes)
    batch, channels, height, width = planes.shape
    blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    table = table[:, None, None, None]
    coefficients = (basis @ blocks @ basis.T).div_(table).round_().mul_(table)
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape_as(planes)
