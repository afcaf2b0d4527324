"""Concatenation and channel shuffle of convolutions' outputs (csrc/cuda/ssh_grouped.cu), and their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from . import stream
from .conv_chain import Source, empty_nhwc, pointer


def _branches(sources: Sequence[Source]) -> list[int]:
    values = [v for s in sources for v in (s.x.data_ptr(), s.x.shape[1], pointer(s.stats))]
    return values + [0] * (9 - len(values))


def join(sources: Sequence[Source], groups: int) -> Tensor:
    """Up to three sources of one activation, applied, concatenated and shuffled; NHWC."""
    native, _ = module()
    x = sources[0].x
    batch, _, height, width = x.shape
    y = empty_nhwc((batch, sum(s.x.shape[1] for s in sources), height, width), x)
    code = native.ff_cuda_seam_join(
        *_branches(sources),
        sources[0].activation,
        batch * height * width,
        groups,
        y.data_ptr(),
        DTYPES[y.dtype],
        stream(x),
    )
    check(code, "concatenation and shuffle", *(s.x for s in sources))
    return y


def split(grad: Tensor, sources: Sequence[Source], groups: int) -> list[Tensor]:
    """The gradients of the sources' normalised values from that of their join; NHWC."""
    native, _ = module()
    batch, _, height, width = grad.shape
    grads = [torch.empty_like(s.x) for s in sources]
    code = native.ff_cuda_seam_split(
        grad.data_ptr(),
        *_branches(sources),
        sources[0].activation,
        batch * height * width,
        groups,
        *(g.data_ptr() for g in grads),
        *[0] * (3 - len(grads)),
        DTYPES[grad.dtype],
        stream(grad),
    )
    check(code, "concatenation and shuffle backward", grad)
    return grads
