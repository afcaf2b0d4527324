from collections.abc import Sequence

from torch import Tensor

from ..cpu.multi_head import gather_with, scatter_with
from ..native import module
from . import on_device, stream


def scatter(maps: Sequence[Tensor], softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """NHWC maps (B, A * 16, H, W) of all levels -> bbox (B, N, 4), cls (B, N, 2), landmarks (B, N, 10)."""
    native, _ = module()
    with on_device(maps[0]):
        return scatter_with(native.ff_cuda_multi_head_scatter, stream(maps[0]), maps, softmax)


def gather(
    grads: Sequence[Tensor | None], probabilities: Tensor | None, shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Gradients of the maps of ``shapes`` from those of bbox, cls and landmarks; None is zero."""
    native, _ = module()
    like = next(g for g in grads if g is not None)
    with on_device(like):
        return gather_with(native.ff_cuda_multi_head_gather, stream(like), grads, probabilities, shapes)
