from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from .conv import empty_nhwc, pointer


def scatter(maps: Sequence[Tensor], softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """NHWC maps (B, A * 16, H, W) of all levels -> bbox (B, N, 4), cls (B, N, 2), landmarks (B, N, 10)."""
    native, _ = module()
    return scatter_with(native.ff_cpu_multi_head_scatter, torch.get_num_threads(), maps, softmax)


def gather(
    grads: Sequence[Tensor | None], probabilities: Tensor | None, shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Gradients of the maps of ``shapes`` from those of bbox, cls and landmarks; None is zero."""
    native, _ = module()
    return gather_with(native.ff_cpu_multi_head_gather, torch.get_num_threads(), grads, probabilities, shapes)


def scatter_with(
    entry: Callable[..., int], runner: int, maps: Sequence[Tensor], softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`scatter` by a native entry; ``runner`` is its last argument, the number of threads or the stream."""
    batch = maps[0].shape[0]
    rows = sum(z.shape[1] // 16 * z.shape[2] * z.shape[3] for z in maps)
    bbox, cls, landmarks = (maps[0].new_empty((batch, rows, k)) for k in (4, 2, 10))
    first = 0
    for z in maps:
        anchors, pixels = z.shape[1] // 16, z.shape[2] * z.shape[3]
        code = entry(
            z.data_ptr(),
            batch,
            pixels,
            anchors,
            softmax,
            bbox.data_ptr(),
            cls.data_ptr(),
            landmarks.data_ptr(),
            first,
            rows,
            DTYPES[z.dtype],
            runner,
        )
        check(code, "multi_head", z)
        first += anchors * pixels
    return bbox, cls, landmarks


def gather_with(
    entry: Callable[..., int],
    runner: int,
    grads: Sequence[Tensor | None],
    probabilities: Tensor | None,
    shapes: Sequence[Sequence[int]],
) -> list[Tensor]:
    """:func:`gather` by a native entry, as :func:`scatter_with`."""
    like = next(g for g in grads if g is not None)
    rows, first, maps = like.shape[1], 0, []
    for shape in shapes:
        z = empty_nhwc(tuple(shape), like)
        anchors, pixels = shape[1] // 16, shape[2] * shape[3]
        code = entry(
            *(pointer(g) for g in grads),
            pointer(probabilities),
            shape[0],
            pixels,
            anchors,
            z.data_ptr(),
            first,
            rows,
            DTYPES[z.dtype],
            runner,
        )
        check(code, "multi_head backward", z)
        first += anchors * pixels
        maps.append(z)
    return maps
