"""Sums of floats in an order that nobody knows, the same every time: the summands are rounded to 64-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def scatter_sum(x: Tensor, largest: Tensor, terms: int, add: Callable[[Tensor, Tensor], None]) -> Tensor:
    """What ``add`` sums into a tensor like ``x`` (NHWC), in its dtype.

    Args:
        x: (B, C, H, W), NHWC.
        largest: the largest magnitude of a summand, or several that include it; infinite where one is not finite, which
            makes every sum NaN.
        terms: no value of the result sums more than these.
        add: ``add(scale, total)`` adds ``int(summand * scale)`` to ``total`` (int64, zero before) for every summand;
            ``scale`` is (), float64.
    """
    bound = largest.max().double().clamp(min=1e-30) * terms  # of a sum; in units of 1 / scale it stays below 2 ** 62
    scale = torch.exp2((62 - bound.log2()).floor())
    scale = torch.where(bound.isfinite(), scale, torch.nan)
    total = torch.zeros(x.shape, dtype=torch.int64, device=x.device).to(memory_format=torch.channels_last)
    add(scale, total)
    return (total / scale).to(x.dtype)
