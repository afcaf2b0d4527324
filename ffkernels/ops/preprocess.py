"""From an 8-bit image to the network's input: resize, letterbox, channel order, mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry
from ..config import Policy, call_policy
from ..reference import preprocess as reference
from ..registry import Request
from .library import define, kernels

OP = "preprocess"


def _supports(request: Request) -> str | None:
    dtype = request.facts.get("output", torch.float32)
    return None if dtype in (torch.float32, torch.float64) else f"no {str(dtype).removeprefix('torch.')} output"


def _supports_cuda(request: Request) -> str | None:
    if request.facts.get("many", False):
        return "more than 65,535 images or 524,280 rows"
    dtype = request.facts.get("output", torch.float32)
    served = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return None if served else f"no {str(dtype).removeprefix('torch.')} output"


registry.register(OP, "cpu", (torch.uint8, torch.float32, torch.float64), backward=False, supports=_supports)
registry.register(OP, "cuda", (torch.uint8, torch.float32), backward=False, supports=_supports_cuda)


def _run(
    image: Tensor,
    size: Sequence[int],
    canvas: Sequence[int],
    offset: Sequence[int],
    flip: bool,
    mean: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return kernels(backend, OP).preprocess(image, size, canvas, offset, flip, mean, dtype)


def _fake(image: Tensor, size: Sequence[int], canvas: Sequence[int], *args) -> Tensor:
    batch = 1 if image.dim() == 3 else image.shape[0]
    return image.new_empty(batch, 3, *canvas, dtype=args[-2])


_raw = define(
    "_preprocess(Tensor image, SymInt[] size, SymInt[] canvas, SymInt[] offset, bool flip, float[] mean, "
    "ScalarType dtype, str backend) -> Tensor",
    _run,
    _fake,
)

MEAN = (104.0, 117.0, 123.0)
"""Mean of blue, green and red that the networks are trained with (0 to 255)."""

_ORDERS = {"rgb": True, "bgr": False}


def preprocess(
    image: Tensor,
    size: tuple[int, int] | None = None,
    canvas: tuple[int, int] | None = None,
    offset: tuple[int, int] = (0, 0),
    *,
    order: str = "rgb",
    mean: Sequence[float] = MEAN,
    dtype: torch.dtype = torch.float32,
    policy: Policy | None = None,
) -> Tensor:
    """Blue, green, red minus their means, resized to ``size`` and placed on a ``canvas`` of zeros (the mean colour).

    ``out[b, c, top + i, left + j] = resize(image)[b, i, j, c'] - mean[c]``, c' being c in blue, green, red order.
    The resize is bilinear with the support widened by the reduction (triangle filter, half-pixel centres, as
    ``F.interpolate(mode="bilinear", antialias=True)``), computed in float32 (float64 for a float64 output) and not
    rounded to 8 bits. No resize happens where ``size`` is the image's own.

    Args:
        image: (H, W, 3) or (B, H, W, 3), uint8 or floating point, 0 to 255, any strides.
        size: height and width of the resized image; ``None`` keeps H and W.
        canvas: height and width of the result; ``None``: just as large as ``offset`` and ``size`` need.
        offset: row and column of the image's top left corner on the canvas.
        order: ``"rgb"`` or ``"bgr"``, the order of the image's channels.
        mean: subtracted from blue, green and red.
        dtype: floating dtype of the result.

    Returns:
        (B, 3, canvas height, canvas width), contiguous.

    Raises:
        ValueError: shape, dtype, size, offset or canvas do not fit together.
    """
    if image.dim() not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape[-3:]:
        raise ValueError(f"preprocess: image is {tuple(image.shape)}, expected (H, W, 3) or (B, H, W, 3)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"preprocess: image is {image.dtype}, expected uint8 or floating point")
    if order not in _ORDERS:
        raise ValueError(f"preprocess: order is {order!r}, expected 'rgb' or 'bgr'")
    if len(mean) != 3:
        raise ValueError(f"preprocess: mean has {len(mean)} values, expected 3 (blue, green, red)")
    size = tuple(image.shape[-3:-1]) if size is None else tuple(size)
    needed = (offset[0] + size[0], offset[1] + size[1])
    canvas = needed if canvas is None else tuple(canvas)
    if min(size) < 1 or min(offset) < 0 or canvas[0] < needed[0] or canvas[1] < needed[1]:
        raise ValueError(f"preprocess: size {size} at offset {tuple(offset)} does not fit on a canvas of {canvas}")
    many = (image.dim() == 4 and image.shape[0] > 65535) or canvas[0] > 524280
    backend = registry.select(OP, image, policy or call_policy(), output=dtype, many=many)
    with torch.no_grad():
        if backend == "reference":
            return reference.preprocess(image, size, canvas, tuple(offset), _ORDERS[order], mean, dtype)
        return _raw(image, size, canvas, tuple(offset), _ORDERS[order], list(mean), dtype, backend)
