"""Views of photographs for training: parts of them, resized and mirrored, a batch in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry
from ..config import Policy, call_policy
from ..reference import crop_resize as reference
from .library import define, kernels

OP = "crop_resize"
COLUMNS = 16


def _supports(request: registry.Request) -> str | None:
    return "more than 65,535 views" if request.facts.get("many", False) else None


registry.register(OP, "cuda", (torch.uint8,), backward=False, supports=_supports)


def _run(pixels: Tensor, views: Tensor, images: int, size: int, fill: Sequence[int], backend: str) -> Tensor:
    return kernels(backend, OP).crop_resize(pixels, views, images, size, fill)


def _fake(pixels: Tensor, views: Tensor, images: int, size: int, fill: Sequence[int], backend: str) -> Tensor:
    return pixels.new_empty(images, 3, size, size)


_raw = define(
    "_crop_resize(Tensor pixels, Tensor views, SymInt images, SymInt size, int[] fill, str backend) -> Tensor",
    _run,
    _fake,
)


def crop_resize(
    pixels: Tensor, views: Tensor, images: int, size: int, fill: Sequence[int], policy: Policy | None = None
) -> Tensor:
    """Parts of photographs, each resized into a place in a square of one of ``images`` images.

    The resize is bilinear with half-pixel centres, as ``F.interpolate(mode="bilinear")``, with ``antialias=True`` where
    the view asks for it, rounded to 8 bits. Kernels round what lies between two values of 8 bits by float32 sums: in
    rare pixels they differ from the reference by one.

    Args:
        pixels: (n,) uint8, contiguous; photographs (H, W, 3) one after the other.
        views: (V, 16) int64, on the CPU: offset of the photograph in ``pixels`` and its W; x, y, width, height of the
            part that is seen, in its pixels; x, y, width, height of the place of that part in the square, in pixels,
            before mirroring; 1 to mirror the square; 1 for antialiasing; image, left, top and side of the square.
        images: images in the result. Their squares must not overlap; pixels outside all squares are undefined.
        size: side of an image.
        fill: red, green and blue of what a square shows outside the part, 0 to 255.
        policy: how to run; None for the environment's.

    Returns:
        (images, 3, size, size) uint8.

    Raises:
        ValueError: shapes, dtypes or devices are wrong, or a view leaves its photograph, its square or the images.
    """
    if pixels.dim() != 1 or pixels.dtype != torch.uint8 or not pixels.is_contiguous():
        raise ValueError(
            f"crop_resize: pixels are {tuple(pixels.shape)} {pixels.dtype}, expected (n,) uint8, contiguous"
        )
    if views.dim() != 2 or views.shape[1] != COLUMNS or views.dtype != torch.int64 or views.device.type != "cpu":
        raise ValueError(
            f"crop_resize: views are {tuple(views.shape)} {views.dtype} on {views.device}, expected (V, {COLUMNS}) "
            "int64 on the CPU"
        )
    if len(fill) != 3 or not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"crop_resize: fill is {tuple(fill)}, expected 3 values of 0 to 255")
    views = views.contiguous()
    if len(views) and (wrong := _misplaced(views, len(pixels), images, size)) is not None:
        raise ValueError(
            f"crop_resize: view {wrong} ({views[wrong].tolist()}) leaves its photograph, its square, the {images} "
            f"images of {size} pixels or the {len(pixels)} bytes of photographs"
        )
    backend = registry.select(OP, pixels, policy or call_policy(), many=len(views) > 65535)
    with torch.no_grad():
        if backend == "reference":
            return reference.crop_resize(pixels, views, images, size, tuple(fill))
        return _raw(pixels, views, images, size, list(fill), backend)


def _misplaced(views: Tensor, count: int, images: int, size: int) -> int | None:
    """The first view that would read or write what it must not."""
    offset, stride, x, y, width, height, u, v, to_width, to_height, _, _, image, left, top, side = views.numpy().T
    good = (offset >= 0) & (x >= 0) & (y >= 0) & (width >= 1) & (height >= 1) & (x + width <= stride)
    good &= offset + 3 * stride * (y + height) <= count
    good &= (u >= 0) & (v >= 0) & (to_width >= 1) & (to_height >= 1) & (u + to_width <= side) & (v + to_height <= side)
    good &= (image >= 0) & (image < images) & (left >= 0) & (top >= 0) & (left + side <= size) & (top + side <= size)
    return None if good.all() else int((~good).argmax())
